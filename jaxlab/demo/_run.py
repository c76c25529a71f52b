"""The run of the demo, from training to the finished folder."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
import dataclasses as dc
import functools as ft
import json
from pathlib import Path
import time

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from .. import io, tree
from ..types import Apply, Params
from . import _figures, _measure, _model, _page, _publish, _recipes, _tasks, _train
from ._results import Results

STEPS = np.linspace(0, 2, 17)  # of the way from the base to a merge


@dc.dataclass(frozen=True)
class Settings:
    """The sizes of the demo; the defaults are what `jaxlab demo` runs."""

    width: int = 256
    base_steps: int = 1000
    expert_steps: int = 300
    rate: float = 1e-3
    methods: tuple[str, ...] = (*_recipes.METHODS, "slerp")


def phases(settings: Settings = Settings()) -> int:
    """How many phases `run` announces."""
    return 3 + len(settings.methods)


def run(
    out: Path | str = "demo",
    *,
    seed: int = 0,
    settings: Settings = Settings(),
    say: Callable[[str], object] = lambda _: None,
) -> Results:
    """Runs the demo and writes it into a folder that appears whole or not at all.

    Args:
      out: the folder; an earlier demo in it is replaced once the new one is complete.
      seed: of the split, the training and the merges.
      settings: the sizes.
      say: called with the name of each phase as it begins.

    Returns:
      What was found: accuracies, interpolation paths, sign conflicts.

    Raises:
      ValueError: `out` holds something that is not a demo, or an unknown method.
    """
    recipes = _recipes.recipes(list(_tasks.SHIFTS))
    for method in settings.methods:
        if method not in recipes:
            raise ValueError(f"no method {method!r}; there are {', '.join(recipes)}")
    with _publish.replacing(Path(out)) as folder:
        seconds: dict[str, float] = {}
        clock = ft.partial(_timed, say=say, seconds=seconds)
        with clock("train the base and four experts"):
            tasks = _tasks.load(seed=seed)
            apply, base, experts = _fit(tasks, settings, seed)
            _save(folder, base, experts)
        merged = {}
        for method in settings.methods:
            with clock(f"merge: {method}"):
                merged[method] = _merge(folder, method, recipes[method], base, seed)
        with clock("evaluate every model on every task"):
            results = _results(tasks, apply, base, experts, merged, recipes, seed)
        with clock("draw the figures"):
            figures = _figures.draw(results, folder)
        results = results._replace(seconds=seconds)
        _write(folder, results, settings)
        _page.write(results, figures, folder / "index.html")
    return results


@contextmanager
def _timed(
    phase: str, say: Callable[[str], object], seconds: dict[str, float]
) -> Iterator[None]:
    """Announces a phase and notes how long it took."""
    say(phase)
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _fit(
    tasks: Mapping[str, _tasks.Task], settings: Settings, seed: int
) -> tuple[Apply, Params, dict[str, Params]]:
    """Trains the base on the plain digits and an expert on each shift of them."""
    apply, start = _model.init(width=settings.width, seed=seed)
    one, many = jax.random.split(jax.random.key(seed))
    how = {"apply": apply, "rate": settings.rate}
    plain = tasks["plain"]
    base = _train.train(
        start, plain.x_train, plain.y_train, steps=settings.base_steps, key=one, **how
    )
    x = np.stack([tasks[name].x_train for name in _tasks.SHIFTS])
    experts = _train.finetune(
        base, x, plain.y_train, steps=settings.expert_steps, key=many, **how
    )
    return apply, base, dict(zip(_tasks.SHIFTS, tree.unstack(experts), strict=True))


def _save(folder: Path, base: Params, experts: Mapping[str, Params]) -> None:
    (folder / "experts").mkdir()
    io.save(folder / _recipes.BASE, base, format="safetensors")
    for name, params in experts.items():
        io.save(folder / "experts" / name, params, format="safetensors")


def _merge(folder: Path, method: str, text: str, like: Params, seed: int) -> Params:
    """Writes the recipe, merges by it as `jaxlab merge` does, loads the result."""
    file = folder / "recipes" / f"{method}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    out = folder / "merged" / method
    out.parent.mkdir(exist_ok=True)
    with chdir(file.parent):  # a model is looked up from here before anywhere else
        io.merge(file.name, out.absolute(), seed=seed)
    return io.load(out, like=like)


def _results(
    tasks: Mapping[str, _tasks.Task],
    apply: Apply,
    base: Params,
    experts: Mapping[str, Params],
    merged: Mapping[str, Params],
    recipes: Mapping[str, str],
    seed: int,
) -> Results:
    """Evaluates every model, and the models between the base and each merge."""
    x = np.stack([task.x_test for task in tasks.values()])
    y = tasks["plain"].y_test
    score = lambda models: np.asarray(_measure.accuracy(models, x, y, apply=apply))
    models = {"base": base, **experts, **merged}
    table = score(tree.stack(list(models.values())))
    accuracy = dict(zip(models, table, strict=True))
    best = sorted(merged, key=lambda m: -accuracy[m].mean())
    steps = jnp.asarray(STEPS, jnp.float32)
    deltas = [tree.subtract(expert, base) for expert in experts.values()]
    first = [int(np.argmax(y == digit)) for digit in range(10)]
    return Results(
        tasks=list(tasks),
        experts=list(experts),
        accuracy={m: accuracy[m] for m in ("base", *experts, *best)},
        recipes={m: recipes[m] for m in best},
        steps=STEPS,
        paths={m: score(_measure.between(base, merged[m], steps)) for m in best},
        conflicts=_measure.conflicts(tree.stack(deltas)),
        samples=x[:, first].reshape(len(tasks), 10, 8, 8),
        tested=len(y),
        seed=seed,
        seconds={},
    )


def _write(folder: Path, results: Results, settings: Settings) -> None:
    """The numbers, for programs; the file also marks the folder as a demo."""
    numbers = {
        "made_by": _publish.MARK,
        "seed": results.seed,
        "settings": dc.asdict(settings),
        "tasks": results.tasks,
        "tested": results.tested,
        "accuracy": {m: a.tolist() for m, a in results.accuracy.items()},
        "seconds": results.seconds,
        "recipes": {m: yaml.safe_load(t) for m, t in results.recipes.items()},
    }
    text = json.dumps(numbers, indent=1, allow_nan=False)
    (folder / _publish.FILE).write_text(text + "\n")
