"""Golden vectors of PEFT 0.21.2's adapters at options of their own, on CPU.

Run in an environment of its own (torch 2.13.0 first, then peft 0.21.2; numpy):
  python tests/numerics/make/peft_options.py tests/numerics/peft_options.npz

The first layer of a two-layer MLP (16 -> 40 -> 8), trained entries off their start.
Contents of the file: weight; <config>/state/<name as stored>, <config>/merged; about
(json: each <config>'s type and options, the sizes and the versions). The CUDA kernel
that BOFT's factors need is replaced by the block diagonal that it computes.
"""

from importlib.metadata import version
import json
import sys

import numpy as np
import peft
import peft.tuners.boft.layer as boft
import torch
from torch import nn

SIZES = (16, 40, 8)
CONFIGS = {
    "boft_factors": ("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    "boft_blocks": ("BOFT", {"boft_block_size": 0, "boft_block_num": 4}),
    "fourierft": ("FourierFT", {"n_frequency": 33, "random_loc_seed": 9}),
    "hra_gs": ("HRA", {"r": 3, "apply_GS": True}),
    "hra_odd": ("HRA", {"r": 3}),
    "lokr_both": (
        "LoKr",
        {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    ),
    "lokr_factor": ("LoKr", {"r": 2, "decompose_factor": 3}),
    "oft_adjusted": ("OFT", {"r": 0, "oft_block_size": 5}),
    "oft_coft": ("OFT", {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.1}),
    "oft_exact": ("OFT", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
    "oft_share": ("OFT", {"r": 0, "oft_block_size": 4, "block_share": True}),
    "oft_terms": ("OFT", {"r": 0, "oft_block_size": 4, "num_cayley_neumann_terms": 3}),
    "randlora_drawn": (
        "RandLora",
        {"r": 6, "save_projection": False, "projection_prng_key": 11},
    ),
    "randlora_sparse": (
        "RandLora",
        {"r": 6, "save_projection": False, "very_sparse": True},
    ),
    "vera_drawn": ("Vera", {"r": 6, "save_projection": False}),
    "vblora_topk": (
        "VBLoRA",
        {"num_vectors": 16, "vector_length": 4, "save_only_topk_weights": True},
    ),
    "waveft_db3": ("WaveFT", {"n_frequency": 30, "wavelet_family": "db3"}),
    "waveft_sym4": ("WaveFT", {"n_frequency": 30, "wavelet_family": "sym4"}),
    "waveft_plain": (
        "WaveFT",
        {"n_frequency": 30, "use_idwt": False, "proportional_parameters": True},
    ),
}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:])

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


class BlockDiagonal:
    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*torch.unbind(b)) for b in blocks])


@torch.no_grad()
def golden(kind, options):
    torch.manual_seed(0)
    model = MLP()
    base = model.lin0.weight.numpy().copy()
    targets = {"target_modules": ["lin0", "lin1"]}
    config = getattr(peft, f"{kind}Config")(**targets | options)
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad:
            p += 0.1 * torch.randn(p.shape, generator=generator)
    stored = peft.get_peft_model_state_dict(model.eval())
    state = {f"state/{n}": v.numpy() for n, v in stored.items() if "lin1" not in n}
    merged = model.merge_and_unload().lin0.weight
    return base, state | {"merged": merged.numpy()}, config.peft_type.value


def main(path):
    boft.get_fbd_cuda, boft.FastBlockDiag = lambda: True, BlockDiagonal
    out, types = {}, {}
    for name, (kind, options) in CONFIGS.items():
        base, values, types[name] = golden(kind, options)
        out |= {f"{name}/{n}": v for n, v in values.items()} | {"weight": base}
    about = {
        "generator": "tests/numerics/make/peft_options.py",
        "peft": version("peft"),
        "torch": version("torch"),
        "sizes": SIZES,
        "configs": {n: (types[n], o) for n, (_, o) in CONFIGS.items()},
        "seeds": "base 0, state 7",
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **out)


if __name__ == "__main__":
    main(sys.argv[1])
