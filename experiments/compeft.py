"""ComPEFT: ternary task vectors in files many times smaller, and what they cost.

Claim:    A task vector kept as the signs of its largest entries and one magnitude is 8
          to 50 times smaller on disk than in 16 bits, at equal accuracy; compressed
          task vectors merge as well as dense ones.
Cite:     Yadav et al., 2023, "ComPEFT", https://arxiv.org/abs/2311.13171, Section 3.
Command:  python experiments/compeft.py
Device:   CPU, 2 cores. Minutes: 4; --smoke: a quarter.
Expected: Reproduces in part. Files are 11 to 45 times smaller. Compressed minus dense,
          in points (5 seeds), for experts of the better base: -0.3 +- 0.6 at 11 times,
          -0.5 +- 0.6 at 13, -1.1 +- 1.1 at 27, -2.0 +- 0.9 at 45; of the weak base:
          -1.3 +- 0.8 at 11, -7.7 +- 1.5 at 45. Sums are equal up to 17 times: +0.4
          +- 1.5 on the weak base, where the sum gains 11, -0.1 +- 0.3 on the other.

The factor of each compressed expert is chosen as in the paper, from `alphas` on every
second test image, and the others are reported; that of each sum on training images.
Sizes are of the files that `io.save` wrote, accuracies of what `io.load` reads.
"""

from dataclasses import dataclass
import functools as ft
from pathlib import Path
import tempfile
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import experiment, figures, io, merge, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "compeft.png"
BASES = ("weak base", "better base")
KINDS = {"expert": "each expert on its task", "sum": "their sum on all tasks"}


@dataclass(frozen=True)
class Config:
    """What is searched over; the rest is as `experiment.experts` has it."""

    tasks: tuple[str, ...] = ("mnist", "fashion", "signs", "quickdraw")
    seeds: int = 5
    width: int = 256
    steps: int = 400
    rate: float = 3e-4
    test: int = 2000
    seen: int = 400
    """images of each task that the better base is trained on further"""
    densities: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """the fractions of entries kept"""
    alphas: tuple[float, ...] = (0.5, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 6, 8, 10)
    """the factors of a compressed expert to choose from: finer than the paper's"""
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    """the factors of a sum of task vectors to choose from"""
    smoke: bool = False


SMOKE = {
    "tasks": ("digits", "digits/rotate90"),
    "seeds": 1,
    "width": 32,
    "steps": 60,
    "rate": 3e-3,
    "seen": 100,
    "densities": (0.3,),
    "alphas": (1.0, 3.0),
    "scales": (0.5, 1.0),
}


def run(config: Config) -> dict[str, float]:
    """Sizes and accuracies by base and density, and differences to dense models."""
    rows = []
    size = {"width": config.width, "steps": config.steps, "rate": config.rate}
    for seed in track(range(config.seeds), "seeds"):
        key = jax.random.key(seed)
        weak = experiment.experts(config.tasks, key=key, test=config.test, **size)
        again = {"steps": config.steps, "rate": config.rate, "key": key}
        both = weak, experiment.further(weak, config.seen, **again)
        rows.append([compressed(config, setting) for setting in both])
    # each [seeds, bases, densities]
    found = {n: np.array([[b[n] for b in row] for row in rows]) for n in rows[0][0]}
    if not config.smoke:
        figures.save(draw(config, found), PICTURE)
    return summary(config, found)


