"""Extracting a LoRA from two 245M-parameter bf16 checkpoints: ours against mergekit's.

Claim:    `io.extract` at rank 16 takes at most 1/7 of the CPU time of mergekit's full
          decompositions, start-up included, and its error is at most 0.1 % above the
          optimum, where the spectrum of the change falls. Where it is flat, a low rank
          is no adapter for either: the energy that is reported says so.
Cite:     Halko, Martinsson & Tropp, 2011, https://arxiv.org/abs/0909.4061; mergekit
          0.1.5 (Goddard et al., 2024, https://arxiv.org/abs/2403.13257).
Command:  python experiments/bench/extract.py --mergekit PATH/TO/mergekit-extract-lora
          (mergekit in an environment of its own; without it, only ours is measured)
Device:   CPU. Minutes: 5, and 2 GB of disk; --smoke: a quarter.
Expected: CPU ratio of 7 or more; excess error of at most 0.1 % (falls); captured energy
          85 % (falls) and 3 to 6 % (flat).

The change falls as k^-0.75 over 256 singular values with 5 % of white noise, or is
white noise alone, in all 98 matrices of the layers. Each program is a process on one
core: with more, threads of LAPACK wait busily where anything else runs.
"""

from dataclasses import dataclass
import functools as ft
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
from rich.progress import track

from jaxlab import experiment, io

NAME = Path(__file__).parents[1] / "extract.py"  # results are one folder up
DTYPE = np.dtype(ml_dtypes.bfloat16)
OURS = "import sys; from jaxlab import io; io.extract(*sys.argv[1:4], rank={rank})"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    mergekit: Path | None = None
    """the peer's"""
    folder: Path = Path(tempfile.gettempdir()) / "jaxlab_bench" / "extract"
    """of the checkpoints, which stay for the next time"""
    layers: int = 14
    wide: int = 1024
    rank: int = 16
    spectra: tuple[str, ...] = ("falls", "flat")
    smoke: bool = False


SMOKE = {"layers": 1, "wide": 128, "rank": 4, "spectra": ("falls",)}


def run(config: Config) -> dict[str, float]:
    """CPU seconds, memory, error and energy by spectrum and program; their ratio."""
    folder = config.folder / f"{config.layers}x{config.wide}"
    for name in ("base", *config.spectra):
        make(config, folder, name)
    metrics: dict[str, float] = {}
    for spectrum in track(config.spectra, "extracting", transient=True):
        base, tuned = folder / "base", folder / spectrum
        for program, command in commands(config, base, tuned).items():
            out = folder / f"{program}_{spectrum}"
            shutil.rmtree(out, ignore_errors=True)
            told = measured([*command, str(out)], out)
            told |= errors(config, base, tuned, out)
            metrics |= {f"{spectrum}, {program}: {k}": v for k, v in told.items()}
        if config.mergekit is not None:
            theirs = metrics[f"{spectrum}, mergekit: CPU s"]
            ratio = theirs / metrics[f"{spectrum}, jaxlab: CPU s"]
            metrics[f"{spectrum}: CPU ratio"] = ratio
    return metrics


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    wide, inner = config.wide, config.wide * 11 // 4
    rows = 32000 * wide // 1024
    out = {"model.embed_tokens.weight": (rows, wide), "lm_head.weight": (rows, wide)}
    for i in range(config.layers):
        prefix = f"model.layers.{i}"
        out |= {f"{prefix}.self_attn.{n}_proj.weight": (wide, wide) for n in "qkvo"}
        out |= {f"{prefix}.mlp.{n}_proj.weight": (inner, wide) for n in ("gate", "up")}
        out[f"{prefix}.mlp.down_proj.weight"] = (wide, inner)
    return out


