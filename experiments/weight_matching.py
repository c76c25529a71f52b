"""Loss barriers between independently trained nets, before and after matching units.

Claim:    Permuting the hidden units of one net to match another's removes most of the
          loss barrier between two independently trained nets. Weight matching does so
          less by bringing them close than by turning their leading singular vectors.
Cite:     Ainsworth et al., 2022, "Git Re-Basin", https://arxiv.org/abs/2209.04836,
          Section 5; Ito et al., 2024, "Analysis of Linear Mode Connectivity via
          Permutation-Based Weight Matching", https://arxiv.org/abs/2402.04051.
Command:  python experiments/weight_matching.py
Device:   CPU, 2 cores. Minutes: 8; --smoke: a quarter.
Expected: share of the barrier removed by weights, activations and straight-through: MLP
          .71 +- .06, .93 +- .01, .79 +- .03; CNN .78, .86, .82, all +- .06. Weights
          remove .07 (MLP) and .14 (CNN) of the distance, and R above 0.3 rises from
          .00 to .11 and .18. Not reproduced: R is no larger for leading vectors (CNN),
          nor for what removes most (activations: .04, .11). ResNet-8: -.1 +- .9, .28,
          -.6 +- 1.3 removed; agreement in the middle .20, .27, .14, unmatched .20.

CNNs see every other row and column. The ResNet-8s, A and C, know CIFAR-10, but see
photos of clothes: their loss is the divergence from the mean of both probabilities,
right is what either says, and batch norms are measured at every point of the line.
"""

from dataclasses import dataclass
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from jaxlab import align, data, experiment, figures, merge, nn, rewrite, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "weight_matching.png"
SHARED = Path(__file__).parents[2] / "shared" / "data"
KINDS = ("none", "weights", "activations", "straight-through")


@dataclass(frozen=True)
class Config:
    """The nets, their data, and where the line between them is looked at."""

    task: str = "mnist"
    pairs: int = 5
    mlp: tuple[int, ...] = (784, 256, 256, 10)
    cnn: tuple[int, ...] = (24, 48)
    steps: tuple[int, int] = (600, 300)
    """of training the MLPs and the CNNs"""
    rates: tuple[float, float] = (1e-3, 3e-3)
    count: int = 1000
    """test images of the loss; as many to match on, a fifth for batch norms"""
    learn: int = 40
    """steps of straight-through matching"""
    points: int = 7
    thresholds: tuple[float, ...] = (0.0, 0.3, 0.6)
    """of the singular values, relative to the largest, whose vectors count"""
    orders: int = 3
    """in which the groups of the ResNets are visited; 0 leaves them out"""
    smoke: bool = False


SMOKE = {"task": "digits", "pairs": 1, "mlp": (64, 16, 10), "cnn": (4, 8), "learn": 3}
SMOKE |= {"steps": (60, 60), "rates": (1e-2, 1e-2), "points": 3, "orders": 0}


def run(config: Config) -> dict[str, float]:
    """Barriers by net and kind of matching, and what is left of the distance."""
    size = int(config.mlp[0] ** 0.5) // 2
    nets = {"MLP": nn.mlp(config.mlp), "CNN": nn.cnn(config.cnn, size=size)}
    found: dict[str, list[Any]] = {}
    for name, net in nets.items():
        of = lambda p, x, y, f=net.apply: experiment.cross_entropy(f(p, x), y)
        loss = jax.jit(of)
        for seed in track(range(config.pairs), name):
            found.setdefault(name, []).append(trained(config, name, net, loss, seed))
    for seed in track(range(config.orders), "ResNet-8"):
        found.setdefault("ResNet-8", []).append(released(config, jax.random.key(seed)))
    values = {n: jax.tree.map(lambda *x: np.array(x), *r) for n, r in found.items()}
    metrics: dict[str, float] = {}
    for net, kinds in values.items():
        for kind, row in kinds.items():
            for what in ("barrier", "distance") if kind != "none" else ():
                row[f"{what} removed"] = 1 - row[what] / kinds["none"][what]
            for what in sorted(row.keys() - {"loss", "distance"}):
                metrics |= experiment.measured(f"{net}, {kind}: {what}", row[what])
    if not config.smoke:
        figures.save(draw(config, values), PICTURE)
    return metrics


def trained(
    config: Config, name: str, net: nn.Network, loss: Any, seed: int
) -> dict[str, Any]:
    """Two nets from different starts, before and after matching."""
    given = data.load(config.task, seed=seed, test=config.count)
    every = 1 + (name == "CNN")
    train, test = ((s.x[:, ::every, ::every], s.y) for s in (given.train, given.test))
    options = {"steps": config.steps[every - 1], "rate": config.rates[every - 1]}
    key = jax.random.key(100 * every + seed)
    a, b = (
        experiment.fit(loss, net.init(one), train, key=one, batch=64, **options)
        for one in jax.random.split(key)
    )
    seen = tuple(jnp.asarray(v[: config.count]) for v in train)
    at = lambda p: (float(loss(p, *test)), experiment.accuracy(net.apply, p, *test))
    moved = matched(config, net.apply, loss, a, b, seen, key)
    return {k: line(config, at, a, m, config.points) for k, m in moved.items()}


