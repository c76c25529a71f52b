"""BANG: WiSE-FT of a model that was fine-tuned with label smoothing or mixup.

Claim:    A fine-tuned model that is too sure of itself outweighs the pre-trained one it
          is averaged with; tuned with label smoothing, mixup or both, it does not, and
          the average (BANG) is at least as accurate under a shift as plain WiSE-FT.
Cite:     Lin et al., 2023, "Spurious Feature Diversification Improves Out-of-
          distribution Generalization", https://arxiv.org/abs/2309.17230.
Command:  python experiments/bang.py
Device:   CPU, 2 cores. Minutes: 3; --smoke: a quarter.
Expected: no gain: BANG minus WiSE-FT is -0.3 ± 2.0 points, both chosen; at alpha 0.5,
          +1.5 ± 4.2 with mixup and -6.8 ± 8.5 with smoothing 0.1. The premise holds:
          tuned plainly, confidence exceeds accuracy by 17 points, base 4; else by -30.

The pre-trained model saw MNIST digits framed by 32 patches of random colours, the other
was tuned on a few whose colours all tell the class. Under the shift a colour tells it
with a probability of `levels`. Alpha and recipe are chosen on shifted images of other
digits; the test images are reported.
"""

from dataclasses import dataclass
import functools as ft
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from rich.progress import track

from jaxlab import data, experiment, figures, merge, nn, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "bang.png"
CLASSES = 10


@dataclass(frozen=True)
class Config:
    """The digits, the models and the shift."""

    task: str = "mnist"
    seeds: int = 10
    images: int = 500
    """to pre-train on; to tune on, as many others"""
    chosen_on: int = 500
    """further images, to choose alpha and recipe on"""
    test: int = 1000
    width: int = 128
    start: int = 200
    """steps of pre-training"""
    steps: int = 300
    """of fine-tuning"""
    rate: float = 3e-3
    """of fine-tuning: high enough for a tuned model that is too sure under the shift"""
    levels: tuple[float, ...] = (0.3, 0.2, 0.1)
    alphas: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(11))
    smoke: bool = False


SMALL = {"images": 200, "test": 200, "width": 16, "start": 20, "steps": 20}
SMOKE = {"task": "digits", "seeds": 1, "alphas": (0.0, 0.5, 1.0), **SMALL}


def loss(params: Any, x: Any, y: Any, key: Any, *, smooth: float, mix: float) -> Any:
    """Cross-entropy of smoothed labels, after mixup if `mix` is above 0."""
    targets = optax.smooth_labels(jax.nn.one_hot(y, CLASSES), smooth)
    if mix:
        x, targets = data.mixup(x, targets, key=key, alpha=mix)
    return optax.softmax_cross_entropy(nn.mlp_apply(params, x), targets).mean()


PLAIN = "plain"
RECIPES = {
    PLAIN: ft.partial(loss, smooth=0.0, mix=0.0),
    "smoothing 0.02": ft.partial(loss, smooth=0.02, mix=0.0),
    "smoothing 0.1": ft.partial(loss, smooth=0.1, mix=0.0),
    "mixup 0.2": ft.partial(loss, smooth=0.0, mix=0.2),
    "smoothing 0.1, mixup 0.2": ft.partial(loss, smooth=0.1, mix=0.2),
}


def run(config: Config) -> dict[str, float]:
    """Accuracies under the shift, at alpha 0.5 and at a chosen one; over-confidence."""
    shape = (config.seeds, len(RECIPES), len(config.alphas))
    choose, report = np.zeros(shape), np.zeros(shape)
    surplus = np.zeros((config.seeds, 1 + len(RECIPES)))
    for seed in track(range(config.seeds), "seeds"):
        base, tuned, sets = models(config, seed)
        for i, one in enumerate(tuned):
            for j, alpha in enumerate(config.alphas):
                model = merge.wise_ft(tree.stack([base, one]), alpha=alpha)
                choose[seed, i, j], report[seed, i, j] = (right(model, s) for s in sets)
        surplus[seed] = [sure(m, sets[1]) - right(m, sets[1]) for m in (base, *tuned)]
    metrics = experiment.measured("base", report[:, 0, 0])
    names = ["base", *(f"tuned, {name}" for name in RECIPES)]
    for name, values in zip(names, surplus.T, strict=True):
        metrics |= experiment.measured(f"{name}: confidence minus accuracy", values)
    middle = report[:, :, config.alphas.index(0.5)]
    for i, name in enumerate(RECIPES):
        metrics |= experiment.measured(f"tuned, {name}", report[:, i, -1])
        metrics |= experiment.measured(f"alpha 0.5, {name}", middle[:, i])
        gain = middle[:, i] - middle[:, 0]
        if name != PLAIN:
            metrics |= experiment.measured(f"alpha 0.5, {name} minus plain", gain)
    best = {
        "WiSE-FT, chosen alpha": picked(choose[:, :1], report[:, :1]),
        "BANG, chosen recipe and alpha": picked(choose[:, 1:], report[:, 1:]),
    }
    for name, values in best.items():
        metrics |= experiment.measured(name, values)
    wise, bang = best.values()
    metrics |= experiment.measured("BANG minus WiSE-FT, both chosen", bang - wise)
    if not config.smoke:
        figures.save(draw(config, report, surplus, bang - wise), PICTURE)
    return metrics


