"""The nodes of a recipe: plain values that know where they stand, and typed reading."""

from collections.abc import Collection, Mapping
import difflib
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

from ._errors import FormatError, show

MAX_DEPTH = 64
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Mark(NamedTuple):
    """Where a value stands: line and column count from 1, 0 if there is no file."""

    file: str
    line: int
    column: int


class Node(NamedTuple):
    """A value and where it stands; containers hold nodes."""

    value: Any
    mark: Mark
    size: int = 1
    keys: Mapping[str, Mark] = {}


def fault(at: Node | Mark, why: str) -> FormatError:
    """The error at one place of a recipe."""
    mark = at.mark if isinstance(at, Node) else at
    place = f":{mark.line}:{mark.column}" if mark.line else ""
    return FormatError(f"{mark.file}{place}: {why}")


def nodes(value: Any, file: str = "recipe") -> Node:
    """Nodes of a plain Python value, for recipes that never were a file."""
    mark = Mark(file, 0, 0)
    return _wrap(value, mark, 0)


def plain(node: Node) -> Any:
    """The plain Python value of a node."""
    if isinstance(node.value, dict):
        return {k: plain(v) for k, v in node.value.items()}
    if isinstance(node.value, list):
        return [plain(v) for v in node.value]
    return node.value


def number(text: str) -> float | None:
    """The finite number that a quoted text spells, or None."""
    value = float(text) if FLOAT.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def mapping(node: Node, what: str, keys: Collection[str] | None = None) -> Any:
    """The entries of a mapping; a key outside `keys` is an error that names it."""
    if not isinstance(node.value, dict):
        raise fault(node, f"{what} has to be a mapping, got {said(node)}")
    for key in node.value:
        if keys is not None and key not in keys:
            raise fault(
                node.keys[key], f"{what}: no key {show(key)}{nearest(key, keys)}"
            )
    return node.value


def sequence(node: Node, what: str) -> list[Node]:
    """The items of a list that is not empty."""
    if not isinstance(node.value, list) or not node.value:
        raise fault(node, f"{what} has to be a list of at least one, got {said(node)}")
    return node.value


def text(node: Node, what: str) -> str:
    """A text that is not empty."""
    if not isinstance(node.value, str) or not node.value:
        hint = "; quote it if it is text" if isinstance(node.value, bool) else ""
        raise fault(node, f"{what} has to be text, got {said(node)}{hint}")
    return node.value


def boolean(node: Node, what: str) -> bool:
    """True or false."""
    if not isinstance(node.value, bool):
        raise fault(node, f"{what} has to be true or false, got {said(node)}")
    return node.value


def real(node: Node, what: str) -> float:
    """A finite number, also where it is quoted; never a boolean."""
    value = number(node.value) if isinstance(node.value, str) else node.value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fault(node, f"{what} has to be a finite number, got {said(node)}")
    return float(value)


def integer(node: Node, what: str) -> int:
    """A whole number."""
    value = real(node, what)
    if value != int(value):
        raise fault(node, f"{what} has to be a whole number, got {said(node)}")
    return int(value)


def said(node: Node) -> str:
    """A value in the words of an error."""
    kinds = {dict: "a mapping", list: "a list", bool: "the boolean ", str: ""}
    kind = type(node.value)
    if kind in (dict, list):
        return kinds[kind] if node.value else f"{kinds[kind]} without entries"
    return (
        "nothing" if node.value is None else f"{kinds.get(kind, '')}{show(node.value)}"
    )


def nearest(name: str, known: Collection[str]) -> str:
    """What an error appends: the known name that is nearest, or all of them."""
    close = difflib.get_close_matches(name[:80], known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it has {', '.join(sorted(known))}" if known else ""


def _wrap(value: Any, mark: Mark, depth: int) -> Node:
    if depth > MAX_DEPTH:
        raise fault(mark, f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        items = {str(k): _wrap(v, mark, depth + 1) for k, v in value.items()}
        return Node(items, mark, keys=dict.fromkeys(items, mark))
    if isinstance(value, (list, tuple)):
        return Node([_wrap(v, mark, depth + 1) for v in value], mark)
    if value is None or isinstance(value, (bool, int, str, Path)):
        return Node(str(value) if isinstance(value, Path) else value, mark)
    if isinstance(value, float) and math.isfinite(value):
        return Node(float(value), mark)
    raise fault(mark, f"{show(value)} is not a value a recipe may hold")
