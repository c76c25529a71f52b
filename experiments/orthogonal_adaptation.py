"""Orthogonal Adaptation: adapters trained apart, added without meeting.

Claim:    Tasks adapted apart in disjoint columns of one orthogonal basis interfere less
          when they are summed than LoRA does, and lose less accuracy by it.
Cite:     Po et al., 2023, "Orthogonal Adaptation for Modular Customization of Diffusion
          Models", https://arxiv.org/abs/2312.02432, Sections 4 and 5.
Command:  python experiments/orthogonal_adaptation.py
Device:   CPU, 2 cores. Minutes: 2; --smoke: a quarter.
Expected: reproduced in part. Interference is 0 to rounding (LoRA's 0.29), and half the
          numbers are trained at equal accuracy alone (-0.6 ± 1.3 points). The sum is no
          more accurate for it: -0.1 ± 6.2 against LoRA's, -1.6 ± 4.6 against the
          control's.

A transformer of two layers is trained on MNIST and part of Fashion-MNIST, then adapted
to each task apart, with a head of its own. The updates of the layers are summed (the
row "OrthoAdapt sum") and every task is tested with its own head. The control has the
same fixed columns for all tasks: as few trained numbers, but not orthogonal.
Interference is that of `lowrank.interference`, over pairs of tasks and leaves.
"""

from dataclasses import dataclass
import functools as ft
import itertools as it
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import data, experiment, figures, lowrank, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "orthogonal_adaptation.png"
METHODS = {
    "lora": "LoRA",
    "same columns": "fixed columns, the same for all",
    "orthogonal": "Orthogonal Adaptation",
}

fold = jax.jit(jax.vmap(lowrank.fold))


@dataclass(frozen=True)
class Config:
    """The tasks, the transformer, and how it is adapted."""

    base: tuple[str, ...] = ("mnist", "fashion")
    tasks: tuple[str, ...] = ("signs", "clothing", "omniglot", "quickdraw")
    seeds: int = 4
    patch: int = 14
    width: int = 48
    where: str = "layers/**/kernel"
    rank: int = 4
    """of every method; all have a scale of 1"""
    train: int = 600
    """steps of training the base; then, of adapting it"""
    steps: int = 100
    rates: tuple[float, ...] = (1e-2, 3e-2)
    """of adapting; the best on held-out training images of the task alone"""
    smoke: bool = False


SMOKE: dict[str, Any] = {"base": ("digits",), "seeds": 1, "patch": 4, "width": 16}
SMOKE |= {"tasks": ("digits/rotate90", "digits/invert"), "where": "layers/up/kernel"}
SMOKE |= {"rank": 2, "train": 20, "steps": 10, "rates": (1e-2,)}


