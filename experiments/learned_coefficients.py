"""Learned coefficients: aTLAS and AdaMerging against one scale for all task vectors.

Claim:    A few coefficients, learned from a few labels (aTLAS) or from none
          (AdaMerging), merge better than task arithmetic with its best scale.
          Evolution finds coefficients as good as the gradient's while they are few.
Cite:     Zhang et al., 2024, "Knowledge Composition using Task Vectors with Learned
          Anisotropic Scaling"; Yang et al., 2023, "AdaMerging".
Command:  python experiments/learned_coefficients.py
Device:   CPU, 2 cores. Minutes: 3; --smoke: a quarter.
Expected: against 62.9 % of task arithmetic, 20 labels a task gain aTLAS 3.7 ± 3.1
          points by leaf and 3.8 ± 3.0 by task; CMA-ES is within 0.4 of it. AdaMerging
          did not reproduce: -2.6 ± 3.6 by leaf (MNIST gains 5, the weak tasks lose).

Half of the test images, which no model was trained on, are to learn from: `shots` of
each task with labels, which choose the scale of task arithmetic too; all without.
"""

from dataclasses import dataclass
import functools as ft
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import experiment, figures, merge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "learned_coefficients.png"
SCALED = "task arithmetic"
WORDS = {"model": "task", "layer": "task and layer", "leaf": "task and leaf"}


@dataclass(frozen=True)
class Config:
    """The tasks, the size of the models, and what may be learned from."""

    tasks: tuple[str, ...] = ("mnist", "fashion", "signs", "clothing", "quickdraw")
    seeds: int = 5
    width: int = 256
    train: int = 400
    """steps of training the base, and of tuning each expert"""
    rate: float = 3e-4
    """of tuning the experts"""
    shots: int = 20
    """labelled images of each task"""
    steps: int = 200
    """of learning; of AdaMerging twice as many"""
    size: int = 20
    """unlabelled images of each task in a step"""
    generations: int = 50
    """of the search"""
    blocks: tuple[str, ...] = ("model", "layer", "leaf")
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)
    """what task arithmetic chooses from"""
    smoke: bool = False


SMALL = {"seeds": 1, "width": 16, "train": 60, "rate": 3e-3, "scales": (0.3, 1.0)}
FEW = {"steps": 5, "generations": 3, "blocks": ("leaf",)}
SMOKE = SMALL | FEW | {"tasks": ("digits", "digits/invert")}
Batch = tuple[jax.Array, ...]  # images, labels, tasks


class Pool(NamedTuple):
    """What every method is given, and the images that are reported."""

    setting: experiment.Experts  # its training images are the ones to learn from
    labels: Batch  # [1, k * shots, ...]
    images: Batch  # [steps, k * size, ...], to be used without their labels


def run(config: Config) -> dict[str, float]:
    """Accuracy of every method, and its gain over task arithmetic at its best scale."""
    rows: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for seed in track(range(config.seeds), "seeds"):
        key = jax.random.key(seed)
        pool = given(config, key)
        for name, (found, size) in methods(config, pool, key).items():
            value = experiment.accuracies(pool.setting, found)
            rows.setdefault(name, []).append(value)
            sizes[name] = size
    metrics, mean = {}, {name: np.array(row).mean(1) for name, row in rows.items()}
    gains = {n: v - mean[SCALED] for n, v in mean.items() if n not in ("base", SCALED)}
    for name, values in mean.items():
        metrics |= experiment.measured(name, values)
        by_task = zip(config.tasks, np.mean(rows[name], 0), strict=True)
        metrics |= {f"{name}: {task}": value for task, value in by_task}
    for name, gain in gains.items():
        metrics |= experiment.measured(f"{name} minus {SCALED}", gain)
    for block in config.blocks:
        gain = mean[f"search by {block}"] - mean[f"atlas by {block}"]
        metrics |= experiment.measured(f"search minus gradient by {block}", gain)
    metrics |= {f"{name}: coefficients": size for name, size in sizes.items()}
    if not config.smoke:
        figures.save(draw(config, mean, gains, sizes), PICTURE)
    return metrics


