"""The Pallas kernels against XLA's own fusion of their references, and torch.

Claim:    on one GPU or TPU both kernels beat the jitted reference by 1.15 or more, and
          `trim_elect_merge` reads and writes at 80 % of a measured copy or better.
Cite:     Yadav et al., 2023, "TIES-Merging"; Alabi et al., 2012, radix selection.
Command:  python experiments/bench/kernels.py
Device:   one GPU or TPU with 8 GB free. Minutes: 2; --smoke, on any device: under one.
Expected: vs_xla >= 1.15 in every row, of_copy >= 0.8 for trim_elect_merge. Unmeasured:
          by count of operations kth_magnitude is bound by arithmetic (of_copy 0.7 on an
          H200) and reads a quarter of what bisection does. A kernel below 1.15 is to be
          dropped, and its number kept.

Each time is the median over rounds; a round times every contender, a burst of calls
each. Bytes are those the algorithm must move: 8 or 4 reads of the row for
kth_magnitude, k + 1 rows for trim_elect_merge. A copy moves 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
import functools as ft
import json
from pathlib import Path
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
import tyro

from jaxlab import kernels
from jaxlab.kernels import _kth_magnitude

RESULTS = Path(__file__).parents[1] / "results" / "kernels.jsonl"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    entries: int = 2**27
    """of one row or model"""
    models: tuple[int, ...] = (2, 4, 8)
    rounds: int = 10
    burst: int = 5
    smoke: bool = False
    """tiny; nothing is recorded; on CPU, only XLA's programs"""


def kth_by_xla(x: jax.Array, k: int) -> jax.Array:
    """The kernel's descent by 16 bins, counted by XLA: its best case of few passes."""

    def histogram(x: jax.Array, base: jax.Array, shift: jax.Array) -> jax.Array:
        digit = (_kth_magnitude._key(x) >> shift) - base[:, None]
        return jnp.stack([jnp.sum(digit == j, 1) for j in range(16)], 1)[:, None]

    with jax.enable_x64(True):
        rank = jnp.full(x.shape[:1], k, jnp.int64)
    key = _kth_magnitude._select(x, rank, histogram).astype(_kth_magnitude._word(x))
    return jax.lax.bitcast_convert_type(key, x.dtype).astype(jnp.float32)


def torch_kth(x: Any, k: int) -> Any:
    """The same by torch's radix selection."""
    return x.abs().kthvalue(x.shape[1] - k + 1, dim=1).values.float()


def torch_merge(x: Any) -> Any:
    """The same by torch, eagerly."""
    d = x.float()
    d = d * (d.abs() >= 0.5)
    sign = (d.sum(0) >= 0) * 2 - 1
    agree = d.sign() == sign
    return ((d * agree).sum(0) / agree.sum(0).clamp(min=1)).to(x.dtype)


def normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def seconds(call: Callable[[], Any], burst: int, wait: Callable[[Any], Any]) -> float:
    """The time of one of a burst of calls."""
    start = time.perf_counter()
    wait([call() for _ in range(burst)])
    return (time.perf_counter() - start) / burst