def run(config: Config) -> dict[str, float]:
    """Accuracies alone and summed, interference, and paired differences."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    sizes = {"patch": config.patch, "width": config.width, "depth": 2}
    sizes |= {"keys": keys, "steps": config.train}
    apply, bases = experiment.pretrained(config.base, **sizes)
    sets = [data.load(name) for name in config.tasks]
    more = {"keys": keys, "steps": config.steps, "rates": config.rates}
    alike = adapters(config.rank, len(sets))
    found, adapted = {}, {}
    for method, (i, task) in track(list(it.product(METHODS, enumerate(sets))), "runs"):
        adapter = alike[method][i]
        if (adapter, i) not in adapted:
            given = apply, bases, {config.where: adapter}, task
            adapted[adapter, i] = experiment.adaptation(*given, **more)
    for method in METHODS:
        mine = [adapted[a, i] for i, a in enumerate(alike[method])]
        found[method, "alone"] = np.array([one.accuracies for one in mine])
        found[method, "summed"] = summed(apply, bases, mine, sets)
        found[method, "interference"] = interference(mine)
        found[method, "trained"] = np.array([one.trained for one in mine])
    if not config.smoke:
        figures.save(draw(config, found), PICTURE)
    return metrics(config, found)


def adapters(rank: int, count: int) -> dict[str, list[Any]]:
    """The adapter of each task, by method; alike ones are one object."""
    mine = [lowrank.orthogonal_adaptation(rank=rank, concept=i) for i in range(count)]
    lora = lowrank.lora(rank=rank)
    same = [mine[0]] * count
    return {"lora": [lora] * count, "same columns": same, "orthogonal": mine}


def summed(apply: Any, bases: Any, mine: list, sets: list) -> np.ndarray:
    """`[tasks, seeds]`: accuracies with all updates, each task with its own head."""
    folded = [fold(a.bases, a.states, a.adapted) for a in mine]
    layers = bases["layers"]
    for one in folded:
        layers = tree.add(layers, tree.subtract(one["layers"], bases["layers"]))
    found = []
    for one, task in zip(folded, sets, strict=True):
        model = {**bases, "layers": layers, "head": one["head"]}
        found.append((answers(apply, model, task.test.x) == task.test.y).mean(1))
    return np.array(found)


def interference(mine: list[experiment.Adaptation]) -> np.ndarray:
    """`[seeds]`: the mean over pairs of tasks, matrices and layers."""
    others, found = ~np.eye(len(mine), dtype=bool), []
    each = jax.jit(jax.vmap(jax.vmap(lowrank.interference, (1, 1)), (1, 1)))
    for path in mine[0].states.leaves:
        if path.startswith("head/"):
            continue
        entries = [{**m.adapted.fixed[path], **m.states[path]} for m in mine]
        a, b = (jnp.stack([s[name] for s in entries]) for name in "ab")
        found.append(np.asarray(each(a, b))[..., others].mean((1, 2)))
    return np.mean(found, 0)


@ft.partial(jax.jit, static_argnums=0)
def answers(apply: Any, models: Any, x: np.ndarray) -> jax.Array:
    """`[seeds, images]`: the classes that each model says."""
    return jax.vmap(lambda p: jnp.argmax(apply(p, x), -1))(models)


def metrics(config: Config, found: dict) -> dict[str, float]:
    """Means over seeds and tasks; differences paired by seed."""
    out: dict[str, float] = {}
    lost = {m: found[m, "alone"] - found[m, "summed"] for m in METHODS}
    for method in METHODS:
        row = "orthogonal (OrthoAdapt sum)" if method == "orthogonal" else method
        out[f"{row}: trained numbers of a task"] = float(found[method, "trained"][0])
        for name in ("alone", "summed"):
            values = found[method, name].mean(0)
            out |= experiment.measured(f"{row}: {name}", values)
        out |= experiment.measured(f"{row}: lost by summing", lost[method].mean(0))
        out |= experiment.measured(
            f"{row}: interference", found[method, "interference"]
        )
        for task, values in zip(config.tasks, found[method, "summed"], strict=True):
            out[f"{row}: summed, {task}"] = float(values.mean())
    for other in ("lora", "same columns"):
        name = f"orthogonal minus {other}"
        for what in ("alone", "summed", "interference"):
            change = found["orthogonal", what] - found[other, what]
            change = np.atleast_2d(change).mean(0)
            out |= experiment.measured(f"{name}: {what}", change)
        change = (lost["orthogonal"] - lost[other]).mean(0)
        out |= experiment.measured(f"{name}: lost by summing", change)
    return out


def draw(config: Config, found: dict) -> "Figure":
    """By task, accuracy alone and in the sum; beside it the interference."""
    fig, (left, right) = figures.figure(10, 4.2, ncols=2, width_ratios=(4, 1))
    for j, (method, label) in enumerate(METHODS.items()):
        x = np.arange(len(config.tasks)) + (j - 1) * 0.24
        colour = figures.COLOURS[j]
        alone = 100 * found[method, "alone"].mean(1)
        left.bar(x, alone, 0.22, color=colour, alpha=0.25)
        pairs = [experiment.interval(100 * v) for v in found[method, "summed"]]
        mean, half = np.transpose(pairs)
        left.bar(x, mean, 0.22, yerr=half, color=colour, capsize=2, label=label)
        met = experiment.interval(found[method, "interference"])
        right.errorbar(j, *met, fmt="o", color=colour, capsize=3)
    left.set_xticks(range(len(config.tasks)), config.tasks)
    left.set_ylabel("accuracy, % (pale: the task alone)", size=9)
    left.set_ylim(0, 119)
    left.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")
    right.set_xticks(range(3), ["LoRA", "same\ncolumns", "orthogonal"], size=8)
    right.set(xlim=(-0.5, 2.5), ylim=(-0.01, None))
    right.set_ylabel("interference between tasks", size=9)
    lost = {m: found[m, "alone"] - found[m, "summed"] for m in METHODS}
    change = 100 * (lost["orthogonal"] - lost["lora"]).mean(0)
    mean, half = experiment.interval(change)
    means = {m: 100 * lost[m].mean() for m in METHODS}
    figures.headline(
        fig,
        f"Summing {len(config.tasks)} tasks costs {means['orthogonal']:.1f} points "
        f"with Orthogonal Adaptation and {means['lora']:.1f} with LoRA: "
        f"{mean:+.1f} ± {half:.1f}",
        f"Rank {config.rank}. Means of {config.seeds} seeds, 95 % intervals.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
