"""The value of an option, which may depend on the tensor and on the depth."""

from collections.abc import Callable, Mapping, Sequence
import functools as ft
import math
from typing import Any

import numpy as np

from ..tree import glob
from ._names import to_path
from ._node import Node, fault, mapping, said, sequence

ABSENT: Any = object()
"""What an option without a matching case is."""

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "density": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "gamma": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "epsilon": (lambda x: x >= 0, "at least 0"),
    "threshold": (lambda x: x >= 0, "at least 0"),
    "eps": (lambda x: x >= 0, "at least 0"),
    "tol": (lambda x: x > 0, "above 0"),
    "max_iter": (lambda x: x >= 0 and x == int(x), "a whole number, at least 0"),
}


def in_range(name: str, value: float, node: Node, what: str | None = None) -> None:
    """Raises where a number cannot be a value of the option."""
    test, words = _RANGES.get(name, (math.isfinite, "finite"))
    if not (math.isfinite(value) and test(value)):
        raise fault(node, f"{what or repr(name)} has to be {words}, got {value:g}")


def read(name: str, node: Node, *, flag: bool) -> Any:
    """The plain value of an option, checked: `flag` says that it is true or false."""
    if isinstance(node.value, list):
        return [read(name, item, flag=flag) for item in sequence(node, f"{name!r}")]
    if isinstance(node.value, dict) and "gradient" in node.value:
        entries = mapping(node, f"{name!r}", ("gradient",))
        points = sequence(entries["gradient"], "'gradient'")
        if any(isinstance(p.value, (list, dict)) or p.value is None for p in points):
            raise fault(node, "a gradient is a list of plain values")
        return {"gradient": [read(name, p, flag=flag) for p in points]}
    if isinstance(node.value, dict):
        entries = mapping(node, f"{name!r}", ("where", "else"))
        if "where" not in entries:
            raise fault(node, f"{name!r} needs 'where' or 'gradient'")
        cases = mapping(entries["where"], "'where'")
        value = {"where": {k: read(name, v, flag=flag) for k, v in cases.items()}}
        rest = {k: v for k, v in entries.items() if k == "else"}
        return value | {k: read(name, v, flag=flag) for k, v in rest.items()}
    return _plain(name, node, flag)


def _plain(name: str, node: Node, flag: bool) -> Any:
    """A value that holds no others."""
    value = node.value
    if value is not None and isinstance(value, bool) != flag:
        due = "true or false" if flag else "no boolean"
        raise fault(node, f"{name!r} has to be {due}, got {said(node)}")
    if isinstance(value, (int, float)) and not flag:
        in_range(name, float(value), node)
        return int(value) if name == "max_iter" else value
    return value


def evaluate(value: Any, name: str, inputs: Sequence[str], t: float) -> Any:
    """The value for one output tensor: plain, or a list of one per model.

    A value of one model is matched by the name of that model's own tensor, any other
    by the name of the output. `t` is the depth in the slice, in [0, 1].
    """
    if isinstance(value, list):
        if len(value) != len(inputs):
            raise ValueError(f"{len(value)} values for {len(inputs)} models")
        return [evaluate(v, n, (), t) for v, n in zip(value, inputs, strict=True)]
    if not isinstance(value, Mapping):
        return value
    if "gradient" in value:
        return _along(value["gradient"], t)
    path = to_path(name)
    for globs, case in value["where"].items():
        if _matcher(globs)(path, None):
            return evaluate(case, name, inputs, t)
    return evaluate(value["else"], name, inputs, t) if "else" in value else ABSENT


def bound(value: Any) -> Any:
    """An evaluated value as a method takes it: numbers in float64."""
    if isinstance(value, list):
        if all(v == value[0] and isinstance(v, (bool, str)) for v in value):
            return value[0]
        return np.array(value, np.float64)
    return np.float64(value) if isinstance(value, float) else value


def _along(points: Sequence[Any], t: float) -> Any:
    """Interpolates numbers; picks among anything else."""
    at = t * (len(points) - 1)
    if any(isinstance(p, (bool, str)) for p in points):
        return points[int(at)]
    low = int(at)
    high = min(low + 1, len(points) - 1)
    return float((1 - (at - low)) * points[low] + (at - low) * points[high])


@ft.lru_cache(maxsize=1024)
def _matcher(globs: str) -> Callable[[str, Any], bool]:
    return glob(*(g.strip() for g in globs.split(" | ")))
