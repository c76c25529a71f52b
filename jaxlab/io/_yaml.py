"""YAML as recipes need it: one plain document, bounded, and nothing to guess.

PyYAML only splits the text into events here; the values are built from those by our own
rules, which refuse what YAML 1.1 reads in a surprising way (`010` is 8, `1:30` is 90).
"""

from collections.abc import Iterator
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

import yaml

from ._errors import show
from ._node import FLOAT, MAX_DEPTH, Mark, Node, fault

MAX_BYTES = 1_000_000
MAX_NODES = 10_000

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "yes", "on"})
_FALSE = frozenset({"false", "no", "off"})
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_SURPRISE = re.compile(
    r"[-+]?(0[0-9]+|0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+"
    r"|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?"
    r"|\.(nan|NaN|NAN)|\.(inf|Inf|INF))"
)


def read(path: Path | str) -> Node:
    """The one document of a file, refused beyond `MAX_BYTES` before it is read."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    return parse(data, str(path))


def parse(text: bytes | str, file: str = "recipe") -> Node:
    """The one document of a text, as nodes."""
    data = text.encode() if isinstance(text, str) else text
    start = Mark(file, 1, 1)
    if len(data) > MAX_BYTES:
        raise fault(start, f"a recipe may have at most {MAX_BYTES} bytes")
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise fault(start, f"not UTF-8 at byte {e.start}") from None
    try:
        return _document(yaml.parse(decoded, Loader=yaml.SafeLoader), file)
    except yaml.reader.ReaderError as e:
        raise fault(start, f"character #{e.character:#x} is not allowed") from None
    except yaml.MarkedYAMLError as e:
        mark = _mark(e.problem_mark or e.context_mark, file)
        raise fault(mark, " ".join(filter(None, [e.context, e.problem]))) from None
    except RecursionError:
        raise fault(start, f"nested deeper than {MAX_DEPTH}") from None


def scalar(text: str, mark: Mark) -> Any:
    """The value of a plain (unquoted) scalar."""
    if text in _NULL:
        return None
    if text.lower() in _TRUE | _FALSE and text in (
        text.lower(),
        text.upper(),
        text.capitalize(),
    ):
        return text.lower() in _TRUE
    if _SURPRISE.fullmatch(text):
        raise fault(
            mark,
            f"{show(text)} is not what it seems in YAML 1.1: write a plain finite "
            "decimal number, or quote it if it is text",
        )
    if _INT.fullmatch(text):
        return int(text)
    if FLOAT.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise fault(mark, f"{show(text)} is beyond the range of a number")
        return number
    return text


class _State(NamedTuple):
    """What building one document needs: the events, the anchors, a running count."""

    events: Iterator[Any]
    file: str
    anchors: dict[str, Node | None]
    count: list[int]


def _document(events: Iterator[Any], file: str) -> Node:
    """Builds the only document of the stream."""
    state = _State(events, file, {}, [0])
    next(events)  # the start of the stream
    first = next(events)
    if isinstance(first, yaml.StreamEndEvent):
        raise fault(Mark(file, 1, 1), "empty: a recipe is a mapping")
    node = _build(state, next(events), 0)
    next(events)  # the end of the document
    after = next(events)
    if not isinstance(after, yaml.StreamEndEvent):
        raise fault(_mark(after.start_mark, file), "a second document: one is allowed")
    return node


def _build(state: _State, event: Any, depth: int) -> Node:
    """The node that starts with `event`."""
    mark = _mark(event.start_mark, state.file)
    if depth > MAX_DEPTH:
        raise fault(mark, f"nested deeper than {MAX_DEPTH}")
    if isinstance(event, yaml.AliasEvent):
        return _alias(state, event.anchor, mark, depth)
    if event.tag is not None:
        raise fault(mark, f"tag {show(event.tag)}: a recipe has no tags")
    if event.anchor is not None:
        if event.anchor in state.anchors:
            raise fault(mark, f"anchor {show(event.anchor)} is defined twice")
        state.anchors[event.anchor] = None
    _spend(state, 1, mark)
    if isinstance(event, yaml.ScalarEvent):
        value = scalar(event.value, mark) if event.implicit[0] else event.value
        node = Node(value, mark)
    elif isinstance(event, yaml.SequenceStartEvent):
        node = _sequence(state, mark, depth)
    else:
        node = _mapping(state, mark, depth)
    if event.anchor is not None:
        state.anchors[event.anchor] = node
    return node


def _alias(state: _State, name: str, mark: Mark, depth: int) -> Node:
    """The anchored node, paid for as if it were written out."""
    node = state.anchors.get(name)
    if node is None:
        known = name in state.anchors
        why = "refers to itself" if known else "has no anchor before it"
        raise fault(mark, f"alias {show(name)} {why}")
    _spend(state, node.size, mark)
    if depth + _height(node) > MAX_DEPTH:
        raise fault(mark, f"nested deeper than {MAX_DEPTH}")
    return node


def _sequence(state: _State, mark: Mark, depth: int) -> Node:
    items = []
    for event in state.events:
        if isinstance(event, yaml.SequenceEndEvent):
            break
        items.append(_build(state, event, depth + 1))
    return Node(items, mark, 1 + sum(n.size for n in items))


def _mapping(state: _State, mark: Mark, depth: int) -> Node:
    items: dict[str, Node] = {}
    keys: dict[str, Mark] = {}
    merged: dict[str, tuple[Mark, Node]] = {}
    size = 1
    for event in state.events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        at = _mark(event.start_mark, state.file)
        key = _key(state, event, at, depth)
        value = _build(state, next(state.events), depth + 1)
        size += 1 + value.size
        if key == "<<" and event.implicit[0]:
            merged = _merge(value, merged)
        elif key in items:
            line = keys[key].line
            raise fault(at, f"key {show(key)} is there twice (first on line {line})")
        else:
            items[key], keys[key] = value, at
    for key, (at, value) in merged.items():
        if key not in items:
            items[key], keys[key] = value, at
    return Node(items, mark, size, keys)


def _key(state: _State, event: Any, mark: Mark, depth: int) -> str:
    """A key: text, also where YAML would read it as a number or a boolean."""
    if isinstance(event, yaml.ScalarEvent) and event.tag is None:
        _spend(state, 1, mark)
        if event.anchor is not None:
            state.anchors[event.anchor] = Node(event.value, mark)
        return event.value
    if isinstance(event, yaml.AliasEvent):
        node = _alias(state, event.anchor, mark, depth)
        if isinstance(node.value, str):
            return node.value
    raise fault(mark, "a key has to be plain text")


def _merge(value: Node, merged: dict[str, Any]) -> dict[str, Any]:
    """What `<<` brings in: one mapping or a list of them, the first one wins."""
    sources = value.value if isinstance(value.value, list) else [value]
    for node in sources:
        if not isinstance(node.value, dict):
            raise fault(value, "'<<' takes a mapping or a list of mappings")
        for key, item in node.value.items():
            merged.setdefault(key, (node.keys[key], item))
    return merged


def _spend(state: _State, n: int, mark: Mark) -> None:
    state.count[0] += n
    if state.count[0] > MAX_NODES:
        raise fault(mark, f"more than {MAX_NODES} values, aliases written out")


def _height(node: Node) -> int:
    inner = node.value.values() if isinstance(node.value, dict) else node.value
    if not isinstance(node.value, (dict, list)) or not inner:
        return 0
    return 1 + max(_height(n) for n in inner)


def _mark(mark: Any, file: str) -> Mark:
    return Mark(file, mark.line + 1, mark.column + 1) if mark else Mark(file, 1, 1)
