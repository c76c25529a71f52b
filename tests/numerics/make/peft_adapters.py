"""Golden vectors of PEFT 0.21.2's adapters and their combinations, on CPU.

Run in an environment of its own (torch 2.13.0 first, then peft 0.21.2; numpy):
  python tests/numerics/make/peft_adapters.py tests/numerics/peft_adapters.npz

A two-layer MLP (16 -> 32 -> 8) with every adapter type, all trained entries moved off
their start. Contents of the file: x; base/<leaf>; <config>/state/<name in the model>,
<config>/y, <config>/merged/<leaf>; combine/state/<name>, combine/<mode>/<layer>, and
combine/<mode>/u<i>, the uniforms behind its masks; identity/<kind>/..., one adapter
combined with weight 1; about (json: each <config>'s options and the versions).
"""

from importlib.metadata import version
import json
import sys

import numpy as np
import peft
import torch
from torch import nn

LAYERS = ["lin0", "lin1"]
LORA = {"r": 4, "lora_alpha": 6}
CONFIGS = {
    "lora": ("Lora", LORA),
    "lora_rs": ("Lora", LORA | {"use_rslora": True}),
    "dora": ("Lora", LORA | {"use_dora": True}),
    "lora_bias": ("Lora", {"r": 4, "lora_bias": True}),
    "lora_pissa": ("Lora", {"r": 4, "init_lora_weights": "pissa"}),
    "lora_olora": ("Lora", {"r": 4, "init_lora_weights": "olora"}),
    "lora_orthogonal": ("Lora", {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora_rank_pattern": (
        "Lora",
        {"r": 4, "rank_pattern": {"lin1": 2}, "alpha_pattern": {"lin1": 7}},
    ),
    "loha": ("LoHa", {"r": 4, "alpha": 6}),
    "lokr": ("LoKr", {"r": 4, "alpha": 6}),
    "ia3": ("IA3", {"feedforward_modules": ["lin1"]}),
    "oft": ("OFT", {"r": 0, "oft_block_size": 4}),
    "boft": ("BOFT", {"boft_block_size": 4}),
    "vera": ("Vera", {"r": 8, "target_modules": ["lin0"]}),
    "fourierft": ("FourierFT", {"n_frequency": 20}),
    "hra": ("HRA", {"r": 4}),
    "miss": ("Miss", {"r": 4}),
    "randlora": ("RandLora", {"r": 4, "target_modules": ["lin0"]}),
    "shira": ("Shira", {"r": 2}),
    "waveft": ("WaveFT", {"n_frequency": 20}),
    "c3a": ("C3A", {"block_size": 8}),
    "road": ("Road", {"group_size": 8}),
    "delora": ("Delora", {"r": 4}),
    "gralora": ("Gralora", {"r": 4, "gralora_k": 2}),
    "vblora": ("VBLoRA", {"r": 2, "num_vectors": 16, "vector_length": 4, "topk": 2}),
    "ln_tuning": ("LNTuning", {}),
    "hira": ("Hira", {"r": 4}),
    "adalora": ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "tinylora": ("TinyLora", {}),
    "psoft": ("Psoft", {"r": 4}),
    "unilora": ("UniLora", {}),
    "osf": ("OSF", {}),
}
MODES = "linear cat svd ties dare_linear dare_ties magnitude_prune ties_svd".split()
MODES += ["dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
KINDS["bias"] = {"lora_bias": True}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.act, self.lin1 = nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)

    def forward(self, x):
        return self.lin1(self.act(self.lin0(x)))


def base():
    torch.manual_seed(0)
    return MLP()


def config(kind, options):
    return getattr(peft, f"{kind}Config")(**{"target_modules": LAYERS} | options)


def moved(model, seed, keep=lambda name: True):
    """Every trained entry moved off its start."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if keep(name) and p.requires_grad and p.is_floating_point():
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def arrays(prefix, tensors):
    plain = (torch.int32, torch.int64, torch.bool)
    return {
        f"{prefix}/{name}": v.detach().numpy()
        for name, v in tensors.items()
        if v.dtype.is_floating_point or v.dtype in plain
    }


@torch.no_grad()
def adapters(x):
    out = {}
    for name, (kind, options) in CONFIGS.items():
        model = moved(peft.get_peft_model(base(), config(kind, options)), 7)
        out |= arrays(f"{name}/state", model.state_dict())
        buffers = dict(model.named_buffers())
        hidden = {n: b for n, b in buffers.items() if n not in model.state_dict()}
        out |= arrays(f"{name}/state", hidden)
        out[f"{name}/y"] = model(x).numpy()
        merged = model.merge_and_unload()
        out |= arrays(f"{name}/merged", merged.state_dict())
    return out


def pair():
    first = config("Lora", LORA)
    model = peft.get_peft_model(base(), first, adapter_name="a")
    model.add_adapter("b", config("Lora", LORA | {"lora_alpha": 3}))
    model.set_adapter("a")
    moved(model, 7)
    for p in model.parameters():
        p.requires_grad = True
    return moved(model, 9, lambda name: ".b." in name)


@torch.no_grad()
def combinations():
    out, drawn = {}, []
    generator = torch.Generator().manual_seed(3)

    def bernoulli(p, *args, **kwargs):
        drawn.append(torch.rand(p.shape, generator=generator).numpy())
        return (torch.from_numpy(drawn[-1]) < p).to(p.dtype)

    torch.bernoulli = bernoulli
    for mode in MODES:
        drawn.clear()
        with torch.enable_grad():
            model = pair()
        out |= arrays("combine/state", model.state_dict())
        options = {} if mode in ("linear", "cat", "svd") else {"density": 0.5}
        model.add_weighted_adapter(
            ["a", "b"], [0.7, 0.4], "c", combination_type=mode, **options
        )
        for layer in LAYERS:
            delta = getattr(model.base_model.model, layer).get_delta_weight("c")
            out[f"combine/{mode}/{layer}"] = delta.numpy()
        out |= {f"combine/{mode}/u{i}": u for i, u in enumerate(drawn)}
    return out


@torch.no_grad()
def identities(x):
    out = {}
    for kind, options in KINDS.items():
        chosen = config("Lora", LORA | options)
        model = peft.get_peft_model(base(), chosen, adapter_name="a")
        moved(model, 7)
        out |= arrays(f"identity/{kind}/state", model.state_dict())
        out[f"identity/{kind}/y"] = model(x).numpy()
        model.add_weighted_adapter(["a"], [1.0], "c", combination_type="linear")
        model.set_adapter("c")
        out[f"identity/{kind}/combined"] = model(x).numpy()
    return out


def main(path):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    out = {"x": x.numpy()} | arrays("base", base().state_dict())
    out |= adapters(x) | combinations() | identities(x)
    about = {
        "generator": "tests/numerics/make/peft_adapters.py",
        "peft": version("peft"),
        "torch": version("torch"),
        "configs": CONFIGS,
        "modes": MODES,
        "kinds": KINDS,
        "seeds": "base 0, x 1, masks 3, states 7 and 9",
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **out)


if __name__ == "__main__":
    main(sys.argv[1])