def make(config: Config, folder: Path, name: str) -> None:
    """Writes the base, or the base with every matrix of its layers changed."""
    target = folder / name
    if (target / "config.json").exists():
        return  # from the last time
    rng, tensors = np.random.default_rng([ord(c) for c in name]), {}
    base = None if name == "base" else io.open(folder / "base").tensors
    for key, shape in shapes(config).items():
        if base is None:
            x = 0.02 * rng.standard_normal(shape, np.float32)
        else:
            x = base[key].read().astype(np.float32)
            if ".layers." in key:
                x += 0.002 * change(rng, shape, name)
        tensors[key] = np.asarray(x, DTYPE)
    target.mkdir(parents=True, exist_ok=True)
    io.save(target / "model.safetensors", tensors, metadata={"format": "pt"})
    said = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    said |= {"hidden_size": config.wide, "num_hidden_layers": config.layers}
    said |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    said |= {"intermediate_size": config.wide * 11 // 4, "torch_dtype": "bfloat16"}
    said |= {"vocab_size": 32000 * config.wide // 1024, "tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(said))


def change(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A change whose entries have the root mean square 1."""
    noise = rng.standard_normal(shape, np.float32)
    if kind == "flat":
        return noise
    count = min(256, *shape)
    u, v = (rng.permutation(orthonormal(n, count)) for n in shape)
    d = (u * np.arange(1, count + 1, dtype=np.float32) ** -0.75) @ v.T
    d += noise * (0.05 * np.linalg.norm(d) / np.linalg.norm(noise))
    return d * (d.size**0.5 / np.linalg.norm(d))


@ft.cache
def orthonormal(n: int, count: int) -> np.ndarray:
    """Random orthonormal columns; those of each matrix are these, in another order."""
    return np.linalg.qr(np.random.default_rng(n).normal(size=(n, count)))[0].astype(
        "f4"
    )


def commands(config: Config, base: Path, tuned: Path) -> dict[str, list[str]]:
    """The programs; the output folder is the argument that is still to come."""
    code = OURS.format(rank=config.rank)
    out = {"jaxlab": [sys.executable, "-c", code, str(base), str(tuned)]}
    if config.mergekit is not None:
        given = ["--model", str(tuned), "--base-model", str(base)]
        given += ["--max-rank", str(config.rank), "-e", "embed_tokens", "-e", "lm_head"]
        given += ["--skip-undecomposable", "--quiet", "--out-path"]
        out["mergekit"] = [str(config.mergekit), *given]
    return out


def measured(command: list[str], out: Path) -> dict[str, float]:
    """CPU and wall seconds and the peak memory of a process on one core."""
    start = time.perf_counter()
    env, none, pipe = {"HF_HUB_OFFLINE": "1"}, subprocess.DEVNULL, subprocess.PIPE
    child = subprocess.Popen(command, env=os.environ | env, stdout=none, stderr=pipe)
    os.sched_setaffinity(child.pid, {min(os.sched_getaffinity(0))})
    assert child.stderr is not None
    said = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status and not (out / "adapter_config.json").exists():
        sys.exit(f"{command[0]} failed:\n{said[-2000:]}")  # a model card may fail
    told = {"CPU s": usage.ru_utime + usage.ru_stime, "MB": usage.ru_maxrss / 1e3}
    return told | {"wall s": time.perf_counter() - start}


def errors(config: Config, base: Path, tuned: Path, out: Path) -> dict[str, float]:
    """Error over that of the best adapter, and energy, of three layers' matrices."""
    chosen = {0, config.layers // 2 - 1, config.layers - 1}
    ratios, shares = [], []
    with io.open(base) as old, io.open(tuned) as new, io.open(out) as made:
        for name in old.tensors:
            if not any(f".layers.{i}." in name for i in chosen):
                continue
            wide = lambda held, name: held.tensors[name].read().astype(np.float64)
            d = wide(new, name) - wide(old, name)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = (wide(made, f"{module}.lora_{x}.weight") for x in "AB")
            gram = d @ d.T if d.shape[0] < d.shape[1] else d.T @ d
            energies = np.linalg.eigvalsh(gram)
            lost = np.sum((d - b @ a) ** 2)
            ratios.append(np.sqrt(lost / energies[: -config.rank].sum()))
            shares.append(1 - lost / energies.sum())
    excess = np.array(ratios) - 1
    told = {"excess error, %": 100 * excess.mean(), "worst, %": 100 * excess.max()}
    return told | {"energy, %": 100 * float(np.mean(shares))}


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=str(NAME))
