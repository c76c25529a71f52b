"""The memory of merging models that arrive one by one.

Claim:    `opcm_step` needs as much memory for the 48th model as for the sixth; `opcm`
          of all models at once needs a model's size more for each.
Cite:     Tang et al., 2025, "Merging Models on the Fly Without Retraining",
          https://arxiv.org/abs/2501.09522: constant memory in the number of models.
Command:  python experiments/bench/opcm_memory.py
Device:   CPU, 1 core. Minutes: 4; --smoke: a quarter.
Expected: 0.00 models more for each model one by one (138 MB for 48 models of 17 MB, 137
          for 6), within 0.03; all at once 2.0, within 0.2.

Every count of models is a process of its own. Its checkpoints are on disk; one process
loads and merges them in turn, the other loads all and merges the stack. The peak is the
process's anonymous memory, sampled every 5 ms, less what it holds after a first tiny
decomposition; compiling counts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
import subprocess
import sys
import tempfile
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import experiment, figures, io, merge, rewrite, tree

NAME = Path(__file__).parents[1] / "opcm_memory.py"  # results are one folder up
PICTURE = NAME.parent / "results" / "opcm_memory.png"
KINDS = ("one by one", "all at once")


@dataclass(frozen=True)
class Config:
    """The size of the models, and how many there are."""

    leaves: int = 4
    rows: int = 8192
    columns: int = 128
    counts: tuple[int, ...] = (6, 12, 24, 48)
    smoke: bool = False


SMOKE = {"leaves": 1, "rows": 256, "columns": 64, "counts": (2, 4)}


def run(config: Config) -> dict[str, float]:
    """Peaks by kind and count, their slopes, and what the step's program needs."""
    model = shapes(config)
    size = sum(x.size * x.dtype.itemsize for x in model.values())
    with tempfile.TemporaryDirectory() as folder:
        for i in range(max(config.counts)):
            make(config, i, Path(folder))
        cases = [(kind, k) for kind in KINDS for k in config.counts]
        peaks = {c: measured_apart(*c, folder) for c in track(cases, "cases")}
    metrics = {f"{kind}: {k} models, MB": v / 1e6 for (kind, k), v in peaks.items()}
    for kind in KINDS:
        values = [peaks[kind, k] / size for k in config.counts]
        slope = np.polyfit(config.counts, values, 1)[0]
        metrics[f"{kind}: growth per model, in models"] = float(slope)
    state = jax.eval_shape(merge.opcm_init, model)
    step: Any = jax.jit(merge.opcm_step).lower(state, model).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    metrics["step, temporary in XLA, in models"] = temporary / size
    live = rewrite.live_bytes(merge.opcm_step, state, model)
    metrics["step, live_bytes, in models"] = live / size
    metrics["model, MB"] = size / 1e6
    if not config.smoke:
        draw(config, metrics)
    return metrics


def shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of a task vector."""
    one = jax.ShapeDtypeStruct((config.rows, config.columns), jnp.float32)
    return {f"layer_{i}": one for i in range(config.leaves)}


def make(config: Config, i: int, folder: Path) -> None:
    """Writes one task vector."""
    draw = np.random.default_rng(i).standard_normal
    leaves = {n: draw(x.shape, np.float32) for n, x in shapes(config).items()}
    io.save(folder / f"{i}.safetensors", leaves)


def measured_apart(kind: str, count: int, folder: str) -> int:
    """The peak of one case, in a process of its own."""
    command = [sys.executable, __file__, kind, str(count), folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(kind: str, count: str, folder: str) -> int:
    """The peak of merging, in this process."""
    paths = [Path(folder) / f"{i}.safetensors" for i in range(int(count))]
    merged = one_by_one if kind == KINDS[0] else all_at_once
    jax.block_until_ready(jnp.linalg.svd(jnp.ones((8, 8))))
    with peak() as found:
        jax.block_until_ready(merged(paths))
    return found[0]


def one_by_one(paths: list[Path]) -> Any:
    """Each model is loaded, merged and dropped."""
    state, step = None, jax.jit(merge.opcm_step, donate_argnums=0)
    for path in paths:
        model = io.load(path)
        state = step(merge.opcm_init(model) if state is None else state, model)
        jax.block_until_ready(state)
    return state


def all_at_once(paths: list[Path]) -> Any:
    """All models are loaded first."""
    return jax.jit(merge.opcm)(tree.stack([io.load(path) for path in paths]))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most anonymous memory above that at the start, in a list of one."""
    start = anonymous()
    found, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def anonymous() -> int:
    """This process's anonymous memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) * 1024


def draw(config: Config, metrics: dict[str, float]) -> None:
    """The peaks by the number of models."""
    fig, ax = figures.figure(6.5, 3.8)
    for kind, colour in zip(KINDS, figures.COLOURS, strict=False):
        values = [metrics[f"{kind}: {k} models, MB"] for k in config.counts]
        ax.plot(config.counts, values, "o-", color=colour, label=kind)
    ax.set_xticks(config.counts)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("models merged", size=9)
    ax.set_ylabel("peak memory, MB", size=9)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    ax.grid(axis="y", color=figures.FAINT, linewidth=0.5, alpha=0.6)
    slopes = [metrics[f"{kind}: growth per model, in models"] for kind in KINDS]
    figures.headline(
        fig,
        f"Each further model adds {slopes[0]:.2f} models of memory one by one, and "
        f"{slopes[1]:.1f} all at once",
        f"OPCM of models of {metrics['model, MB']:.0f} MB, each count in a process of "
        f"its own: anonymous memory above that of the bare runtime.",
    )
    figures.save(fig, PICTURE)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in KINDS:  # one case, in this process
        print(measure(*sys.argv[1:]))
    else:
        experiment.main(Config, run, smoke=SMOKE, file=str(NAME))
