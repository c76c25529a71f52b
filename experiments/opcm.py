"""Models merged one by one as they arrive: projection and rescaling against sums.

Claim:    OPCM merges models that come one after another better than a running average
          and better than sequential task arithmetic, whatever their order.
Cite:     Tang et al., 2025, "Merging Models on the Fly Without Retraining",
          https://arxiv.org/abs/2501.09522, Algorithm 1 and Section 5.
Command:  python experiments/opcm.py
Device:   CPU, 1 core. Minutes: 6; --smoke: a quarter.
Expected: OPCM minus the running average +4.7 points (95 % interval 1.0), minus task
          arithmetic +0.9 (0.5); more than the average in all 30 orders. Not to be told:
          projection from mere rescaling, +0.2 (1.0).

Each task brings one expert; a merge sees it once and keeps one model. A running average
and task arithmetic (the paper's 0.3) end the same in any order. Beside them: the sum at
OPCM's norm, not projected, and task arithmetic with a factor chosen on 100 labels each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.progress import track

from jaxlab import experiment, figures, merge, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "opcm.png"
TASKS = ("mnist", "fashion", "signs", "clothing", "omniglot", "quickdraw")
METHODS = ("opcm", "running average", "task arithmetic", "rescaled sum")


@dataclass(frozen=True)
class Config:
    """The tasks, the size of the models, and how often they are shuffled."""

    tasks: tuple[str, ...] = (*TASKS, "mnist/rotate90", "fashion/invert")
    seeds: int = 5
    """bases and experts trained anew"""
    orders: int = 6
    """of the tasks, for each seed"""
    width: int = 256
    """of the two hidden layers"""
    steps: int = 400
    """of training the base, and of tuning each expert"""
    rate: float = 3e-4
    """of tuning the experts"""
    alpha: float = 0.5
    """of OPCM, the paper's"""
    factor: float = 0.3
    """of task arithmetic, the paper's"""
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    """factors that the labels choose from"""
    smoke: bool = False


SMOKE = {
    "tasks": ("digits", "digits/rotate90", "digits/invert"),
    "seeds": 1,
    "orders": 2,
    "width": 32,
    "steps": 60,
    "rate": 3e-3,
    "scales": (0.3, 1.0),
}


def run(config: Config) -> dict[str, float]:
    """Final accuracies, how they vary with the order, and what was forgotten."""
    tables, ends = [], []
    size = {"width": config.width, "steps": config.steps, "rate": config.rate}
    for seed in track(range(config.seeds), "seeds"):
        key = jax.random.key(seed)
        setting = experiment.experts(config.tasks, key=key, **size)
        shuffle, count = np.random.default_rng([seed, 7]), len(config.tasks)
        orders = [shuffle.permutation(count) for _ in range(config.orders)]
        tables.append([one_order(config, setting, order) for order in orders])
        ends.append(reference(config, setting))
    course = np.array(tables)  # [seeds, orders, methods, step, the step's task]
    last = {m: course[:, :, i, -1].mean(-1) for i, m in enumerate(METHODS)}
    fixed = {name: np.array([e[name] for e in ends]) for name in ends[0]}
    if not config.smoke:
        figures.save(draw(config, course, fixed), PICTURE)
    return metrics(course, last, fixed)


def one_order(config: Config, setting: experiment.Experts, order: Any) -> np.ndarray:
    """After each step, by method, the accuracy on every task in the order's order."""
    deltas = merge.task_vectors(setting.models, setting.base)
    found = []
    for name in METHODS:
        steps = merged(name, config, deltas, order)
        models = [merge.add(setting.base, delta) for delta in steps]
        found.append([experiment.accuracies(setting, m)[order] for m in models])
    return np.array(found)


step = jax.jit(merge.opcm_step)


def merged(name: str, config: Config, deltas: Any, order: np.ndarray) -> Iterator[Any]:
    """The task vector after each step, from one new one and what the last step kept."""
    one = lambda i: jax.tree.map(lambda x: x[i], deltas)
    state = merge.opcm_init(one(0))
    total, norms = state.delta, 0.0
    for t, i in enumerate(order, 1):
        delta = one(i)
        total = tree.add(total, delta)
        norms += float(tree.norm(delta))
        if name == "opcm":
            state = step(state, delta, alpha=config.alpha)
            yield state.delta
        elif name == "running average":
            yield tree.scale(total, 1 / t)
        elif name == "task arithmetic":
            yield tree.scale(total, config.factor)
        else:
            yield tree.scale(total, norms / t / float(tree.norm(total)))


