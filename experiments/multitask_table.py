"""Every merge method on every task: eight image tasks, one encoder.

Claim:    Merging closes part of the gap between a base and its experts without training
          on any task; methods that see unlabelled images close more; methods that keep
          a mask or a compressed vector for each task close nearly all of it.
Cite:     Tang et al., 2024, "FusionBench", whose table for CLIP this follows; each
          method's own paper is in the README's table.
Command:  python experiments/multitask_table.py
Device:   CPU, 2 cores. Minutes: 12; --smoke, on the embedded digits: one.
Expected: base 55 %, experts 79 %, task arithmetic 63 %. Methods within one point
          of each other are not told apart: intervals over seeds are in the record.

Every merged task vector is put back on the base with one factor, chosen from `scales`
on 100 training images of each task; all other options are the papers' defaults. Methods
of exactly two models are folded over the experts in their order.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.progress import track

from jaxlab import experiment, figures, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "multitask_table.png"
TASKS = ("mnist", "fashion", "signs", "clothing", "omniglot", "quickdraw")
METHODS = {n: m for kind in experiment.MERGES.values() for n, m in kind.items()}


@dataclass(frozen=True)
class Config:
    """The tasks and the size of the models."""

    tasks: tuple[str, ...] = (*TASKS, "mnist/rotate90", "fashion/invert")
    seeds: int = 3
    width: int = 512
    steps: int = 400
    rate: float = 3e-4
    adapt: int = 500
    """steps of the methods that learn coefficients"""
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
    smoke: bool = False


SMOKE = {
    "tasks": ("digits", "digits/rotate90", "digits/invert"),
    "seeds": 1,
    "width": 32,
    "steps": 60,
    "rate": 3e-3,
    "adapt": 10,
    "scales": (0.3, 1.0),
}


def run(config: Config) -> dict[str, float]:
    """Accuracy of every method, by task and in the mean, with its interval."""
    names = ["base", *METHODS, "experts"]
    table = np.zeros((config.seeds, len(names), len(config.tasks)))
    size = {"width": config.width, "steps": config.steps, "rate": config.rate}
    effort = experiment.Effort(config.scales, config.adapt)
    for seed in range(config.seeds):
        key = jax.random.key(seed)
        setting = experiment.experts(config.tasks, key=key, **size)
        found = {"base": setting.base, "experts": tree.unstack(setting.models)}
        for name, method in track(METHODS.items(), f"seed {seed}"):
            found[name] = method(setting, effort, jax.random.fold_in(key, 1))
        table[seed] = [accuracies(setting, found[name]) for name in names]
    if not config.smoke:
        figures.save(draw(config, names, table.mean(0)), PICTURE)
    metrics = {}
    for name, rows in zip(names, table.transpose(1, 0, 2), strict=True):
        metrics[name], half = experiment.interval(rows.mean(1))
        metrics |= {f"{name} +-": half} if config.seeds > 1 else {}
        by_task = zip(config.tasks, rows.mean(0), strict=True)
        metrics |= {f"{name}: {task}": value for task, value in by_task}
    return metrics


def accuracies(setting: experiment.Experts, found: Any) -> np.ndarray:
    """Of one model on every task, or of each task's own model on its task."""
    if isinstance(found, list):
        own = [experiment.accuracies(setting, m)[i] for i, m in enumerate(found)]
        return np.array(own)
    return experiment.accuracies(setting, found)


def draw(config: Config, names: list[str], mean: np.ndarray) -> "Figure":
    """The table, sorted by mean inside each kind of method."""
    value = dict(zip(names, mean, strict=True))
    kinds = [
        sorted(k, key=lambda n: -value[n].mean()) for k in experiment.MERGES.values()
    ]
    groups = [["base"], *kinds, ["experts"]]
    breaks = np.cumsum([len(g) for g in groups])[:-1]
    rows = [name for group in groups for name in group]
    shares = np.array([value[name] for name in rows])
    fig = figures.table(rows, config.tasks, shares, breaks=breaks, width=11)
    best = rows[1]
    figures.headline(
        fig,
        f"Without data, {best} comes closest to the experts: {value[best].mean():.0%}, "
        f"from {value['base'].mean():.0%} of the base",
        f"Accuracy in percent on test images, mean of {config.seeds} seeds. From the "
        f"top: the base; merges {', '.join(experiment.MERGES)}; the experts, each on "
        f"its own task.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