def contenders(
    x: jax.Array, fns: dict[str, Callable], by_torch: Callable
) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Name -> (call, wait): the programs of JAX, a copy, torch if it has the GPU."""
    jitted = {name: jax.jit(f) for name, f in {**fns, "copy": jnp.negative}.items()}
    calls = {n: (ft.partial(f, x), jax.block_until_ready) for n, f in jitted.items()}
    try:
        import torch
    except ImportError:
        return calls
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        return calls
    wait = lambda _: torch.cuda.synchronize()
    return calls | {"torch": (ft.partial(by_torch, torch.from_dlpack(x)), wait)}


def cases(config: Config) -> dict[str, tuple]:
    """Name -> (input, the op by `use`, other programs of XLA, torch's, bytes moved)."""
    n, out = config.entries, {}
    for dtype, passes in ((jnp.float32, 8), (jnp.bfloat16, 4)):
        x = ft.partial(normal, 0, (1, n), dtype)
        op = ft.partial(kernels.kth_magnitude, k=n // 5)
        other = {"xla_radix": ft.partial(kth_by_xla, k=n // 5)}
        size = passes * n * jnp.dtype(dtype).itemsize
        name = f"kth_magnitude {jnp.dtype(dtype).name}"
        out[name] = x, op, other, ft.partial(torch_kth, k=n // 5), size
    for k in config.models:
        rows = n // 8 // 1024
        x = ft.partial(normal, k, (k, rows, 1024), jnp.bfloat16)
        op = ft.partial(kernels.trim_elect_merge, cutoffs=0.5, weights=1.0)
        size = (k + 1) * rows * 1024 * 2
        out[f"trim_elect_merge bfloat16 k={k}"] = x, op, {}, torch_merge, size
    return out


def measure(config: Config, case: tuple, cpu: bool) -> dict[str, float]:
    """One row: seconds of each contender, and what they say of the kernel."""
    make, op, other, by_torch, size = case
    x = make()
    fns = {"xla": ft.partial(op, use="reference"), **other}
    if not cpu:
        fns["kernel"] = ft.partial(op, use="pallas")
    calls = contenders(x, fns, by_torch)
    # Compiles, warms up, and checks that the contenders agree.
    results = {name: call() for name, (call, _) in calls.items()}
    want = results["xla"].astype(jnp.float32)
    gap = [jnp.abs(results[n].astype(jnp.float32) - want).max() for n in fns]
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(config.rounds):
        for name, (call, wait) in calls.items():
            taken[name].append(seconds(call, config.burst, wait))
    time_of = {name: statistics.median(t) for name, t in taken.items()}
    row = {f"{name}_s": t for name, t in time_of.items()}
    row["difference"] = float(max(gap))
    if not cpu:
        ours = time_of["kernel"]
        best = min(t for name, t in time_of.items() if name.startswith("xla"))
        row |= {"vs_xla": best / ours, "keep": float(best / ours >= 1.15)}
        row |= {"bytes": size, "gb_per_s": size / ours / 1e9}
        row["of_copy"] = size / ours / (2 * x.nbytes / time_of["copy"])
        if "torch" in time_of:
            row["vs_torch"] = time_of["torch"] / ours
    return row


def run(config: Config) -> dict[str, float]:
    """Measures every case on the device at hand; metrics by `case/metric`."""
    cpu = jax.default_backend() == "cpu"
    table = cases(config)
    rows = {name: measure(config, table[name], cpu) for name in track(table)}
    return {f"{name}/{m}": v for name, row in rows.items() for m, v in row.items()}


def main(config: Config) -> None:
    console = Console()
    if config.smoke:
        config = Config(2**17, (2,), rounds=2, burst=1, smoke=True)
    elif jax.default_backend() == "cpu":
        console.print("No GPU or TPU here: the kernels stay unmeasured.")
        return
    start, metrics = time.perf_counter(), run(config)
    for name, value in metrics.items():
        console.print(f"{name:45} {value:.4g}")
    wrong = [n for n, v in metrics.items() if n.endswith("/difference") and v > 1e-6]
    if not config.smoke:
        head = ["git", "rev-parse", "--short", "HEAD"]
        here = Path(__file__).parent
        git = subprocess.run(
            head, capture_output=True, text=True, cwd=here, check=False
        )
        line = metrics | {"git": git.stdout.strip(), "jax": jax.__version__, "seed": 0}
        line |= {"device": jax.devices()[0].device_kind, "wrong": wrong}
        line |= {"seconds": time.perf_counter() - start}
        line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if wrong:
        sys.exit(f"kernel and reference differ: {wrong}")


if __name__ == "__main__":
    main(tyro.cli(Config))