def released(config: Config, key: jax.Array) -> dict[str, Any]:
    """The two ResNet-8s on photographs, before and after matching."""
    folder = Path(os.environ.get("JAXLAB_DATA", SHARED)) / "weights"
    files = ("A_pretrained_HEAD.npz", "C_trained_2025.npz")
    a, b = (jax.tree.map(jnp.asarray, dict(np.load(folder / f))) for f in files)
    photos = data.load("clothing_rgb")
    train, test = (255 * jnp.asarray(s.x) for s in (photos.train, photos.test))
    logits = jax.jit(nn.resnet8)
    teach = lambda x: (jax.nn.softmax(logits(a, x)) + jax.nn.softmax(logits(b, x))) / 2
    log = lambda p, x: jax.nn.log_softmax(nn.resnet8(p, x))
    apart = jax.jit(lambda p, x, t: optax.losses.kl_divergence(log(p, x), t).mean())
    labels = [logits(p, test).argmax(-1) for p in (a, b)]
    norms = {p: p.replace("mean", "variance") for p in a if "moving_mean" in p}
    few, target = [(train[: config.count // 5],)], teach(test)

    def at(params: Any) -> tuple[float, float]:
        params = merge.recalibrate(nn.resnet8, params, few, statistics=norms)
        given = logits(params, test).argmax(-1)
        same = [float(jnp.mean(given == y)) for y in labels]
        return float(apart(params, test, target)), sum(same) / 2

    given = train[-config.count :], teach(train[-config.count :])
    moved = matched(config, nn.resnet8, apart, a, b, given, key)
    return {kind: line(config, at, a, m, 3) for kind, m in moved.items()}


def matched(
    config: Config, apply: Any, loss: Any, a: Any, b: Any, given: Any, key: jax.Array
) -> dict[str, Any]:
    """B as it is, and permuted onto A in three ways."""
    found = rewrite.symmetries(apply, a, given[0][:2])
    starts = range(0, config.count, 100)
    batches = [tuple(v[i : i + 100] for v in given) for i in starts]
    ours = lambda path, _: "moving" not in path
    weights = align.weight_matching(a, b, found, key=key, where=ours)
    by = {"key": key, "by": "correlation"}
    seen = align.activation_matching(apply, a, b, found, [x for x, _ in batches], **by)
    rounds = [batches[i % len(batches)] for i in range(config.learn)]
    by = {"key": key, "optimiser": optax.sgd(0.3, 0.9), "start": weights}
    learned = align.straight_through_matching(loss, a, b, found, rounds, **by)
    tables = zip(KINDS, ({}, weights, seen, learned), strict=True)
    return {kind: rewrite.permute(b, found, t) for kind, t in tables}


def line(config: Config, at: Any, a: Any, b: Any, points: int) -> dict[str, Any]:
    """Losses on the line, what is right in its middle, and how far apart its ends."""
    mix = lambda t: jax.tree.map(lambda x, y: (1 - t) * x + t * y, a, b)
    t = np.linspace(0, 1, points)
    loss, right = map(np.array, zip(*(at(mix(s)) for s in t), strict=True))
    ours, theirs = ([x for x in jax.tree.leaves(p) if x.ndim > 1] for p in (a, b))
    found = {"loss": loss, "distance": tree.norm(tree.subtract(ours, theirs))}
    found["barrier"] = (loss - (1 - t) * loss[0] - t * loss[-1]).max()
    found |= {"middle": right[points // 2], "ends": (right[0] + right[-1]) / 2}
    turned = lambda g: align.singular_vectors(ours, theirs, threshold=g)[0]
    found |= {f"R above {g}": turned(g) for g in config.thresholds}
    return {n: np.asarray(v) for n, v in found.items()}


def draw(config: Config, values: dict[str, Any]) -> "Figure":
    """The loss on the line between the nets, pair by pair and in the mean."""
    fig, axes = figures.figure(11, 4.2, ncols=len(values))
    removed = lambda n, k: f"{values[n][k]['barrier removed'].mean():.0%}"
    for ax, (net, kinds) in zip(axes, values.items(), strict=True):
        for kind, colour in zip(KINDS, (figures.INK, *figures.COLOURS), strict=False):
            loss = kinds[kind]["loss"]
            t = np.linspace(0, 1, loss.shape[1])
            label = f"{kind}: {removed(net, kind)}" if kind != "none" else kind
            ax.plot(t, loss.T, color=colour, linewidth=0.5, alpha=0.4)
            ax.plot(t, loss.mean(0), color=colour, linewidth=2, label=label)
        ax.legend(frameon=False, fontsize=9, title="matched by: barrier removed")
        ax.set_title(f"{net}: loss on the line", size=10, loc="left")
        ax.set_ylim(0, 1.65 * ax.get_ylim()[1])
        ax.set_xticks([0, 0.5, 1], ["A", "middle", "B"])
    told = ", ".join(f"{removed(n, 'weights')} between {n}s" for n in values)
    figures.headline(
        fig,
        f"What matching weights removes of the loss barrier: {told}",
        f"Test loss. MLP, CNN: {config.pairs} pairs on {config.task}, thin, and their "
        f"mean. ResNet-8: a pair of released models on photographs of clothes, the "
        f"divergence from the mean of both; {config.orders} orders of matching.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
