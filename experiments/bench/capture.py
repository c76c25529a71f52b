"""What capturing statistics adds to the forward of a decoder.

Claim:    `rewrite.capture` of the mean square of every weight's input adds less than
          15 % to a forward; a Gram matrix costs what its product does.
Cite:     Jin et al., 2023, "Dataless Knowledge Fusion by Merging Weights" (Gram); Sun
          et al., 2024, "A Simple and Effective Pruning Approach" (norms).
Command:  python experiments/bench/capture.py
Device:   any. Minutes: 3; --smoke: under one.
Expected: mean_square/overhead < 0.15, unrolled and scanned; gram/of_floor, what it adds
          over what its flops take at the rate of the forward, below 1.5.

Each time is the median over rounds; a round times every contender once, in turn. The
overhead is the median over rounds of the ratio to the plain forward of the same round,
less one. A Gram matrix of r rows and n features is 2 r n^2 flops, twice what one
triangle of it needs; the compiler shares that of q, k and v, and that of gate and up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
import json
import math
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

from jaxlab import rewrite, tree

RESULTS = Path(__file__).parents[1] / "results" / "capture.jsonl"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    vocabulary: int = 4096
    batch: int = 4
    length: int = 256
    rounds: int = 15
    seed: int = 0
    smoke: bool = False
    """tiny; nothing is recorded"""


def init(config: Config) -> dict[str, Any]:
    """Weights of a pre-norm decoder, its layers stacked."""
    d, h, n = config.width, config.heads, config.layers
    k = d // h
    shapes = {
        **{name: (n, d, h, k) for name in "qkv"},
        "o": (n, h, k, d),
        **{name: (n, d, 4 * d) for name in ("gate", "up")},
        "down": (n, 4 * d, d),
    }
    keys = iter(jax.random.split(jax.random.key(config.seed), len(shapes) + 2))
    draw = lambda s: jax.random.normal(next(keys), s) * d**-0.5
    return {
        "embed": draw((config.vocabulary, d)),
        "head": draw((d, config.vocabulary)),
        "layers": {name: draw(s) for name, s in shapes.items()},
    }


def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """Attention and a gated MLP."""
    h = norm(x)
    q, k, v = (jnp.einsum("bsd,dhk->bshk", h, p[n]) for n in "qkv")
    x = x + jnp.einsum(
        "bshk,hkd->bsd", jax.nn.dot_product_attention(q, k, v, is_causal=True), p["o"]
    )
    h = norm(x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"], None


def scanned(p: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(block, p["embed"][tokens], p["layers"])
    return norm(x) @ p["head"]


def unrolled(p: dict[str, Any], tokens: jax.Array) -> jax.Array:
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x, _ = block(x, layer)
    return norm(x) @ p["head"]


def mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean(x * x, -2)


def gram(x: jax.Array) -> jax.Array:
    return x.mT @ x


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def flops(apply: Callable[..., Any], params: Any, tokens: jax.Array) -> tuple:
    """Of the products of the forward (attention scores aside), and of their Grams."""
    rows = tokens.size
    forward = grams = 0
    for path, found in rewrite.uses(apply, params, tokens).items():
        for use in found:
            if use.primitive == "dot_general":
                size = lambda axes, use=use: math.prod(use.shape[i] for i in axes)
                layers, n = size(use.stacked), size(use.contracted)
                forward += 2 * rows * layers * n * size(use.free)
                shared = path.rsplit("/", 1)[-1] in ("k", "v", "up")
                grams += 0 if shared else 2 * rows * layers * n * n
    return forward, grams


def measure(config: Config, form: str) -> dict[str, float]:
    """Seconds and overheads of one form of the decoder."""
    params = init(config)
    if form == "unrolled":
        cut = lambda i: jax.tree.map(lambda w: w[i], params["layers"])
        params = params | {"layers": [cut(i) for i in range(config.layers)]}
    apply = scanned if form == "scanned" else unrolled
    shape = (config.batch, config.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, config.vocabulary)
    where = tree.glob("layers/**", "head")
    stats = {"mean_square": mean_square, "gram": gram}
    fns = {n: rewrite.capture(apply, where=where, reduce=f) for n, f in stats.items()}
    fns = {name: jax.jit(f) for name, f in {"plain": apply, **fns}.items()}
    want = fns["plain"](params, tokens)
    for name in stats:  # compiles, and checks that the function is the same
        got = fns[name](params, tokens)[0]
        if float(jnp.abs(got - want).max()) > 1e-3:
            sys.exit(f"{name} changed the output")
    taken: dict[str, list[float]] = {name: [] for name in fns}
    for _ in track(range(config.rounds), form):
        for name, fn in fns.items():
            taken[name].append(seconds(lambda fn=fn: fn(params, tokens)))
    row = {f"{name}/s": statistics.median(t) for name, t in taken.items()}
    for name in stats:
        pairs = zip(taken[name], taken["plain"], strict=True)
        row[f"{name}/overhead"] = statistics.median(a / b for a, b in pairs) - 1
    forward, grams = flops(apply, params, tokens)
    row["gram/floor"] = grams / forward
    row["gram/of_floor"] = row["gram/overhead"] / row["gram/floor"]
    return row


def run(config: Config) -> dict[str, float]:
    """Both forms; metrics by `form/statistic/metric`."""
    forms = {form: measure(config, form) for form in ("unrolled", "scanned")}
    return {f"{form}/{m}": v for form, row in forms.items() for m, v in row.items()}


def main(config: Config) -> None:
    console = Console()
    if config.smoke:
        config = Config(2, 32, 2, 64, 2, 16, rounds=2, smoke=True)
    start, metrics = time.perf_counter(), run(config)
    for name, value in metrics.items():
        console.print(f"{name:32} {value:.4g}")
    if config.smoke:
        return
    head = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    git = subprocess.run(head, capture_output=True, text=True, cwd=here, check=False)
    line = metrics | {"git": git.stdout.strip(), "jax": jax.__version__}
    line |= {"seed": config.seed, "device": jax.devices()[0].device_kind}
    line |= {"seconds": time.perf_counter() - start}
    line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
