"""A batch in which every example has its own adapter, against a batch with one.

Claim:    64 LoRA adapters in one batch cost 1.1 of one adapter or less at 16 tokens per
          example, and 2.5 or less at one, where a gather of all factors costs 4.
Cite:     Chen et al., 2023, "Punica: Multi-Tenant LoRA Serving".
Command:  python experiments/bench/many_adapters.py [--peer PYTHON, with torch and peft]
Device:   one CPU core, or an accelerator. Minutes: 2; --smoke: under one.
Expected: 16/each/of_one 1.02, 1/each/of_one 1.3; the gather 1.14 and 3.0.

The forward of one transformer block, d = 1024, rank 16 on all six matrices, float32.
Time is CPU seconds of the process on one core, the least over rounds that run every
contender in turn; on an accelerator it is wall time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
import functools as ft
import json
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
import tyro

from jaxlab import lowrank

RESULTS = Path(__file__).parents[1] / "results" / "many_adapters.jsonl"
PEER = Path(__file__).parent / "peers" / "peft_block.py"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    width: int = 1024
    heads: int = 16
    inner: int = 4096
    rows: int = 64
    """examples, and adapters"""
    lengths: tuple[int, ...] = (1, 16)
    """tokens per example"""
    rank: int = 16
    rounds: int = 11
    seed: int = 0
    peer: str = ""
    """a Python with torch and peft"""
    smoke: bool = False
    """tiny; nothing is recorded"""


def init(config: Config) -> dict[str, Any]:
    d, f = config.width, config.inner
    shapes = dict.fromkeys("qkvo", (d, d)) | {"up": (d, f), "down": (f, d)}
    keys = iter(jax.random.split(jax.random.key(config.seed), len(shapes)))
    return {
        n: jax.random.normal(next(keys), s) * s[0] ** -0.5 for n, s in shapes.items()
    }


def norm(x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def block(heads: int, p: dict[str, Any], x: jax.Array) -> jax.Array:
    """A pre-norm block: causal attention and an MLP."""
    h = norm(x)
    q, k, v = ((h @ p[n]).reshape(*x.shape[:2], heads, -1) for n in "qkv")
    a = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + a @ p["o"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def contenders(config: Config, length: int) -> dict[str, Callable[[], Any]]:
    """Name -> a jitted forward to call."""
    apply, params = ft.partial(block, config.heads), init(config)
    x = jax.random.normal(jax.random.key(1), (config.rows, length, config.width))
    adapter = lowrank.lora(rank=config.rank, start="gaussian")
    keys = jax.random.split(jax.random.key(2), config.rows)
    start = lambda key: lowrank.attach(apply, params, adapter, x, where="*", key=key)
    adapted, states = jax.vmap(start)(keys)
    off = lambda v: v + 0.1 * jax.random.normal(jax.random.key(3), v.shape)
    states = jax.tree.map(off, states)
    index = jax.random.permutation(jax.random.key(4), config.rows)

    def gathered(params: Any, states: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        mine = jax.tree.map(lambda v: v[index], states)
        return jax.vmap(lambda s, x: adapted(params, s, x[None])[0])(mine, x)

    def one(params: Any, states: Any, index: jax.Array, x: jax.Array) -> jax.Array:
        return adapted(params, jax.tree.map(lambda v: v[index[0]], states), x)

    fns = {"one": one, "each": lowrank.choose(adapted), "gathered": gathered}
    out = {n: ft.partial(jax.jit(f), params, states, index, x) for n, f in fns.items()}
    return out | {"base": ft.partial(jax.jit(apply), params, x)}


def measure(config: Config, length: int) -> dict[str, float]:
    """Seconds of every contender, and their ratios to one adapter."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    calls = contenders(config, length)
    outputs = {name: call() for name, call in calls.items()}
    gap = jnp.abs(outputs["each"] - outputs["gathered"]).max()
    gap = jnp.maximum(gap, jnp.abs(outputs["each"][0] - outputs["one"][0]).max())
    row = {"difference": float(gap / jnp.abs(outputs["one"]).max())}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(config.rounds), f"{length} tokens"):
        for name, call in calls.items():
            start = clock()
            jax.block_until_ready(call())
            taken[name].append(clock() - start)
    row |= {f"{name}/s": min(t) for name, t in taken.items()}
    row |= {f"{n}/of_one": row[f"{n}/s"] / row["one/s"] for n in ("each", "gathered")}
    if config.peer:
        sizes = (config.width, config.heads, config.inner, config.rows, length)
        sizes = (*sizes, config.rank, config.rounds)
        command = [config.peer, str(PEER), "many", *map(str, sizes)]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        row |= json.loads(said.stdout.splitlines()[-1])
        row["peft_each/of_one"] = row["peft_each/s"] / row["peft_one/s"]
    return row


def run(config: Config) -> dict[str, float]:
    """Every length; metrics by `length/contender/metric`."""
    rows = {length: measure(config, length) for length in config.lengths}
    return {f"{length}/{m}": v for length, row in rows.items() for m, v in row.items()}


def main(config: Config) -> None:
    console = Console()
    if config.smoke:
        config = Config(16, 2, 32, 3, (2,), 2, rounds=2, smoke=True)
    if hasattr(os, "sched_setaffinity"):  # one core: threads that wait would count
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    start, metrics = time.perf_counter(), run(config)
    for name, value in metrics.items():
        console.print(f"{name:28} {value:.4g}")
    if not config.smoke:
        head = ["git", "rev-parse", "--short", "HEAD"]
        here = Path(__file__).parent
        git = subprocess.run(
            head, capture_output=True, text=True, cwd=here, check=False
        )
        line = metrics | {"git": git.stdout.strip(), "jax": jax.__version__}
        line |= {"seed": config.seed, "device": jax.devices()[0].device_kind}
        line |= {"seconds": time.perf_counter() - start}
        line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    wrong = [n for n, v in metrics.items() if n.endswith("/difference") and v > 1e-4]
    if wrong:
        sys.exit(f"an example is not as its own adapter has it: {wrong}")


if __name__ == "__main__":
    main(tyro.cli(Config))
