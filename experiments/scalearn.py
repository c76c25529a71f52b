"""ScaLearn: the updates of trained adapters, scaled for a task with few examples.

Claim:    Learning only how much of each source adapter to use is as good on a target
          with few examples as training a new adapter, or better; four numbers can do.
Cite:     Frohmann et al., 2023, "ScaLearn: Simple and Highly Parameter-Efficient Task
          Transfer by Learning to Scale", https://arxiv.org/abs/2310.01217, Tables 1, 4.
Command:  python experiments/scalearn.py
Device:   CPU, 2 cores. Minutes: 8; --smoke: a quarter.
Expected: not reproduced: ScaLearn is -6.4 ± 5.3 points from a new LoRA, -2.4 ± 3.4 from
          the average of the sources and -5.5 ± 3.1 from the best of them.

A transformer of two layers is trained on MNIST and part of Fashion-MNIST; a LoRA of
rank 4 is trained on each of four source tasks. A target has 100 images, of which a
fifth choose the learning rate; all methods train its new head. The average and the best
single source are folded into the base, and only the head is trained; the best is the
source of the best mean on the *test* images, which favours it. (The first record, seen
before, is of shorter training: no method was told from the probe.)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.progress import track

from jaxlab import data, experiment, figures, lowrank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "scalearn.png"
SOURCE = lowrank.lora(rank=4, alpha=8)
VARIANTS = {
    "ScaLearn": {},
    "ScaLearnUniform": {"uniform": True},
    "ScaLearn++": {"shared": True},
    "ScaLearnUniform++": {"uniform": True, "shared": True},
}
OTHERS = ("new LoRA", "average", "best source", "linear probe")


@dataclass(frozen=True)
class Config:
    """The base, the tasks, and the budget of adapting."""

    base: tuple[str, ...] = ("mnist", "fashion")
    sources: tuple[str, ...] = (
        "mnist/rotate90",
        "fashion/rotate90",
        "signs",
        "quickdraw",
    )
    targets: tuple[str, ...] = ("mnist/rotate60", "clothing/rotate90")
    where: str = "layers/**/kernel"
    """the leaves that are adapted"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 3
    width: int = 48
    depth: int = 2
    patch: int = 7
    base_steps: int = 600
    source_train: int = 2000
    """the most images of a source task"""
    source_steps: int = 200
    train: int = 100
    """images of a target"""
    test: int = 1000
    steps: int = 100
    rates: tuple[float, ...] = (3e-3, 1e-2)
    smoke: bool = False


SMOKE = {
    "base": ("digits",),
    "sources": ("digits/rotate90",),
    "targets": ("digits/rotate60",),
    "where": "layers/down/kernel",
    "variants": ("ScaLearnUniform++",),
    "seeds": 1,
    "width": 8,
    "depth": 1,
    "patch": 4,
    "base_steps": 10,
    "source_steps": 5,
    "test": 200,
    "steps": 5,
    "rates": (1e-2,),
}


def run(config: Config) -> dict[str, float]:
    """Accuracies and sizes of all methods, and differences of the scaled ones."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    sizes = {"width": config.width, "depth": config.depth, "patch": config.patch}
    apply, bases = experiment.pretrained(
        config.base, keys=keys, steps=config.base_steps, **sizes
    )
    size = {"keys": keys, "steps": config.source_steps, "rates": config.rates[-1:]}
    sources = {}
    for name in track(config.sources, "sources"):
        task = data.load(name, train=config.source_train, test=config.test)
        sources[name] = experiment.adaptation(
            apply, bases, {config.where: SOURCE}, task, **size
        )
    found, trained = {}, {}
    for name in track(config.targets, "targets"):
        task = data.load(name, train=config.train, test=config.test)
        found[name], trained = adapted(config, apply, bases, sources, task, keys)
    means = {m: np.mean([f[m] for f in found.values()], 0) for m in trained}
    best = max(config.sources, key=lambda s: means[s].mean())
    means["best source"], trained["best source"] = means[best], 0
    if not config.smoke:
        figures.save(draw(config, means, trained), PICTURE)
    metrics = {f"{s}, as a source": r.accuracies.mean() for s, r in sources.items()}
    metrics |= {f"{m}, {t}": v.mean() for t, f in found.items() for m, v in f.items()}
    metrics |= {f"{m}: trained": n for m, n in trained.items() if n}
    for variant in config.variants:
        for other in OTHERS:
            change = means[variant] - means[other]
            metrics |= experiment.measured(f"{variant} minus {other}", change)
    return metrics


def adapted(
    config: Config, apply: Any, bases: Any, sources: Any, task: Any, keys: Any
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By method, the accuracies `[seeds]` on a target and how much was trained."""
    size = {"keys": keys, "steps": config.steps, "rates": config.rates}
    known = jax.vmap(lambda *states: lowrank.scalearn_sources(states))(
        *(r.states for r in sources.values())
    )
    several = lambda **how: lowrank.scalearn(SOURCE, sources=len(sources), **how)
    adapters = {v: {config.where: several(**VARIANTS[v])} for v in config.variants}
    adapters |= {"new LoRA": {config.where: SOURCE}, "linear probe": {}}
    out = {
        method: experiment.adaptation(
            apply, bases, chosen, task, statistics=known, **size
        )
        for method, chosen in adapters.items()
    }
    folded = {s: jax.vmap(lowrank.fold)(r.bases, r.states) for s, r in sources.items()}
    mean = lambda *w: sum(w) / len(w)
    folded["average"] = jax.tree.map(mean, *folded.values())
    out |= {
        name: experiment.adaptation(apply, base, {}, task, **size)
        for name, base in folded.items()
    }
    found = {name: o.accuracies for name, o in out.items()}
    return found, {name: o.trained for name, o in out.items()}


def draw(config: Config, means: Any, trained: dict[str, int]) -> "Figure":
    """A row per method, with how many numbers it trains."""
    fig, ax = figures.figure(9, 4.2)
    rows = [*config.variants, *OTHERS]
    for at, method in enumerate(rows):
        mean, half = experiment.interval(100 * means[method])
        colour = figures.COLOURS[0 if method in VARIANTS else 1]
        look = {"color": colour, "ecolor": colour, "capsize": 3}
        ax.errorbar(mean, at, xerr=half, fmt="o", **look)
        for one in 100 * means[method]:
            ax.plot(one, at, ".", color=figures.FAINT, zorder=0)
    names = [f"{m}  ({trained[m]:,})" for m in rows]
    ax.set_yticks(range(len(rows)), names, size=10)
    ax.invert_yaxis()
    ax.set_xlabel(f"accuracy, mean of {len(config.targets)} targets, %")
    gain = lambda other: experiment.interval(100 * (means["ScaLearn"] - means[other]))
    mine, best = gain("new LoRA"), gain("best source")
    figures.headline(
        fig,
        f"With {config.train} images of the target, scaling four sources changes "
        f"accuracy by {mine[0]:+.1f} ± {mine[1]:.1f} points against a new LoRA, by "
        f"{best[0]:+.1f} ± {best[1]:.1f} against the best source",
        f"In brackets the trained numbers, the head's left out. Targets: "
        f"{', '.join(config.targets)}; {config.seeds} seeds in grey, 95 % intervals.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
