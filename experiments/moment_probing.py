"""Moment Probing: a head on second moments of frozen features.

Claim:    On frozen features, a head on their first and second moments beats a linear
          probe, which has their mean alone.
Cite:     Gao et al., 2023, "Tuning Pre-trained Model via Moment Probing",
          https://arxiv.org/abs/2307.11342, Sections 3.1, 3.2 and 4.
Command:  python experiments/moment_probing.py
Device:   CPU, 2 cores. Minutes: 6; --smoke: a quarter.
Expected: above a linear probe by +0.8 ± 0.6 points, but by its size: it is -0.7 ± 0.3
          from a hidden layer of as many parameters.

A transformer of two layers is trained on MNIST and part of Fashion-MNIST and frozen;
its 16 tokens are the features of other tasks. The control has a hidden layer on the
mean, with as many parameters as Moment Probing: is it second moments, or size? The
learning rate is chosen on a fifth of the training images. The backbone is not touched:
MP+ is not part of this.
"""

from collections.abc import Callable
from dataclasses import dataclass
import functools as ft
import itertools as it
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import data, experiment, figures, lowrank, nn, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "moment_probing.png"
CLASSES = 10  # of every head; tasks with fewer leave the rest unused
HEADS = {
    "linear probe": "linear probe",
    "hidden layer": "hidden layer, same size",
    "moment probing": "Moment Probing",
}


@dataclass(frozen=True)
class Config:
    """The tasks, the transformer, and the training of the heads."""

    base: tuple[str, ...] = ("mnist", "fashion")
    tasks: tuple[str, ...] = ("signs", "clothing", "omniglot")
    seeds: int = 4
    """bases trained anew; their heads are trained side by side"""
    patch: int = 7
    width: int = 32
    train: int = 300
    """steps of training the base"""
    dim: int = 64
    """of the tokens that Moment Probing projects to, in four heads"""
    depth: int = 2
    """of its convolutions"""
    steps: int = 300
    """of training a head"""
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    smoke: bool = False


SMOKE = {
    "base": ("digits",),
    "tasks": ("digits/rotate90",),
    "seeds": 1,
    "patch": 2,
    "width": 16,
    "train": 20,
    "steps": 20,
    "rates": (1e-2,),
}


def run(config: Config) -> dict[str, float]:
    """Accuracies of the heads, their sizes and paired differences."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    sizes = {"patch": config.patch, "width": config.width, "depth": 2}
    _, bases = experiment.pretrained(
        config.base, keys=keys, steps=config.train, **sizes
    )
    tokens = jax.jit(jax.vmap(nn.small_vit_features, (0, None), out_axes=1))
    found, counts = {}, {}
    for name in track(config.tasks, "tasks"):
        task = data.load(name)
        x = np.asarray(tokens(bases, task.train.x))  # [images, seeds, tokens, width]
        order = np.random.default_rng(0).permutation(len(x))
        parts = order[: len(x) // 5], order[len(x) // 5 :]
        held, seen = ((x[rows], task.train.y[rows]) for rows in parts)
        test = np.asarray(tokens(bases, task.test.x)), task.test.y
        for head, (init, apply) in heads(config).items():
            start = tree.stack([init(key, config.width) for key in keys])
            size = sum(v.size for v in jax.tree.leaves(start)) // config.seeds
            counts[head] = size
            models = [
                experiment.fit(
                    losses(apply), start, seen, key=keys[0], steps=config.steps, rate=r
                )
                for r in config.rates
            ]
            best = np.argmax([accuracies(apply, m, *held).mean() for m in models])
            found[name, head] = accuracies(apply, models[best], *test)
    if not config.smoke:
        figures.save(draw(config, found, counts), PICTURE)
    return metrics(config, found, counts)


@ft.cache
def heads(config: Config) -> dict[str, tuple[Callable, Callable]]:
    """`(init, apply)` of each head, on tokens `[b s d]`."""
    moment = lowrank.moment_probing(classes=CLASSES, dim=config.dim, depth=config.depth)
    shape = jax.eval_shape(lambda: moment.init(jax.random.key(0), config.width))
    size = sum(math.prod(v.shape) for v in jax.tree.leaves(shape))
    hidden = round((size - CLASSES) / (config.width + CLASSES + 1))

    def dense(*sizes: int) -> tuple[Callable, Callable]:
        init = lambda key, n: nn.mlp((n, *sizes, CLASSES)).init(key)
        return init, lambda params, x: nn.mlp_apply(params, x.mean(-2))

    return {
        "linear probe": dense(),
        "hidden layer": dense(hidden),
        "moment probing": tuple(moment),
    }


@ft.cache
def losses(apply: Callable) -> Callable[..., jax.Array]:
    """The sum of all seeds' losses: each learns as if alone."""
    one = lambda p, x, y: experiment.cross_entropy(apply(p, x), y)
    return lambda models, x, y: jax.vmap(one, (0, 1, None))(models, x, y).sum()


def accuracies(apply: Callable, models: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """`[seeds]`."""
    predict = jax.jit(jax.vmap(lambda p, x: jnp.argmax(apply(p, x), -1), (0, 1)))
    return (np.asarray(predict(models, x)) == y).mean(1)


def metrics(config: Config, found: dict, counts: dict) -> dict[str, float]:
    """Means over seeds; differences paired by seed, by task and of their mean."""
    out = {f"{head}: parameters": float(n) for head, n in counts.items()}
    for name, head in it.product(config.tasks, HEADS):
        out[f"{name}: {head}"] = float(found[name, head].mean())
    for other in ("linear probe", "hidden layer"):
        change = {n: found[n, "moment probing"] - found[n, other] for n in config.tasks}
        for name, values in change.items():
            label = f"{name}: moment probing minus {other}"
            out |= experiment.measured(label, values)
        mean = np.mean(list(change.values()), 0)
        out |= experiment.measured(f"moment probing minus {other}", mean)
    return out


def draw(config: Config, found: dict, counts: dict) -> "Figure":
    """Accuracies by task."""
    fig, ax = figures.figure(8, 4.2)
    for j, (head, label) in enumerate(HEADS.items()):
        pairs = [experiment.interval(100 * found[n, head]) for n in config.tasks]
        mean, half = np.transpose(pairs)
        x = np.arange(len(config.tasks)) + (j - 1) * 0.26
        label = f"{label} ({counts[head]:,} parameters)"
        ax.bar(x, mean, 0.24, color=figures.COLOURS[j], label=label)
        ax.errorbar(x, mean, half, fmt="none", ecolor=figures.INK, capsize=3)
        for at, value, more in zip(x, mean, half, strict=True):
            ax.text(at, value + more + 1, f"{value:.1f}", ha="center", size=9)
    ax.set_xticks(range(len(config.tasks)), config.tasks, size=10)
    ax.set_ylabel("accuracy, %")
    ax.set_ylim(0, 119)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    gain = {
        other: np.mean(
            [found[n, "moment probing"] - found[n, other] for n in config.tasks], 0
        )
        for other in ("linear probe", "hidden layer")
    }
    (a, da), (b, db) = (experiment.interval(100 * v) for v in gain.values())
    figures.headline(
        fig,
        f"Second moments of frozen features: {a:+.1f} ± {da:.1f} points on a linear "
        f"probe, {b:+.1f} ± {db:.1f} on a hidden layer of the same size",
        f"Heads on the 16 tokens of a frozen transformer. Means of {config.seeds} "
        f"seeds, 95 % intervals.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
