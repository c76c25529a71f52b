"""Real folders of PEFT 0.21.2, as `save_pretrained` writes them, and their outputs.

Run in an environment of its own (torch 2.13.0 first, then peft 0.21.2; numpy):
  python tests/numerics/make/peft_folders.py tests/numerics/peft_folders.npz

Every adapter type on the MLP of `peft_adapters.py`, and LoRA with its options on a tiny
transformer and a tiny convolutional net; all trained entries are moved off their start.
PSOFT's file has its buffers too: the basis, which PEFT makes anew wherever it loads.
Contents of the file: base/<model>/<leaf>, x/<model>; <case>/config and <case>/file, the
bytes of the two files; <case>/y; about (json: each <case>'s model and the versions).
"""

from importlib.metadata import version
import json
from pathlib import Path
import sys
import tempfile
import warnings

import numpy as np
import peft
from peft_adapters import CONFIGS, MLP, config, moved
import torch
from torch import nn

R = {"r": 2, "lora_alpha": 3}
ATTENTION = {
    "list": {"target_modules": ["q", "v"]},
    "regex": {"target_modules": r"layers\.\d+\.(q|mlp\.up)"},
    "exclude": {"target_modules": ["q", "k", "v"], "exclude_modules": r".*0\.k"},
    "layers": {
        "target_modules": ["q", "up"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["q", "v", "up"],
        "rank_pattern": {"layers.1.q": 3, "up": 1},
        "alpha_pattern": {r"layers\.0\..*": 5},
        "use_rslora": True,
    },
    "dora_patterns": {
        "target_modules": ["q", "down"],
        "rank_pattern": {"down": 1},
        "use_dora": True,
    },
    "embedding": {"target_modules": ["embed", "q"]},
    "to_save": {"target_modules": ["v"], "modules_to_save": ["head", "norm"]},
    "bias_all": {"target_modules": ["q", "up"], "bias": "all"},
    "bias_own": {"target_modules": ["q", "up"], "bias": "lora_only"},
    "bias_added": {"target_modules": ["q", "up"], "lora_bias": True},
    "dropout": {"target_modules": ["k"], "lora_dropout": 0.25},
}
CONVOLUTION = {
    "conv": {"target_modules": ["conv", "out"]},
    "conv_dora": {"target_modules": ["conv", "out"], "use_dora": True},
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=i == 0) for i in range(3))
        self.mlp = nn.Module()
        self.mlp.up, self.mlp.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(-1, -2) / 8**0.5
        x = x + scores.softmax(-1) @ self.v(x)
        return x + self.mlp.down(torch.tanh(self.mlp.up(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 4, (3, 2)), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.conv(x)).mean((2, 3)))


def numbers(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "mlp": (MLP, numbers((5, 16))),
    "transformer": (Transformer, torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])),
    "convolutional": (Convolutional, numbers((2, 2, 5, 6))),
}


def cases():
    out = {name: ("mlp", *made) for name, made in CONFIGS.items()}
    more = {"transformer": ATTENTION, "convolutional": CONVOLUTION}
    for model, options in more.items():
        out |= {name: (model, "Lora", R | given) for name, given in options.items()}
    return out


def base(model):
    torch.manual_seed(0)
    return MODELS[model][0]()


@torch.no_grad()
def folder(model, kind, options):
    adapted = moved(peft.get_peft_model(base(model), config(kind, options)), 7)
    with tempfile.TemporaryDirectory() as made:
        whole = adapted.state_dict() | dict(adapted.named_buffers())
        adapted.save_pretrained(made, state_dict=whole if kind == "Psoft" else None)
        text = (Path(made) / "adapter_config.json").read_bytes()
        weights = (Path(made) / "adapter_model.safetensors").read_bytes()
    y = adapted(MODELS[model][1]).numpy()
    raw = lambda data: np.frombuffer(data, np.uint8)
    return {"config": raw(text), "file": raw(weights), "y": y}


def main(path):
    warnings.simplefilter("ignore")
    out = {}
    for model, (_, x) in MODELS.items():
        out[f"x/{model}"] = x.numpy()
        for name, leaf in base(model).state_dict().items():
            out[f"base/{model}/{name}"] = leaf.numpy()
    for name, made in cases().items():
        out |= {f"{name}/{part}": x for part, x in folder(*made).items()}
    about = {
        "generator": "tests/numerics/make/peft_folders.py",
        "peft": version("peft"),
        "torch": version("torch"),
        "models": {name: made[0] for name, made in cases().items()},
        "seeds": "base 0, x 1, states 7",
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **out)


if __name__ == "__main__":
    main(sys.argv[1])
