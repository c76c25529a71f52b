"""One training step of an adapted transformer block, against what else one could do.

Claim:    the substituted step costs 57.0 GFLOP or less and 0.80 of the time of the one
          that forms W + AB, and keeps 42 times less optimiser state than training all.
Cite:     Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
Command:  python experiments/bench/lowrank.py [--peer PYTHON, with torch and peft]
Device:   one CPU core, or an accelerator. Minutes: 2; --smoke: under one.
Expected: substituted/gflop 56.8, of_merged 0.65 (0.61 is the frozen step, which no
          adapter can beat), substituted/state_mb 3.54.

d = 1024, 16 heads, an MLP of 4096, 4 x 256 tokens, rank 16 on all six matrices, AdamW,
float32; the slope of the input counts, as it does in a block with others below it. Time
is CPU seconds of the process on one core, the least over rounds that run every
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
import optax
from rich.console import Console
from rich.progress import track
import tyro

from jaxlab import lowrank

RESULTS = Path(__file__).parents[1] / "results" / "lowrank.jsonl"
PEER = Path(__file__).parent / "peers" / "peft_block.py"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    width: int = 1024
    heads: int = 16
    inner: int = 4096
    batch: int = 4
    length: int = 256
    rank: int = 16
    rounds: int = 9
    seed: int = 0
    peer: str = ""
    """a Python with torch and peft"""
    smoke: bool = False
    """tiny; nothing is recorded"""


def init(config: Config) -> dict[str, Any]:
    d, f = config.width, config.inner
    shapes = dict.fromkeys("qkvo", (d, d)) | {"up": (d, f), "down": (f, d)}
    keys = iter(jax.random.split(jax.random.key(config.seed), 6))
    out = {
        n: jax.random.normal(next(keys), s) * s[0] ** -0.5 for n, s in shapes.items()
    }
    return out | {n: jnp.ones(d) for n in ("norm_1", "norm_2")}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def block(config: Config, p: dict[str, Any], x: jax.Array) -> jax.Array:
    """A pre-norm block: causal attention and an MLP."""
    h = norm(x, p["norm_1"])
    q, k, v = ((h @ p[n]).reshape(*x.shape[:2], config.heads, -1) for n in "qkv")
    a = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + a @ p["o"]
    return x + jax.nn.gelu(norm(x, p["norm_2"]) @ p["up"]) @ p["down"]


def contenders(config: Config, params: Any, x: jax.Array) -> dict[str, tuple]:
    """Name -> (loss of (trained, frozen, x), trained, frozen)."""
    apply = ft.partial(block, config)
    mean = lambda y: jnp.square(y).mean()
    out: dict[str, tuple] = {"full": (lambda t, _, x: mean(apply(t, x)), params, {})}
    out["frozen"] = lambda _, p, x: mean(apply(p, x)), {}, params
    start = ft.partial(lowrank.attach, apply, params, lowrank.lora(rank=config.rank))
    for form in ("merged", "substituted"):
        adapted, state = start(
            x,
            where=lambda path, _: "norm" not in path,
            key=jax.random.key(1),
            form=form,
        )
        off = lambda v: v + 0.01 * jax.random.normal(jax.random.key(3), v.shape)
        state = jax.tree.map(off, state)
        out[form] = lambda s, p, x, f=adapted: mean(f(p, s, x)), state, params
    return out


def compiled(case: tuple, x: jax.Array) -> tuple[Callable[[], Any], dict[str, float]]:
    """A step of one contender to call again and again, and what XLA says of it."""
    loss, trained, frozen = case
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    moments = optimizer.init(trained)

    def step(trained: Any, moments: Any, frozen: Any, x: jax.Array) -> tuple:
        value, (slopes, dx) = jax.value_and_grad(loss, (0, 2))(trained, frozen, x)
        updates, moments = optimizer.update(slopes, moments, trained)
        return optax.apply_updates(trained, updates), moments, value, dx

    program = jax.jit(step, donate_argnums=(0, 1)).lower(trained, moments, frozen, x)
    program = program.compile()
    cost: Any = program.cost_analysis()
    temp = program.memory_analysis().temp_size_in_bytes
    size = lambda t: sum(v.nbytes for v in jax.tree.leaves(t) if v.ndim)
    row = {"gflop": cost["flops"] / 1e9, "temp_mb": temp / 2**20}
    row["state_mb"] = (size(trained) + size(moments)) / 1e6  # of slopes and moments
    held = [jax.tree.map(jnp.copy, trained), moments]

    def call() -> jax.Array:
        *held[:], _, dx = jax.block_until_ready(program(*held, frozen, x))
        return dx

    return call, row


def run(config: Config) -> dict[str, float]:
    """Times every contender; metrics by `contender/metric`."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    params, metrics = init(config), {}
    shape = (config.batch, config.length, config.width)
    x = jax.random.normal(jax.random.key(2), shape)
    calls, slopes = {}, {}
    for name, case in contenders(config, params, x).items():
        calls[name], row = compiled(case, x)
        metrics |= {f"{name}/{m}": v for m, v in row.items()}
        slopes[name] = [calls[name]() for _ in range(3)][-1]  # after two updates
    gap = jnp.abs(slopes["merged"] - slopes["substituted"]).max()
    gap /= jnp.abs(slopes["merged"] - slopes["frozen"]).max()
    metrics["substituted/difference"] = float(gap)  # of what the adapters change
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in track(range(config.rounds)):
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    metrics |= {f"{name}/s": min(t) for name, t in taken.items()}
    if config.peer:
        sizes = (config.width, config.heads, config.inner, *shape[:2], config.rank)
        command = [config.peer, str(PEER), "step", *map(str, (*sizes, config.rounds))]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        metrics |= json.loads(said.stdout.splitlines()[-1])
    for name in [n for n in metrics if n.endswith("/s")]:
        metrics[f"{name[:-2]}/of_merged"] = metrics[name] / metrics["merged/s"]
    return metrics


def main(config: Config) -> None:
    console = Console()
    if config.smoke:
        config = Config(32, 2, 64, 2, 8, 2, rounds=2, smoke=True)
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
    if metrics["substituted/difference"] > 1e-3:
        sys.exit("the substituted and the merged step differ")
    if not config.smoke and metrics["substituted/gflop"] > 57.0:
        sys.exit("the substituted step costs more than 57.0 GFLOP")


if __name__ == "__main__":
    main(tyro.cli(Config))