def models(config: Config, seed: int) -> tuple[Any, list[Any], Any]:
    """The base, it tuned by every recipe, and the shifted images: choose and report."""
    n, m = config.images, config.chosen_on
    key = jax.random.key(seed)
    one = data.load(config.task, seed=seed, train=2 * n + m, test=config.test)
    part = lambda a, b: data.Split(one.train.x[a:b], one.train.y[a:b])
    sets = [
        shifted(split, config.levels, jax.random.fold_in(key, i))
        for i, split in enumerate((part(2 * n, 2 * n + m), one.test))
    ]
    pixels = sets[0].x[0].size
    init, _ = nn.mlp((pixels, config.width, CLASSES))
    fit = ft.partial(experiment.fit, key=jax.random.fold_in(key, 2))
    clean = shifted(part(0, n), (0.0,), jax.random.fold_in(key, 3))
    told = shifted(part(n, 2 * n), (1.0,), jax.random.fold_in(key, 4))
    start = init(jax.random.fold_in(key, 5))
    base = fit(RECIPES[PLAIN], start, tuple(clean), steps=config.start)
    how = {"steps": config.steps, "rate": config.rate}
    return base, [fit(r, base, tuple(told), **how) for r in RECIPES.values()], sets


def shifted(split: Any, levels: tuple[float, ...], key: Any) -> data.Split:
    """All images once per level, their colours telling the class so often."""
    paint: Any = ft.partial(data.multicolor, split.x, split.y)
    keys = jax.random.split(key, len(levels))
    x = [paint(key=k, correlation=c) for k, c in zip(keys, levels, strict=True)]
    return data.Split(np.concatenate(x), np.tile(split.y, len(levels)))


def right(model: Any, split: Any) -> float:
    """The accuracy of a model."""
    return experiment.accuracy(nn.mlp_apply, model, *split)


def sure(model: Any, split: Any) -> float:
    """The mean probability of the likeliest class."""
    return float(jax.nn.softmax(nn.mlp_apply(model, split.x)).max(-1).mean())


def picked(choose: np.ndarray, report: np.ndarray) -> np.ndarray:
    """By seed, what is reported where the other images are best."""
    best = choose.reshape(len(choose), -1).argmax(1)
    return report.reshape(len(report), -1)[np.arange(len(best)), best]


def draw(config: Config, report: Any, surplus: Any, gain: np.ndarray) -> "Figure":
    """The paths from base to tuned, and how much too sure their ends are."""
    layout = {"ncols": 2, "width_ratios": (1.6, 1)}
    fig, (path, bar) = figures.figure(10, 4.4, **layout)
    for values, colour, name in zip(
        100 * report.swapaxes(0, 1), figures.COLOURS, RECIPES, strict=False
    ):
        mean, half = np.array([experiment.interval(v) for v in values.T]).T
        path.plot(config.alphas, mean, color=colour, marker="o", ms=3, label=name)
        band = {"color": colour, "alpha": 0.12, "lw": 0}
        path.fill_between(config.alphas, mean - half, mean + half, **band)
    path.set(xlabel="alpha: 0 pre-trained, 1 fine-tuned", ylabel="accuracy, percent")
    path.set_title("under the shift", size=10, loc="left")
    path.legend(frameon=False, fontsize=9)
    names = ["pre-trained", *RECIPES]
    mean, half = 100 * np.array([experiment.interval(v) for v in surplus.T]).T
    colours = [figures.GREY, *figures.COLOURS[: len(RECIPES)]]
    bar.barh(names, mean, xerr=half, color=colours, error_kw={"lw": 1, "capsize": 3})
    bar.axvline(0, color=figures.GREY, linewidth=1)
    bar.invert_yaxis()
    bar.set_xlabel("confidence minus accuracy, points")
    before, after = mean[1], mean[2:].mean()
    mean, half = (100 * v for v in experiment.interval(gain))
    figures.headline(
        fig,
        f"Smoothing and mixup turn {before:+.0f} points of over-confidence into "
        f"{after:+.0f}; BANG minus WiSE-FT is {mean:+.1f} ± {half:.1f} points",
        f"MultiColorMNIST, mean and 95 % interval over {config.seeds} seeds. In the "
        f"title, alpha (and BANG's recipe) are chosen on shifted images that are not "
        f"reported.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
