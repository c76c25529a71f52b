"""The frame of an experiment: command line, smoke run, record, interval."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
import json
import math
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

Metrics = dict[str, float]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The mean of a sample and the half-width of its 95 % confidence interval.

    Args:
      values: one number per seed.

    Returns:
      `(mean, half-width)`, by Student's t.

    Degenerate inputs:
      One value: a half-width of infinity. None: nan.

    Example:
      >>> mean, half = interval([1.0, 2.0, 3.0])
      >>> mean, round(half, 2)
      (2.0, 2.48)
    """
    from scipy import stats

    x = np.array(list(values), np.float64)
    if x.size < 2:
        return (float(x.mean()) if x.size else math.nan), math.inf
    spread = float(x.std(ddof=1)) / math.sqrt(x.size)
    return float(x.mean()), float(stats.t.ppf(0.975, x.size - 1)) * spread


def main(
    config: Any, run: Callable[[Any], Metrics], *, smoke: dict[str, Any], file: str
) -> Metrics:
    """Runs an experiment from its command line and records what it measured.

    `--smoke` replaces fields of the configuration by small ones and records nothing.
    Otherwise one JSON line is appended to `results/<name>.jsonl` beside the file:
    configuration, metrics, commit, jax, device, seconds and date.

    Args:
      config: the frozen dataclass of the experiment, to be read from the command line.
      run: measures; metrics by name. It draws its own figure unless `config.smoke`.
      smoke: the fields of the configuration that a smoke run replaces.
      file: `__file__` of the experiment.

    Returns:
      The metrics.

    Raises:
      SystemExit: a metric is not finite.
    """
    from rich.console import Console
    import tyro

    given = tyro.cli(config)
    if given.smoke:
        given = replace(given, **smoke)
    start = time.perf_counter()
    metrics = {name: float(value) for name, value in run(given).items()}
    console = Console()
    for name, value in metrics.items():
        console.print(f"{name:56} {value:.4g}", highlight=False)
    if not given.smoke:
        _record(Path(file), given, metrics, time.perf_counter() - start)
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        sys.exit(f"not finite: {', '.join(wrong)}")
    return metrics


def _record(file: Path, config: Any, metrics: Metrics, seconds: float) -> None:
    """Appends one line to `results/<name>.jsonl` beside the experiment."""
    head = ["git", "rev-parse", "--short", "HEAD"]
    git = subprocess.run(
        head, capture_output=True, text=True, cwd=file.parent, check=False
    )
    line = {
        "metrics": metrics,
        "config": asdict(config),
        "git": git.stdout.strip(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = file.parent / "results" / f"{file.stem}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(line, default=str) + "\n")
