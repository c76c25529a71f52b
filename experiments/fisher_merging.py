"""Fisher-weighted averages of experts against plain ones.

Claim:    Weighing each parameter by its diagonal Fisher information merges experts at
          least as well as plain averaging, also where the share of each expert is
          tuned; a Fisher from sampled labels, or from given ones, does nearly as well
          as the exact one.
Cite:     Matena & Raffel, 2021, "Merging Models with Fisher-Weighted Averaging",
          https://arxiv.org/abs/2111.09832, Section 3.
Command:  python experiments/fisher_merging.py
Device:   CPU, 2 cores. Minutes: 4; --smoke: a quarter.
Expected: Reproduces. Exact Fisher minus average, in points (5 seeds): +4.0 +- 1.2 for
          all experts, +4.3 +- 1.6 for pairs, +2.0 +- 0.3 for pairs with tuned shares.
          Sampled labels cost 0.3 +- 0.3 points against exact, given ones 1.0 +- 0.4.

All pairs of experts and all experts at once are merged. The tuned share of a pair is
chosen, for either method, on every second test image; the others are reported.
"""

from dataclasses import dataclass
import itertools as it
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import experiment, figures, measure, merge, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "fisher_merging.png"
KINDS = ("exact", "sampled", "empirical")


@dataclass(frozen=True)
class Config:
    """The data of the Fisher; the rest is as `experiment.experts` has it."""

    tasks: tuple[str, ...] = ("mnist", "fashion", "signs", "quickdraw")
    seeds: int = 5
    width: int = 256
    steps: int = 400
    rate: float = 3e-4
    test: int = 2000
    images: int = 200
    """training images of each task that the Fisher is a mean over"""
    floor: float = 1e-8
    """what is added to the Fisher, which is about 1e-3 in the mean"""
    shares: int = 11
    """how many shares of the first expert of a pair to choose from"""
    smoke: bool = False


SMOKE = {
    "tasks": ("digits", "digits/rotate90", "digits/invert"),
    "seeds": 1,
    "width": 32,
    "steps": 60,
    "rate": 3e-3,
    "images": 50,
    "shares": 3,
}


def run(config: Config) -> dict[str, float]:
    """Accuracies of all merges, and differences to plain averaging."""
    found: dict[str, list[float]] = {}
    size = {"width": config.width, "steps": config.steps, "rate": config.rate}
    for seed in track(range(config.seeds), "seeds"):
        key = jax.random.key(seed)
        setting = experiment.experts(config.tasks, key=key, test=config.test, **size)
        for name, value in one_seed(config, setting, key).items():
            found.setdefault(name, []).append(value)
    values = {name: np.array(sample) for name, sample in found.items()}
    metrics = {name: float(sample.mean()) for name, sample in values.items()}
    for case in ("all", "pairs", "pairs tuned"):
        for kind in KINDS:
            change = values[f"{case}: {kind}"] - values[f"{case}: average"]
            metrics |= experiment.measured(f"{case}: {kind} minus average", change)
    for kind in KINDS[1:]:
        change = values[f"pairs: {kind}"] - values["pairs: exact"]
        metrics |= experiment.measured(f"pairs: {kind} minus exact", change)
    if not config.smoke:
        figures.save(draw(config, values), PICTURE)
    return metrics


def one_seed(config: Config, setting: Any, key: jax.Array) -> dict[str, float]:
    """The mean accuracy of every merge, on the tasks of the experts that it merges."""
    choose, report = experiment.held_out(setting)
    count = len(config.tasks)
    found = {"experts": float(experiment.own(report, setting.models).mean())}
    found["base"] = float(experiment.accuracies(report, setting.base).mean())
    fishers = information(config, setting, key)
    weights = {"average": None} | fishers
    for name, fisher in weights.items():
        model = merged(config, setting.models, fisher, 1.0)
        found[f"all: {name}"] = float(experiment.accuracies(report, model).mean())
        pairs = list(it.combinations(range(count), 2))
        rows = [pair_accuracy(config, choose, report, fisher, p) for p in pairs]
        equal, tuned = np.mean(rows, 0)
        found |= {f"pairs: {name}": equal, f"pairs tuned: {name}": tuned}
    for name, fisher in list(fishers.items())[1:]:
        found[f"rank correlation with exact: {name}"] = alike(fishers["exact"], fisher)
    return found


