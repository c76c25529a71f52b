"""Weight matching of two models of the size of ResNet-50.

Claim:    it takes under 60 seconds on two CPU cores, and recovers the planted
          permutation of every group.
Cite:     Ainsworth et al., 2022, "Git Re-Basin", https://arxiv.org/abs/2209.04836.
Command:  python experiments/bench/matching.py
Device:   CPU, 2 cores, 2 GB. Minutes: 3; --smoke: under one.
Expected: seconds < 60, recovered = 1.

One model is random; the other is that one, with all hidden channels permuted, plus
noise as large as the weights. The peer is the algorithm as published, on numpy: for
each group one product per leaf, and one assignment, until nothing changes.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.optimize import linear_sum_assignment
import tyro

from jaxlab import align, rewrite, tree

RESULTS = Path(__file__).parents[1] / "results" / "matching.jsonl"


@dataclass(frozen=True)
class Config:
    """What to measure."""

    width: int = 64
    """of the stem; the last stage has 32 times as many channels"""
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000
    noise: float = 1.0
    """relative to the weights"""
    rounds: int = 3
    seed: int = 0
    smoke: bool = False
    """tiny; nothing is recorded"""


def shapes(config: Config) -> dict[str, Any]:
    """The parameters of a ResNet with bottlenecks, NHWC, batch norms frozen."""
    out: dict[str, Any] = {}

    def conv(name: str, size: int, n: int, m: int) -> None:
        norm = {k: (m,) for k in ("scale", "bias", "mean", "var")}
        out[name] = {"kernel": (size, size, n, m), **norm}

    conv("stem", 7, 3, config.width)
    n = config.width
    for stage, blocks in enumerate(config.blocks):
        inner = config.width * 2**stage
        for i in range(blocks):
            at = f"{stage}_{i}"
            conv(f"{at}_in", 1, n, inner)
            conv(f"{at}_mid", 3, inner, inner)
            conv(f"{at}_out", 1, inner, 4 * inner)
            if i == 0:
                conv(f"{at}_short", 1, n, 4 * inner)
            n = 4 * inner
    out["head"] = {"kernel": (n, config.classes), "bias": (config.classes,)}
    return out


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Logits of images; only traced here."""

    def conv(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        p = params[name]
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (stride, stride), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        row = lambda v: v[None, None, None]
        y = (y - row(p["mean"])) * jax.lax.rsqrt(row(p["var"]) + 1e-5)
        return y * row(p["scale"]) + row(p["bias"])

    x = jax.nn.relu(conv("stem", x, 2))
    for name in [n.removesuffix("_in") for n in params if n.endswith("_in")]:
        stride = 2 if name.endswith("_0") and not name.startswith("0") else 1
        y = jax.nn.relu(conv(f"{name}_in", x))
        y = jax.nn.relu(conv(f"{name}_mid", y, stride))
        short = f"{name}_short"
        x = conv(short, x, stride) if short in params else x
        x = jax.nn.relu(x + conv(f"{name}_out", y))
    head = params["head"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"][None]


def drawn(config: Config) -> Any:
    """Random parameters: kernels of variance 2 / fan-in, the rest near one."""
    named = shapes(config)
    keys = tree.keys_like(
        jax.random.key(config.seed),
        jax.tree.map(lambda _: 0, named, is_leaf=lambda s: isinstance(s, tuple)),
    )

    def leaf(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        scale = (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) > 1 else 0.1
        return scale * jax.random.normal(key, shape) + float(len(shape) == 1)

    return jax.tree.map(leaf, keys, named)


def by_numpy(a: Any, b: Any, groups: rewrite.Symmetries, seed: int) -> Any:
    """The published algorithm on the host, for groups of whole axes."""
    ours, theirs = (
        {
            p: np.asarray(x)
            for p, x in zip(tree.paths(t), jax.tree.leaves(t), strict=True)
        }
        for t in (a, b)
    )
    found = {g.name: np.arange(g.size) for g in groups.groups}
    rows = lambda x, axis: np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    for sweep in range(100):
        before = dict(found)
        order = np.random.default_rng((seed, sweep)).permutation(len(groups.groups))
        for g in [groups.groups[i] for i in order]:
            axes = [(m.path, m.place.axis) for m in g.members]
            score = sum(rows(ours[p], i) @ rows(theirs[p], i).T for p, i in axes)
            step = linear_sum_assignment(score, maximize=True)[1]
            found[g.name] = found[g.name][step]
            for p, i in axes:
                theirs[p] = theirs[p].take(step, i)
        if all((found[n] == before[n]).all() for n in found):
            break
    return found


def run(config: Config) -> dict[str, float]:
    """Seconds of the analysis and the matching, and what share was recovered."""
    a = drawn(config)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    start = time.perf_counter()
    groups = rewrite.symmetries(forward, a, image)
    row = {"symmetries_s": time.perf_counter() - start}
    planted = rewrite.random_permutations(groups, key=jax.random.key(config.seed + 1))
    scale = lambda x: config.noise * (jnp.std(x) if x.ndim > 1 else 0.1)
    keys = tree.keys_like(jax.random.key(config.seed + 2), a)
    b = rewrite.permute(
        jax.tree.map(
            lambda x, k: x + scale(x) * jax.random.normal(k, x.shape), a, keys
        ),
        groups,
        planted,
    )
    want = align.inverse(groups, planted)
    taken, peer = [], []
    for i in track(range(config.rounds)):
        start = time.perf_counter()
        key = jax.random.key(config.seed + 3 + i)
        found = align.weight_matching(a, b, groups, key=key)
        taken.append(time.perf_counter() - start)
        start = time.perf_counter()
        other = by_numpy(a, b, groups, i)
        peer.append(time.perf_counter() - start)
    right = [(np.asarray(found[n]) == want[n]).mean() for n in want]
    row |= {"first_s": taken[0], "seconds": min(taken), "peer_s": min(peer)}
    row |= {"recovered": float(np.mean(right)), "groups": len(want)}
    row["peer_recovered"] = float(np.mean([(other[n] == want[n]).mean() for n in want]))
    row["parameters"] = sum(x.size for x in jax.tree.leaves(a))
    return row


def main(config: Config) -> None:
    console = Console()
    if config.smoke:
        config = Config(width=8, blocks=(1, 2), classes=10, rounds=1, smoke=True)
    start, metrics = time.perf_counter(), run(config)
    for name, value in metrics.items():
        console.print(f"{name:20} {value:.4g}")
    if not config.smoke:
        head, here = ["git", "rev-parse", "--short", "HEAD"], Path(__file__).parent
        git = subprocess.run(
            head, capture_output=True, text=True, cwd=here, check=False
        )
        line = metrics | {"git": git.stdout.strip(), "jax": jax.__version__}
        line |= {"device": jax.devices()[0].device_kind, "seed": config.seed}
        line |= {"seconds_total": time.perf_counter() - start}
        line["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if metrics["recovered"] < 1 or metrics["first_s"] > 60:
        sys.exit(f"not as expected: {metrics}")


if __name__ == "__main__":
    main(tyro.cli(Config))