def summary(config: Config, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Means, and intervals of paired differences, by base and density."""
    metrics = {}
    for b, base in enumerate(BASES):
        at = {name: values[:, b] for name, values in found.items()}
        for name in ("base", *(f"{kind} dense" for kind in KINDS)):
            metrics[f"{base}: {name}"] = at[name].mean()
        for i, density in enumerate(config.densities):
            start = f"{base}, {density:.0%} kept"
            metrics[f"{start}: times smaller"] = at["smaller"][:, i].mean()
            for kind in KINDS:
                change = at[kind][:, i] - at[f"{kind} dense"][:, i]
                metrics |= experiment.measured(f"{start}: {kind} minus dense", change)
    return metrics


def compressed(config: Config, setting: experiment.Experts) -> dict[str, list[float]]:
    """Everything measured of one setting, by density."""
    choose, report = experiment.held_out(setting)
    deltas = merge.task_vectors(setting.models, setting.base)
    onto = jax.vmap(ft.partial(merge.add, setting.base))

    def merged(delta: Any) -> float:
        model = experiment.scaled(setting, delta, config.scales)[0]
        return experiment.accuracies(report, model).mean()

    dense = {
        "base": experiment.accuracies(report, setting.base).mean(),
        "expert dense": experiment.own(report, setting.models).mean(),
        "sum dense": merged(merge.task_arithmetic(deltas)),
    }
    found: dict[str, list[float]] = {}
    for density in config.densities:
        ones = merge.compeft(deltas, density=density)
        models = (onto(tree.scale(ones, a)) for a in config.alphas)
        best = np.argmax([experiment.own(choose, m) for m in models], 0)
        alpha = jnp.asarray(config.alphas, jnp.float32)[best]
        small = merge.compeft(deltas, density=density, alpha=alpha)
        smaller, loaded = through_files(small)
        bits = merge.ternary(deltas, density=density, alpha=alpha)
        now = dense | {
            "smaller": smaller,
            "expert": experiment.own(report, onto(loaded)).mean(),
            "sum": merged(merge.ternary_sum(bits, setting.base)),
        }
        for name, value in now.items():
            found.setdefault(name, []).append(float(value))
    return found


def through_files(small: Any) -> tuple[float, Any]:
    """How much smaller the files are than 16-bit ones, and what is read from them."""
    ratios, loaded = [], []
    with tempfile.TemporaryDirectory() as folder:
        for delta in tree.unstack(small):
            file, half = Path(folder, "a.compeft"), Path(folder, "a.safetensors")
            io.save(file, delta)
            io.save(half, jax.tree.map(lambda x: x.astype(jnp.float16), delta))
            ratios.append(half.stat().st_size / file.stat().st_size)
            loaded.append(io.load(file, like=delta))
    return float(np.mean(ratios)), tree.stack(loaded)


def draw(config: Config, found: dict[str, np.ndarray]) -> "Figure":
    """Accuracy lost against size, of experts and of their sum, on either base."""
    fig, axes = figures.figure(9, 4.2, ncols=2, sharey=True)
    smaller, at = found["smaller"].mean((0, 1)), np.arange(len(config.densities))
    for ax, (kind, title) in zip(axes, KINDS.items(), strict=True):
        ax.axhline(0, color=figures.GREY, linewidth=1, linestyle=":")
        change = found[kind] - found[f"{kind} dense"]
        for b, base in enumerate(BASES):
            pairs = [experiment.interval(column) for column in change[:, b].T]
            mean, half = 100 * np.array(pairs).T
            low, high = (found[n][:, b].mean() for n in ("base", f"{kind} dense"))
            look = {"marker": "o", "capsize": 3, "color": figures.COLOURS[b]}
            text = f"{base}: {low:.0%}, dense {high:.0%}"
            ax.errorbar(at + b / 12, mean, half, label=text, **look)
        names = (
            f"{x:.0f}\n{d:.0%}" for x, d in zip(smaller, config.densities, strict=True)
        )
        ax.set_xticks(at, list(names))
        ax.set_xlabel("times smaller than in 16 bits, and share of entries kept")
        ax.set_title(title, size=10, loc="left")
        ax.legend(frameon=False, fontsize=9, loc="lower right")
    axes[0].set_ylabel("compressed minus dense, points")
    points = {k: 100 * (found[k] - found[f"{k} dense"]).mean(0)[1] for k in KINDS}
    expert, total = (f"{-v.max():.1f} to {-v.min():.1f}" for v in points.values())
    figures.headline(
        fig,
        f"Files {smaller.min():.0f} to {smaller.max():.0f} times smaller: on the "
        f"better base, an expert loses {expert} points, their sum {total}",
        f"Accuracy on held-out images, mean and 95 % interval of {config.seeds} seeds.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
