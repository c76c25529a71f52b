"""Every adapter on three tasks: accuracy against how many numbers are trained.

Claim:    A few per cent of a network's parameters, or less, adapt it nearly as well as
          all of them; a linear probe does not.
Cite:     He et al., 2021, "Towards a Unified View of Parameter-Efficient Transfer
          Learning", https://arxiv.org/abs/2110.04366, Figure 1; each method's paper.
Command:  python experiments/adapters_table.py
Device:   CPU, 2 cores. Minutes: 50; --smoke: a quarter.
Expected: of 47 methods 28 are within two points of all of the layers (29.6 %) or above.
          LoRA of rank 1 (3 % of the numbers): +1.0 ± 3.3, and +8.1 ± 5.7 against a
          linear probe (22.5 %); all of the layers +7.1 ± 6.3.

A transformer of two layers is trained on MNIST and part of Fashion-MNIST together,
then adapted to hand signs, photos of clothes, and the alphabets of Omniglot, with a new
head. All matrices of the layers are adapted, but where a method is for others. Settings
are the papers' usual ones at this size and were not searched; the learning rate is one
of three, chosen on held-out training images. Seeds train side by side under `vmap`.
LoRA-GA is left out: below a head of zeros the first gradient is zero. (A first record,
seen before, is of 80 steps and two rates, which was too little for most.)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.progress import track

from jaxlab import data, experiment, figures, lowrank, measure, tree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "adapters_table.png"
ALL, OUT = "layers/**/kernel", "layers/*/out/kernel"
STARTS = {"corda", "eva"}  # from the inputs of each layer
one = lambda adapter, where=ALL: {where: adapter}
METHODS: dict[str, Any] = {
    "linear probe": {},
    "all of the layers": one(lowrank.full(), "layers/**"),
    "biases (BitFit)": one(lowrank.full(), "layers/**/bias"),
    "norms (LN tuning)": one(lowrank.full(), "layers/norm_*/*"),
    **{
        name: one(adapter)
        for name, adapter in {
            "lora": lowrank.lora(rank=4, alpha=8),
            "lora, r=1": lowrank.lora(rank=1, alpha=2),
            "rslora": lowrank.lora(rank=4, alpha=4, rslora=True),
            "lora-fa": lowrank.lora(rank=4, alpha=8, frozen_a=True),
            "dora": lowrank.dora(rank=4, alpha=8),
            "pissa": lowrank.pissa(rank=4),
            "olora": lowrank.olora(rank=4),
            "mica": lowrank.mica(rank=4, alpha=8),
            "eva": lowrank.eva(rank=4),
            "corda": lowrank.corda(rank=4),
            "kasa": lowrank.kasa(rank=4, alpha=8),
            "adalora": lowrank.adalora(rank=4, alpha=8),
            "hydra": lowrank.hydra(rank=2, sequential_rank=2),
            "wara": lowrank.wara(rank=2),
            "bone": lowrank.bone(block=4),
            "miss": lowrank.miss(rank=4),
            "sara": lowrank.sara(density=0.05),
            "shira": lowrank.shira(rank=2),
            "tlora": lowrank.tlora(rank=2, transform_rank=2),
            "orthogonal_adaptation": lowrank.orthogonal_adaptation(rank=4, concept=0),
            "mask_tuning": lowrank.mask_tuning(),
            "loha": lowrank.loha(rank=2, alpha=4),
            "lokr": lowrank.lokr(rank=4, factor=8),
            "vera": lowrank.vera(rank=32),
            "vblora": lowrank.vblora(rank=4, num_vectors=64, vector_length=48),
            "randlora": lowrank.randlora(rank=8),
            "fourierft": lowrank.fourierft(frequencies=200),
            "waveft": lowrank.waveft(frequencies=200),
            "oft": lowrank.oft(block_size=8),
            "boft": lowrank.boft(block_size=4, factors=2),
            "hra": lowrank.hra(rank=4),
            "ia3": lowrank.ia3(),
            "c3a": lowrank.c3a(block=16),
            "road": lowrank.road(group=16),
            "delora": lowrank.delora(rank=4),
            "gralora": lowrank.gralora(rank=4),
            "hira": lowrank.hira(rank=4),
            "tinylora": lowrank.tinylora(size=64),
            "psoft": lowrank.psoft(rank=16),
            "unilora": lowrank.unilora(rank=4, size=1024),
            "osf": lowrank.osf(),
        }.items()
    },
    "bottleneck": one(lowrank.bottleneck(rank=8), "layers/down/kernel"),
    "scaled_parallel": one(lowrank.scaled_parallel(rank=8), "layers/up/kernel"),
    "compacter": one(lowrank.compacter(rank=8, divisions=4), "layers/down/kernel"),
    "hyperformer": one(
        lowrank.hyperformer(rank=4, embedding=8, hidden=16, projected=8),
        "layers/down/kernel",
    ),
}


@dataclass(frozen=True)
class Config:
    """The base, the tasks, and the budget of adapting."""

    base: tuple[str, ...] = ("mnist", "fashion")
    tasks: tuple[str, ...] = ("signs", "clothing", "omniglot")
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 3
    width: int = 48
    depth: int = 2
    patch: int = 7
    base_steps: int = 600
    steps: int = 150
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    smoke: bool = False


SMOKE = {
    "base": ("digits",),
    "tasks": ("digits/rotate90",),
    "methods": ("linear probe", "eva"),
    "seeds": 1,
    "width": 16,
    "patch": 4,
    "base_steps": 10,
    "steps": 5,
    "rates": (1e-2,),
}


def run(config: Config) -> dict[str, float]:
    """Accuracies and sizes of all methods, and differences to LoRA and the probe."""
    keys = jax.random.split(jax.random.key(0), config.seeds)
    sizes = {"width": config.width, "depth": config.depth, "patch": config.patch}
    apply, bases = experiment.pretrained(
        config.base, keys=keys, steps=config.base_steps, **sizes
    )
    tasks = {name: data.load(name) for name in config.tasks}
    size = {"steps": config.steps, "rates": config.rates, "keys": keys}
    found, trained = {}, {}
    for method in track(config.methods, "methods"):
        for name, task in tasks.items():
            known = grams(apply, bases, task) if method in STARTS else None
            out = experiment.adaptation(
                apply, bases, METHODS[method], task, statistics=known, **size
            )
            found[method, name], trained[method] = out.accuracies, out.trained
    means = {m: np.mean([found[m, t] for t in tasks], 0) for m in config.methods}
    if not config.smoke:
        figures.save(draw(config, means, trained), PICTURE)
    metrics = {f"{m}, {t}": float(v.mean()) for (m, t), v in found.items()}
    metrics |= {f"{m}: trained": trained[m] for m in config.methods}
    for method in config.methods:
        for other in {"linear probe", "all of the layers"} & set(config.methods):
            change = means[method] - means[other]
            metrics |= experiment.measured(f"{method} minus {other}", change)
    return metrics


def grams(apply: Any, bases: Any, task: data.Dataset) -> Any:
    """The Gram matrices of each layer's inputs, for each base."""
    where = tree.glob(ALL)
    of = lambda base: measure.gram(apply, base, task.train.x[:256], where=where)
    return tree.stack([of(base) for base in tree.unstack(bases)])


