"""CorDA: what the base task needs is frozen while another is learnt.

Claim:    CorDA in its knowledge-preserved mode keeps the base task better than LoRA
          does, at equal accuracy on the new task.
Cite:     Yang et al., 2024, "CorDA: Context-Oriented Decomposition Adaptation",
          https://arxiv.org/abs/2406.05223, Section 4.2.
Command:  python experiments/corda.py
Device:   CPU, 2 cores. Minutes: 3; --smoke: a quarter.
Expected: reproduced in part. Base accuracy against LoRA: +3.4 ± 2.5 points at 0.9 of
          the highest level of new-task accuracy that all reach, +6.6 ± 6.9 at the level
          itself; against PiSSA +11.5 ± 6.9 and +16.6 ± 13.0.

A transformer of two layers is trained on MNIST and part of Fashion-MNIST together, then
adapted to another task with a new head, at several learning rates. The first head is
then put back: the adapted layers are tested on the base tasks. A method's curve goes
through its rates in turn; at a level of new-task accuracy it counts with the best base
accuracy that the curve has there or beyond, the same for every method. The highest
level that all methods reach is set for each seed and task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import functools as ft
import itertools as it
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import data, experiment, figures, lowrank, measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "corda.png"
METHODS = {
    "lora": "LoRA",
    "pissa": "PiSSA",
    "corda ipm": "CorDA, instruction previewed",
    "corda kpm": "CorDA, knowledge preserved",
}
LEVELS = {"the highest level": 1.0, "0.9 of it": 0.9}

ADAPTERS = {
    "lora": lowrank.lora,
    "pissa": lowrank.pissa,
    "corda ipm": lowrank.corda,
    "corda kpm": ft.partial(lowrank.corda, mode="kpm"),
}
fold = jax.jit(jax.vmap(lowrank.fold))


@dataclass(frozen=True)
class Config:
    """The tasks, the transformer, and how it is adapted."""

    base: tuple[str, ...] = ("mnist", "fashion")
    tasks: tuple[str, ...] = ("signs", "clothing")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 4
    patch: int = 14
    width: int = 48
    where: str = "layers/**/kernel"
    rank: int = 4
    """of every method; all have a scale of 1"""
    train: int = 600
    """steps of training the base; then, of adapting it"""
    steps: int = 100
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """of adapting, each a point of the curve"""
    context: int = 512
    """images for the Gram matrices, of the base tasks (kpm) or of the new one (ipm)"""
    test: int = 1000
    smoke: bool = False


SMOKE: dict[str, Any] = {"base": ("digits",), "tasks": ("digits/rotate90",)}
SMOKE |= {"seeds": 1, "patch": 4, "width": 16, "rank": 2, "where": "layers/up/kernel"}
SMOKE |= {"methods": ("lora", "corda kpm"), "train": 30, "steps": 10, "rates": (1e-2,)}


def run(config: Config) -> dict[str, float]:
    """Accuracies on the base and new tasks, and differences at matched levels."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    sizes = {"patch": config.patch, "width": config.width, "depth": 2}
    apply, bases = experiment.pretrained(
        config.base, keys=keys, steps=config.train, **sizes
    )
    sets = [data.load(name, test=config.test) for name in config.base]
    start = base_accuracy(apply, bases, sets)
    old = np.concatenate([d.train.x[: config.context // len(sets)] for d in sets])
    found = {}
    for name in track(config.tasks, "tasks"):
        task = data.load(name)
        grams = {"corda kpm": old, "corda ipm": task.train.x[: config.context]}
        for method in config.methods:
            more: dict[str, Any] = {"keys": keys, "steps": config.steps}
            if method in grams:
                more["statistics"] = gram(apply, bases, grams[method])
            where, curve = {config.where: ADAPTERS[method](rank=config.rank)}, []
            for rate in config.rates:
                more["rates"] = (rate,)
                now = experiment.adaptation(apply, bases, where, task, **more)
                plain = fold(now.bases, now.states, now.adapted)
                plain |= {"head": bases["head"]}
                curve.append([now.accuracies, base_accuracy(apply, plain, sets)])
            found[name, method] = np.array(curve).T  # [seeds, (new, base), rates]
    if not config.smoke:
        figures.save(draw(config, start, found), PICTURE)
    return metrics(config, start, found)


def gram(apply: Any, bases: Any, x: np.ndarray) -> dict[str, jax.Array]:
    """The Gram matrices of every base's layers on a context."""
    one = lambda base, x: measure.gram(apply, base, x)
    return jax.jit(jax.vmap(one, (0, None)))(bases, x)


def base_accuracy(apply: Any, bases: Any, sets: Sequence[data.Dataset]) -> np.ndarray:
    """`[seeds]`: the mean over the base tasks, told apart by one head."""
    offset = np.cumsum([0, *(d.classes for d in sets)])
    right = lambda d, o: (answers(apply, bases, d.test.x) == d.test.y + o).mean(1)
    return np.mean([right(d, o) for d, o in zip(sets, offset, strict=False)], 0)


def at_level(curve: np.ndarray, level: float) -> float:
    """The best base accuracy on a curve `[(new, base), rates]` from a level on."""
    at = np.arange(curve.shape[1])
    fine = np.linspace(0, at[-1], 100 * at[-1] + 1)
    new, base = (np.interp(fine, at, row) for row in curve)
    return float(base[new >= level - 1e-9].max())


def levels(found: dict, task: str) -> np.ndarray:
    """`[seeds]`: the highest accuracy on a new task that all methods reach."""
    return np.min([v[:, 0].max(1) for (t, _), v in found.items() if t == task], 0)


def matched(found: dict, task: str, method: str, share: float) -> np.ndarray:
    """`[seeds]`: base accuracy at a share of the level that all methods reach."""
    pairs = zip(found[task, method], share * levels(found, task), strict=True)
    return np.array([at_level(curve, level) for curve, level in pairs])


@ft.partial(jax.jit, static_argnums=0)
def answers(apply: Any, models: Any, x: np.ndarray) -> jax.Array:
    """`[seeds, images]`: the classes that each model says."""
    return jax.vmap(lambda p: jnp.argmax(apply(p, x), -1))(models)


def metrics(config: Config, start: np.ndarray, found: dict) -> dict[str, float]:
    """Means over seeds; paired differences at each level, also as a mean of tasks."""
    out = {"base task, before": float(start.mean())}
    for task in config.tasks:
        out[f"{task}: the highest level"] = float(levels(found, task).mean())
    for (task, method), (i, rate) in it.product(found, enumerate(config.rates)):
        new, base = found[task, method][..., i].mean(0)
        out[f"{task}: {method}, rate {rate:g}: new task"] = float(new)
        out[f"{task}: {method}, rate {rate:g}: base task"] = float(base)
    others = [m for m in config.methods if m != "corda kpm"]
    for (label, share), other in it.product(LEVELS.items(), others):
        at = lambda task, m, share=share: matched(found, task, m, share)
        change = {t: at(t, "corda kpm") - at(t, other) for t in config.tasks}
        name = f"base task at {label}: corda kpm minus {other}"
        for task, values in change.items():
            out |= experiment.measured(f"{task}: {name}", values)
        out |= experiment.measured(name, np.mean(list(change.values()), 0))
    return out


def draw(config: Config, start: np.ndarray, found: dict) -> "Figure":
    """Base accuracy against new-task accuracy, a panel for each task."""
    fig, axes = figures.figure(10, 4.2, ncols=len(config.tasks), squeeze=False)
    for ax, task in zip(axes[0], config.tasks, strict=True):
        for i, (method, label) in enumerate(METHODS.items()):
            new, base = 100 * found[task, method].mean(0)
            ax.plot(new, base, "o-", color=figures.COLOURS[i], ms=5, label=label)
        ax.axhline(100 * start.mean(), color=figures.GREY, lw=1, ls=":")
        ax.set_xlabel(f"accuracy on the new task ({task}), %", size=9)
    axes[0, 0].set_ylabel("accuracy on the base tasks, first head, %", size=9)
    axes[0, 0].legend(frameon=False, fontsize=8)
    at = lambda method: [matched(found, t, method, 1.0) for t in config.tasks]
    gain = 100 * np.subtract(at("corda kpm"), at("lora")).mean(0)
    mean, half = experiment.interval(gain)
    figures.headline(
        fig,
        f"At the highest new-task accuracy that all reach, CorDA (knowledge preserved) "
        f"keeps {mean:+.1f} ± {half:.1f} points of the base tasks against LoRA",
        f"Rank {config.rank}, learning rates {', '.join(map(str, config.rates))} along "
        f"each curve; means of {config.seeds} seeds. Dotted: before adapting.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