def information(config: Config, setting: Any, key: jax.Array) -> dict[str, Any]:
    """The three Fishers of every expert on its own task, stacked, by name."""
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for i, model in enumerate(tree.unstack(setting.models)):
        x, y = (jnp.asarray(a[: config.images]) for a in setting.data[i].train)
        given = (lambda p, x, i=i: setting.apply(p, x, i)), model, x
        few: dict[str, Any] = {"batch_size": 50}
        now = jax.random.fold_in(key, i)
        values = (
            measure.fisher(*given, **few),
            measure.fisher_monte_carlo(*given, key=now, **few),
            measure.fisher_empirical(*given, labels=y, **few),
        )
        for kind, value in zip(KINDS, values, strict=True):
            found[kind].append(tree.scale(value, 1 / config.images))
    return {kind: tree.stack(values) for kind, values in found.items()}


def merged(config: Config, models: Any, fisher: Any, weights: Any) -> Any:
    """The Fisher-weighted mean, or the plain one where there is no Fisher."""
    if fisher is None:
        return merge.linear(models, weights=weights)
    return merge.fisher(models, fisher, weights=weights, floor=config.floor)


def pair_accuracy(
    config: Config, choose: Any, report: Any, fisher: Any, pair: tuple[int, int]
) -> tuple[float, float]:
    """The mean accuracy of a pair on its two tasks, at equal and at tuned shares."""
    two = lambda t: t and jax.tree.map(lambda x: x[jnp.array(pair)], t)
    models, fisher = two(choose.models), two(fisher)
    shares = np.linspace(0, 1, config.shares)
    weights = [jnp.array([s, 1 - s], jnp.float32) for s in shares]
    mixed = [merged(config, models, fisher, w) for w in weights]
    best = int(np.argmax([on_pair(choose, m, pair) for m in mixed]))
    equal = mixed[config.shares // 2]
    return on_pair(report, equal, pair), on_pair(report, mixed[best], pair)


def on_pair(setting: experiment.Experts, model: Any, pair: tuple[int, int]) -> float:
    """The mean accuracy of a model on two tasks."""
    total = 0.0
    for i in pair:
        x, y = setting.data[i].test
        total += experiment.accuracy(setting.apply, model, x, y, np.int32(i))
    return total / 2


def alike(a: Any, b: Any) -> float:
    """The rank correlation of two trees over all their entries."""
    flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
    ranks = [np.argsort(np.argsort(flat(t))).astype(np.float64) for t in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def draw(config: Config, values: dict[str, np.ndarray]) -> "Figure":
    """Differences to plain averaging, seed by seed."""
    cases = {"all": "all experts", "pairs": "pairs", "pairs tuned": "pairs, tuned"}
    fig, axes = figures.figure(9, 3.6, ncols=3, sharey=True)
    for ax, (case, title) in zip(axes, cases.items(), strict=True):
        plain = values[f"{case}: average"]
        for i, kind in enumerate(KINDS):
            change = 100 * (values[f"{case}: {kind}"] - plain)
            mean, half = experiment.interval(change)
            ax.plot([i + 0.15] * len(change), change, ".", color=figures.FAINT)
            ax.errorbar(i, mean, half, color=figures.COLOURS[i], marker="o", capsize=4)
        ax.axhline(0, color=figures.GREY, linewidth=1, linestyle=":")
        ax.set_xticks(range(len(KINDS)), KINDS)
        ax.set_xlim(-0.5, len(KINDS) - 0.5)
        ax.set_title(f"{title}: average {plain.mean():.1%}", size=10, loc="left")
    axes[0].set_ylabel("Fisher minus average, points")
    gain = {c: 100 * (values[f"{c}: exact"] - values[f"{c}: average"]) for c in cases}
    figures.headline(
        fig,
        f"The exact Fisher adds {gain['all'].mean():+.1f} points to the average of all "
        f"experts, {gain['pairs'].mean():+.1f} to that of pairs, and "
        f"{gain['pairs tuned'].mean():+.1f} where the shares of both are tuned",
        f"Accuracy on the tasks of the merged experts ({values['experts'].mean():.1%}; "
        f"their base {values['base'].mean():.1%}); mean and 95 % interval over "
        f"{config.seeds} seeds, each seed in grey.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