def draw(config: Config, means: Any, trained: dict[str, int]) -> "Figure":
    """Accuracy against trained numbers, a dot per method."""
    fig, ax = figures.figure(10, 6.5)
    y = {m: experiment.interval(100 * v) for m, v in means.items()}
    total = trained["all of the layers"]
    few = [m for m in y if 0 < trained[m] <= total / 8]
    gap, free = 0.022 * np.ptp([mean for mean, _ in y.values()]), {}
    for method, (mean, half) in sorted(y.items(), key=lambda item: item[1]):
        x = max(trained[method], 60)
        look = {"color": figures.COLOURS[0 if method in few else 1], "ms": 4}
        ax.errorbar(
            x, mean, half, fmt="o", ecolor=figures.FAINT, elinewidth=0.4, **look
        )
        column = round(6 * np.log10(x))  # one above the other, where they would meet
        free[column] = max(mean, free.get(column, 0) + gap)
        ax.text(1.05 * x, free[column], method, fontsize=6.5)
    for other in ("linear probe", "all of the layers"):
        ax.axhline(y[other][0], color=figures.FAINT, lw=1, zorder=0)
    ax.set_xscale("log")
    ax.set_xlabel("trained numbers, the head's left out (the linear probe has none)")
    ax.set_ylabel("accuracy, mean of three tasks, %")
    best = max(few, key=lambda m: y[m][0])
    figures.headline(
        fig,
        f"With at most an eighth of the layers' {total:,} numbers, {best} reaches "
        f"{y[best][0]:.1f} % ({trained[best]:,} numbers); all of them "
        f"{y['all of the layers'][0]:.1f} %, a linear probe "
        f"{y['linear probe'][0]:.1f} %",
        f"Tasks: {', '.join(config.tasks)}; 95 % intervals over {config.seeds} seeds.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