def given(config: Config, key: Any) -> Pool:
    """One seed's models, and half of the test images to learn from."""
    size = {"width": config.width, "steps": config.train, "rate": config.rate}
    setting = experiment.experts(config.tasks, key=key, test=2000, **size)
    choose, report = experiment.held_out(setting)
    pair = lambda c, r: r._replace(train=c.test)
    setting = report._replace(data=tuple(map(pair, choose.data, report.data)))
    labels = jax.tree.map(lambda x: x[None], experiment.examples(setting, config.shots))
    images = experiment.batches(setting, config.steps, key=key, size=config.size)
    return Pool(setting, labels, images)


def methods(config: Config, pool: Pool, key: Any) -> dict[str, Any]:
    """Every model, and how many coefficients it has."""
    s = pool.setting
    deltas = merge.task_vectors(s.models, s.base)
    scaled, _ = experiment.scaled(
        s, merge.task_arithmetic(deltas), config.scales, count=config.shots
    )
    found: dict[str, Any] = {"base": (s.base, 0), SCALED: (scaled, 1)}
    loss = ft.partial(experiment.loss, s)
    apply = lambda p, batch: s.apply(p, batch[0], batch[2])
    more = {"models": s.models, "base": s.base}
    for per in (b for b in config.blocks if b != "layer"):
        how = {"per": per, "epochs": 2, **more}
        got = merge.adamerging(batches=pool.images, apply=apply, **how)
        found[f"adamerging by {per}"] = got.params, count(got)
    for per in config.blocks:
        how = {"per": per, "epochs": config.steps, **more}
        got = merge.atlas(batches=pool.labels, loss=loss, **how)
        found[f"atlas by {per}"] = got.params, count(got)
        got = searched(config, pool, loss, per, jax.random.fold_in(key, 2))
        found[f"search by {per}"] = got.params, count(got)
    return found


def searched(config: Config, pool: Pool, loss: Any, per: Any, key: Any) -> Any:
    """The coefficients of aTLAS by CMA-ES: every recipe merged and scored in memory."""
    s = pool.setting

    def composed(deltas: Any, *, scale: Any) -> Any:
        scale = merge.by_leaf(scale, deltas, per=per)
        return merge.task_arithmetic(merge.anisotropic(deltas, scale=scale))

    start = merge.coefficients(s.models, per=per, fill=0.3)
    return merge.search(
        s.models,
        jax.tree.map(lambda x: x[0], pool.labels),
        method=composed,
        loss=loss,
        coefficients={"scale": start},
        base=s.base,
        generations=config.generations,
        key=key,
    )


def count(learned: Any) -> int:
    """How many coefficients were learned."""
    return sum(jnp.size(c) for c in jax.tree.leaves(learned.coefficients))


def draw(config: Config, mean: Any, gains: Any, sizes: dict[str, int]) -> "Figure":
    """The gain of every method over task arithmetic, by what it learns from."""
    few = f"{config.shots} labels a task"
    words = {"adamerging": "AdaMerging, no labels", "atlas": f"aTLAS, {few}"}
    words["search"] = f"CMA-ES, {few}"
    fig, ax = figures.figure(9, 4)
    labels = []
    for at, name in enumerate(sorted(gains)):
        kind, _, per = name.split()
        colour = figures.COLOURS[list(words).index(kind)]
        each = 100 * gains[name]
        middle, half = experiment.interval(each)
        ax.plot(each, [at] * len(each), ".", color=colour, alpha=0.4)
        ax.errorbar(middle, at, xerr=half, fmt="o", color=colour, capsize=3)
        text = f"{words[kind]},\nper {WORDS[per]}: {sizes[name]} coefficients"
        labels.append(text)
    ax.axvline(0, color=figures.GREY, linewidth=1, linestyle=":")
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.set_xlabel(f"accuracy minus that of {SCALED} at its best scale, points")
    best = lambda kind: 100 * max(v.mean() for n, v in gains.items() if kind in n)
    figures.headline(
        fig,
        f"Over one tuned scale, a few labels gain aTLAS {best('atlas'):+.1f} points; "
        f"AdaMerging, without labels, gains {best('adamerging'):+.1f}",
        f"Mean over {len(config.tasks)} tasks: base {mean['base'].mean():.1%}, "
        f"{SCALED} {mean[SCALED].mean():.1%}. Small dots: {config.seeds} seeds; large: "
        f"mean and 95 % interval of the paired difference.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
