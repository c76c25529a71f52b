"""The permutation symmetries of a 24-layer decoder, read from its program.

Claim:    `rewrite.symmetries` reads 24 unrolled layers in < 0.3 s warm and < 1.2 s
          cold, tracing included; scanned layers cost the same for any number of them.
Cite:     Ainsworth et al., 2023, "Git Re-Basin", whose groups are written by hand.
Command:  python experiments/bench/symmetries.py
Device:   any; shapes only, nothing is computed. Minutes: 1; --smoke: under one.
Expected: unrolled/warm_s < 0.3, unrolled/cold_s < 1.2, scanned/warm_s < 0.05 and within
          2 x of 48 scanned layers; 97 and 5 groups, none refused. A shared machine
          makes wall times several times longer: cpu_s is that of the process.

Grouped-query attention with rotary embeddings, SwiGLU and RMSNorm: 2048 wide, 32 query
and 8 key-value heads of 64, 5632 hidden, 512 tokens. Cold is the first call of a new
process, after imports; warm is the median of the others. The clock of the claim is the
wall's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
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
import tyro

from jaxlab import rewrite

RESULTS = Path(__file__).parents[1] / "results" / "symmetries.jsonl"
HEADS, GROUPS, DIM = 32, 8, 64


@dataclass(frozen=True)
class Config:
    """What to measure."""

    layers: int = 24
    width: int = 2048
    hidden: int = 5632
    tokens: int = 512
    calls: int = 7
    """of which the first is cold"""
    smoke: bool = False
    """two layers, three calls; nothing is recorded"""
    only: str = ""
    """measures one case in this process and prints it as JSON"""


def normed(x: jax.Array, gain: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def rotated(x: jax.Array) -> jax.Array:
    """Rotary position embedding of `[batch, tokens, heads, dim]`."""
    half = x.shape[-1] // 2
    step = 1e-4 ** (jnp.arange(half, dtype=x.dtype) / half)
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * step
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def layer(x: jax.Array, w: dict[str, jax.Array]) -> jax.Array:
    """One block of the decoder."""
    batch, tokens, _ = x.shape
    y = normed(x, w["n1"])
    q, k, v = ((y @ w[n]).reshape(batch, tokens, -1, DIM) for n in "qkv")
    q, k = rotated(q), jnp.repeat(rotated(k), HEADS // GROUPS, 2)
    v = jnp.repeat(v, HEADS // GROUPS, 2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / DIM**0.5
    past = jnp.tril(jnp.ones((tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(past, scores, -1e30), -1)
    y = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, tokens, -1)
    x = x + y @ w["o"]
    y = normed(x, w["n2"])
    return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"]


def unrolled(p: Any, t: jax.Array) -> jax.Array:
    x = p["embed"][t]
    for w in p["layers"]:
        x = layer(x, w)
    return normed(x, p["last"]) @ p["head"]


def scanned(p: Any, t: jax.Array) -> jax.Array:
    body = lambda x, w: (layer(x, w), None)
    x, _ = jax.lax.scan(body, p["embed"][t], p["layers"])
    return normed(x, p["last"]) @ p["head"]


def shapes(config: Config, *stack: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights of one layer, or of a stack of them."""
    n, m, small = config.width, config.hidden, GROUPS * DIM
    sizes = {
        "n1": (n,), "q": (n, HEADS * DIM), "k": (n, small), "v": (n, small),
        "o": (HEADS * DIM, n), "n2": (n,), "gate": (n, m), "up": (n, m), "down": (m, n),
    }  # fmt: skip
    return {k: jax.ShapeDtypeStruct((*stack, *s), "float32") for k, s in sizes.items()}


def cases(config: Config) -> dict[str, tuple[Callable, Any]]:
    """Name -> (apply, the shapes of its params)."""
    n, many = config.width, config.layers
    top = {"embed": (32000, n), "last": (n,), "head": (n, 32000)}
    rest = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in top.items()}
    each = [shapes(config) for _ in range(many)]
    return {
        "unrolled": (unrolled, rest | {"layers": each}),
        "scanned": (scanned, rest | {"layers": shapes(config, many)}),
        "scanned_twice": (scanned, rest | {"layers": shapes(config, 2 * many)}),
    }


def measure(config: Config, name: str) -> dict[str, float]:
    """One case, in this process: times of its calls, and what they found."""
    apply, params = cases(config)[name]
    tokens = jax.ShapeDtypeStruct((1, config.tokens), "int32")
    wall, cpu = [], []
    for _ in range(config.calls):
        start, used = time.perf_counter(), time.process_time()
        found = rewrite.symmetries(apply, params, tokens)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {
        "cold_s": wall[0], "cold_cpu_s": cpu[0],
        "warm_s": statistics.median(wall[1:]), "warm_cpu_s": statistics.median(cpu[1:]),
        "groups": len(found.groups), "refused": len(found.refused),
        "members": sum(len(g.members) for g in found.groups),
    }  # fmt: skip


def run(config: Config) -> dict[str, float]:
    """Measures every case, each in a process of its own; metrics by `case/metric`."""
    out: dict[str, float] = {}
    for name in cases(config):
        settings = ("layers", "width", "hidden", "tokens", "calls")
        args = [f"--{k}={getattr(config, k)}" for k in settings]
        command = [sys.executable, __file__, *args, f"--only={name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        out |= {f"{name}/{k}": v for k, v in row.items()}
    return out


def main(config: Config) -> None:
    if config.only:
        print(json.dumps(measure(config, config.only)))
        return
    console = Console()
    if config.smoke:
        config = Config(layers=2, calls=3, smoke=True)
    start, metrics = time.perf_counter(), run(config)
    for name, value in metrics.items():
        console.print(f"{name:30} {value:.4g}")
    if not config.smoke:
        here = Path(__file__).parent
        head = ["git", "rev-parse", "--short", "HEAD"]
        git = subprocess.run(
            head, capture_output=True, text=True, cwd=here, check=False
        )
        line: dict[str, Any] = metrics | {"git": git.stdout.strip(), "seed": 0}
        line |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        line |= {"seconds": time.perf_counter() - start}
        line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    groups = [metrics[f"{n}/groups"] for n in cases(config)]
    if groups != [4 * config.layers + 1, 5, 5]:
        sys.exit(f"the groups found are {groups}")


if __name__ == "__main__":
    main(tyro.cli(Config))