def reference(config: Config, setting: experiment.Experts) -> dict[str, float]:
    """The base, each expert on its own task, and a sum with a factor from labels."""
    own = [experiment.accuracies(setting, m) for m in tree.unstack(setting.models)]
    total = merge.task_arithmetic(merge.task_vectors(setting.models, setting.base))
    tuned, _ = experiment.scaled(setting, total, config.scales)
    return {
        "base": float(experiment.accuracies(setting, setting.base).mean()),
        "experts": float(np.mean(np.diagonal(own))),
        "task arithmetic, tuned": float(experiment.accuracies(setting, tuned).mean()),
    }


def metrics(course: np.ndarray, last: dict, fixed: dict) -> dict[str, float]:
    """Means over orders and seeds; intervals over seeds, each a mean over its orders.

    What was forgotten is a task's accuracy when it came, minus that in the end.
    """
    found = {name: float(values.mean()) for name, values in fixed.items()}
    for i, name in enumerate(METHODS):
        came = np.diagonal(course[:, :, i], axis1=2, axis2=3)[..., :-1]
        lost = came - course[:, :, i, -1, :-1]
        found[name] = float(last[name].mean())
        found[f"{name}: forgotten"] = float(lost.mean())
    found["opcm: deviation over orders"] = float(last["opcm"].std(1, ddof=1).mean())
    others = {name: last[name].mean(1) for name in METHODS[1:]}
    others["task arithmetic, tuned"] = fixed["task arithmetic, tuned"]
    for name, values in others.items():
        change = last["opcm"].mean(1) - values
        found |= experiment.measured(f"opcm minus {name}", change)
    wins = last["opcm"] > last["running average"]
    return found | {"orders where opcm beats the average": float(wins.mean())}


def draw(config: Config, course: np.ndarray, fixed: dict) -> "Figure":
    """Accuracy on all tasks so far, and in the end order by order."""
    fig, (left, right) = figures.figure(10, 4.2, ncols=2, width_ratios=(3, 2))
    steps = np.arange(1, len(config.tasks) + 1)
    seen = np.tril(np.ones((len(steps), len(steps))))
    so_far = 100 * (course * seen).sum(-1) / seen.sum(-1)
    for i, name in enumerate(METHODS):
        mean = so_far[:, :, i].mean((0, 1))
        left.plot(steps, mean, "o-", color=figures.COLOURS[i], ms=4, label=name)
    left.set_xlabel("experts merged", size=9)
    left.set_ylabel("accuracy on their tasks, %", size=9)
    left.legend(frameon=False, fontsize=9)
    left.grid(axis="y", color=figures.FAINT, linewidth=0.5, alpha=0.6)
    last = 100 * course[:, :, :, -1].mean(-1)
    for i in range(1, len(METHODS)):
        change = last[:, :, 0] - last[:, :, i]
        x = np.repeat(np.arange(config.seeds), config.orders) / 12 - 0.3
        colour = figures.COLOURS[i]
        right.plot(i + x, change.ravel(), ".", color=colour, alpha=0.35, mew=0)
        mean, half = experiment.interval(change.mean(1))
        right.errorbar(i + 0.25, mean, half, color=colour, marker="o", capsize=4)
    right.axhline(0, color=figures.GREY, linewidth=1, linestyle=":")
    names = [n.replace(" ", "\n") for n in METHODS[1:]]
    right.set_xticks(range(1, len(METHODS)), names)
    right.set_xlim(0.5, len(METHODS) - 0.4)
    right.set_ylabel("OPCM minus the other in the end, points", size=9)
    gain = {n: (last[:, :, 0] - last[:, :, i]).mean() for i, n in enumerate(METHODS)}
    figures.headline(
        fig,
        f"One model at a time, OPCM ends {gain['running average']:+.1f} points from "
        f"the running average, {gain['task arithmetic']:+.1f} from task arithmetic and "
        f"{gain['rescaled sum']:+.1f} from itself without its projection",
        f"{len(steps)} tasks in {config.orders} orders for each of {config.seeds} "
        f"seeds. Base {fixed['base'].mean():.1%}, each expert on its own task "
        f"{fixed['experts'].mean():.1%}. Right: a dot for each order, seeds side by "
        f"side; 95 % interval over seeds.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
