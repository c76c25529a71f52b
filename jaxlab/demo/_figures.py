"""The demo's figures. Every title is computed from the results it stands over."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..figures import COLOURS, GREY, INK, figure, headline, save, table
from ._measure import SHARE
from ._results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws every figure into the folder; returns the files in reading order."""
    makers = (tasks, accuracy, path, conflicts)
    files = [folder / f"{maker.__name__}.png" for maker in makers]
    for maker, file in zip(makers, files, strict=True):
        save(maker(results), file)
    return files


def tasks(results: Results) -> "Figure":
    """What the tasks look like, and how the base does on each."""
    n = len(results.tasks)
    fig, axes = figure(8.0, 0.8 * n + 1.0, nrows=n, ncols=10)
    base = results.accuracy["base"]
    for row, name in enumerate(results.tasks):
        for digit in range(10):
            ax = axes[row, digit]
            ax.imshow(results.samples[row, digit], cmap="Greys", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        label = f"{name}\n{base[row]:.0%}"
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center", size=10)
    worst = results.tasks[int(np.argmin(base))]
    headline(
        fig,
        f"A network that reads {base[0]:.0%} of plain digits reads {base.min():.0%} "
        f"of {worst} ones",
        "One test digit per class. The number is the accuracy of the base, which was "
        "trained on plain digits alone.",
    )
    return fig


def accuracy(results: Results) -> "Figure":
    """Every model on every task, as a heat map with its numbers."""
    rows = list(results.accuracy)
    shares = np.array([results.accuracy[m] for m in rows])
    names = [_label(m, results) for m in rows]
    fig = table(names, results.tasks, shares, breaks=(1, 1 + len(results.experts)))
    error = 50 / np.sqrt(results.tested)
    headline(
        fig,
        _verdict(results),
        f"Accuracy in percent on {results.tested} test images per task (standard error "
        f"up to {error:.0f} points). Merges are sorted by their mean; none saw any "
        f"data. slerp takes two experts, {' and '.join(results.experts[:2])}.",
    )
    return fig


def path(results: Results) -> "Figure":
    """Accuracy on the straight line from the base through each merge, and beyond."""
    columns = 4
    rows = -(-len(results.merges) // columns)
    fig, axes = figure(
        9.5, 2.0 * rows + 1.3, nrows=rows, ncols=columns, sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for ax in axes.flat[len(results.merges) :]:
        ax.set_visible(False)
        ax.figure.delaxes(ax)
    for ax, method in zip(axes.flat, results.merges, strict=False):
        curves = results.paths[method]
        for task, curve, colour in zip(results.tasks, curves.T, COLOURS, strict=False):
            ax.plot(results.steps, curve, color=colour, linewidth=1, label=task)
        mean = curves.mean(1)
        ax.plot(results.steps, mean, color=INK, linewidth=2.2, label="mean")
        top = int(np.argmax(mean))
        ax.plot(results.steps[top], mean[top], "o", color=INK, markersize=5)
        ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_title(method, size=10, loc="left", color=INK)
        ax.set(xlim=(0, results.steps[-1]), ylim=(0, 1), xticks=[0, 1, 2])
        ax.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=10)
    gain = {m: results.paths[m].mean(1).max() - results.mean(m) for m in results.merges}
    near = sum(g <= 0.01 for g in gain.values())
    most = max(gain, key=lambda m: gain[m])
    headline(
        fig,
        f"{near} of {len(gain)} merges are within a point of the best on their line; "
        f"{most}, the furthest, is {100 * gain[most]:.1f} points short of it",
        "Accuracy of base + λ (merged - base) against λ: 0 is the base, 1 (dotted) the "
        "merge as its recipe makes it. The dot marks the best mean.",
        beside=1.5,
    )
    return fig


def conflicts(results: Results) -> "Figure":
    """How often two experts pull a weight in opposite directions, layer by layer."""
    found = results.conflicts
    fig, ax = figure(8.0, 3.9)
    ax.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    ax.text(
        len(found) - 0.5, 0.5, "coin toss ", color=GREY, size=9, va="bottom", ha="right"
    )
    for i, one in enumerate(found):
        _strip(ax, i - 0.15, one.every, COLOURS[0])
        _strip(ax, i + 0.15, one.large, COLOURS[1])
    ax.set_xticks(range(len(found)), [one.name for one in found], size=10)
    ax.set(xlim=(-0.5, len(found) - 0.5), ylim=(0, 0.7))
    ax.set_yticks([0, 0.25, 0.5], ["0", "25 %", "50 %"])
    ax.set_ylabel("opposite signs", size=10)
    for y, (text, colour) in enumerate(
        [
            ("all entries", COLOURS[0]),
            (f"entries in both experts' top {SHARE:.0%}", COLOURS[1]),
        ]
    ):
        ax.text(
            0.01,
            0.99 - 0.08 * y,
            "● " + text,
            transform=ax.transAxes,
            color=colour,
            size=10,
            va="top",
        )
    every = float(np.mean([one.every.mean() for one in found]))
    large = float(np.mean([one.large.mean() for one in found]))
    trend = (
        "more"
        if large > every + 0.02
        else "less"
        if large < every - 0.02
        else "about as much"
    )
    headline(
        fig,
        f"Two experts pull {every:.0%} of the weights in opposite directions, and "
        f"{trend} of the large ones ({large:.0%})",
        "Each dot is a pair of experts, each bar their mean: the share of entries that "
        "the two moved in opposite directions away from the base.",
    )
    return fig


def _strip(ax: "Axes", at: float, values: np.ndarray, colour: str) -> None:
    """A dot for every value, side by side, and a bar at their mean."""
    spread = np.linspace(-0.06, 0.06, len(values))
    ax.plot(at + spread, values, "o", color=colour, markersize=5, alpha=0.75)
    ax.hlines(values.mean(), at - 0.1, at + 0.1, color=colour, linewidth=2.5)


def _verdict(results: Results) -> str:
    """Whether merging was worth it, in one sentence."""
    base, best = results.mean("base"), results.merges[0]
    expert = results.best_expert()
    worth = "more than" if results.mean(best) > results.mean(expert) else "no more than"
    return (
        f"Over all tasks the best merge ({best}) reads {results.mean(best):.0%} "
        f"of the digits, {worth} the best expert ({results.mean(expert):.0%}); "
        f"the base reads {base:.0%}"
    )


def _label(model: str, results: Results) -> str:
    return f"expert: {model}" if model in results.experts else model
