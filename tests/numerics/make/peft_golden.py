"""Golden vectors of PEFT 0.21.2's merges of task vectors, on CPU.

Run in an environment of its own (torch 2.13.0 first, then peft 0.21.2; numpy):
  python tests/numerics/make/peft_golden.py tests/numerics/peft.npz

Masks are drawn by `torch.bernoulli`, replaced here by (u < p) with stored uniforms u.
Contents of the file: in/<i>, weights, out/<name>, u/<name>/<j>, about (json).
"""

from importlib.metadata import version
import json
import sys

import numpy as np
from peft.utils import merge_utils
import torch

SEED, SHAPE, DENSITY = 11, (12, 10), 0.4
WEIGHTS = torch.tensor([0.5, 0.3, 0.4])
CALLS = {
    "task_arithmetic": ("task_arithmetic", ()),
    "magnitude_prune": ("magnitude_prune", (DENSITY,)),
    "ties": ("ties", (DENSITY,)),
    "ties/frequency": ("ties", (DENSITY, "frequency")),
    "dare_linear": ("dare_linear", (DENSITY,)),
    "dare_ties": ("dare_ties", (DENSITY,)),
    "dare_ties/frequency": ("dare_ties", (DENSITY, "frequency")),
}


def main(path):
    generator, drawn = torch.Generator().manual_seed(SEED), []

    def bernoulli(p, *args, **kwargs):
        drawn.append(torch.rand(p.shape, generator=generator).numpy())
        return (torch.from_numpy(drawn[-1]) < p).to(p.dtype)

    torch.bernoulli = bernoulli
    deltas = [torch.randn(SHAPE, generator=generator) for _ in WEIGHTS]
    out = {f"in/{i}": x.numpy() for i, x in enumerate(deltas)}
    for name, (function, options) in CALLS.items():
        drawn.clear()
        copies = [x.clone() for x in deltas]
        result = getattr(merge_utils, function)(copies, WEIGHTS, *options)
        out[f"out/{name}"] = result.numpy()
        out.update({f"u/{name}/{j}": u for j, u in enumerate(drawn)})
    about = {
        "generator": "tests/numerics/make/peft_golden.py",
        "peft": version("peft"),
        "torch": version("torch"),
        "seed": SEED,
        "density": DENSITY,
        "names": list(CALLS),
    }
    out |= {"weights": WEIGHTS.numpy(), "about": np.array(json.dumps(about))}
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])
