"""A strict walk over msgpack as Flax uses it: it steps over arrays, reading none.

Known are maps with text keys, lists, numbers, and Flax's three extension types.
"""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import struct
from typing import Any, NamedTuple

import numpy as np

from ._dtypes import DTYPES
from ._errors import FormatError, refuse, show

NDARRAY, COMPLEX, SCALAR = 1, 2, 3
NAMED = {d.name: d for d in DTYPES.values()} | {"complex128": np.dtype("complex128")}

_DEPTH = 80  # our own names nest 64 deep, and chunks a little deeper
_NODES = 1_000_000
_TEXT = 100_000_000  # bytes of all keys and texts together
_WINDOW = 2**16
_RANK = 64
_LENGTHS = {
    **{0xC4 + i: ("bin", "BHI"[i]) for i in range(3)},
    **{0xC7 + i: ("ext", "BHI"[i]) for i in range(3)},
    **{0xD9 + i: ("str", "BHI"[i]) for i in range(3)},
    **{0xDC + i: ("array", "HI"[i]) for i in range(2)},
    **{0xDE + i: ("map", "HI"[i]) for i in range(2)},
}
_NUMBERS = {0xCA: ("float", "f"), 0xCB: ("float", "d")} | {
    0xCC + i: ("int", "BHIQbhiq"[i]) for i in range(8)
}


class Array(NamedTuple):
    """An array in the file: pieces of (first byte, bytes), or the bytes of a number."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...] = ()
    value: bytes = b""


@dataclasses.dataclass
class Cursor:
    """A place in a file, and a window of the bytes after it."""

    path: Path
    read_at: Callable[..., None]
    size: int
    at: int = 0
    nodes: int = 0
    text: int = 0
    window: bytes = b""
    base: int = 0

    def skip(self, count: int) -> int:
        """Steps over bytes that must be there; returns the place of the first."""
        if count > self.size - self.at:
            why = f"{count} bytes announced, {self.size - self.at} left"
            raise self.refuse(why)
        first, self.at = self.at, self.at + count
        return first

    def take(self, count: int) -> bytes:
        """The next bytes."""
        first = self.skip(count)
        if first < self.base or self.at > self.base + len(self.window):
            buffer = np.empty(min(max(count, _WINDOW), self.size - first), np.uint8)
            self.read_at(buffer, first)
            self.window, self.base = buffer.tobytes(), first
        return self.window[first - self.base : self.at - self.base]

    def number(self, code: str) -> Any:
        """The next big-endian number."""
        return struct.unpack(">" + code, self.take(struct.calcsize(code)))[0]

    def refuse(self, why: str) -> FormatError:
        """The error that says where the walk stands."""
        return refuse(self.path, why, byte=self.at)


def walk(cursor: Cursor, depth: int = 0) -> Any:
    """The next value: a dict, a list, an `Array`, text or None."""
    cursor.nodes += 1
    if depth > _DEPTH or cursor.nodes > _NODES:
        why = f"values nested deeper than {_DEPTH}, or more than {_NODES} of them"
        raise cursor.refuse(why)
    kind, value = _token(cursor)
    if kind == "map":
        return _map(cursor, value, depth)
    if kind == "array":
        return [walk(cursor, depth + 1) for _ in range(value)]
    if kind == "ext":
        return _extension(cursor, value)
    if kind == "str":
        return _text(cursor, value)
    if kind == "bin":
        raise cursor.refuse("raw bytes are no array")
    if kind == "nil":
        return None
    number = np.uint64(value) if kind == "int" and value >= 2**63 else np.asarray(value)
    return Array((), number.dtype, value=number.tobytes())


def _token(cursor: Cursor) -> tuple[str, Any]:
    """The next type, and its value or its length."""
    code = cursor.number("B")
    if code < 0x80 or code >= 0xE0:
        return "int", code if code < 0x80 else code - 0x100
    if code < 0xC0:
        kind, bits = ("map", 15) if code < 0x90 else ("array", 15)
        return ("str", code & 31) if code >= 0xA0 else (kind, code & bits)
    if code in _LENGTHS:
        kind, width = _LENGTHS[code]
        return kind, cursor.number(width)
    if code in _NUMBERS:
        kind, width = _NUMBERS[code]
        value = cursor.number(width)
        return kind, np.float32(value) if width == "f" else value
    if 0xD4 <= code <= 0xD8:
        return "ext", 1 << (code - 0xD4)
    if code == 0xC1:
        raise cursor.refuse("a byte that msgpack never uses")
    return ("nil", None) if code == 0xC0 else ("bool", code == 0xC3)


def _map(cursor: Cursor, length: int, depth: int) -> dict[str, Any]:
    """A map of `length` distinct text keys."""
    found: dict[str, Any] = {}
    for _ in range(length):
        kind, size = _token(cursor)
        if kind != "str":
            raise cursor.refuse(f"a key must be text, found {kind}")
        key = _text(cursor, size)
        if key in found:
            raise cursor.refuse(f"the key {show(key)} appears twice")
        found[key] = walk(cursor, depth + 1)
    return found


def _text(cursor: Cursor, length: int) -> str:
    cursor.text += length
    if cursor.text > _TEXT:
        raise cursor.refuse(f"more than {_TEXT} bytes of keys and texts")
    try:
        return cursor.take(length).decode("utf-8")
    except UnicodeDecodeError:
        raise cursor.refuse("text that is not UTF-8") from None


def _extension(cursor: Cursor, length: int) -> Array:
    """One of Flax's three types, which must fill its bytes exactly."""
    code = cursor.number("b")
    end = cursor.at + length
    if code in (NDARRAY, SCALAR):
        array = _ndarray(cursor)
    elif code == COMPLEX:
        array = _complex(cursor)
    else:
        raise cursor.refuse(f"unknown extension type {code}")
    if cursor.at != end or (code == SCALAR and array.shape):
        raise cursor.refuse("an extension that does not hold what it should")
    return array


def _ndarray(cursor: Cursor) -> Array:
    """(shape, dtype, bytes), of which the bytes are stepped over."""
    if _token(cursor) != ("array", 3):
        raise cursor.refuse("an array is (shape, dtype, bytes)")
    kind, rank = _token(cursor)
    if kind != "array" or rank > _RANK:
        raise cursor.refuse("a shape is a list of at most 64 numbers")
    shape = tuple(_length(cursor, *_token(cursor)) for _ in range(rank))
    kind, length = _token(cursor)
    name = cursor.take(min(length, 32)).decode("latin1") if kind == "str" else kind
    if name not in NAMED:
        raise cursor.refuse(f"unknown dtype {show(name)}")
    dtype = NAMED[name]
    kind, length = _token(cursor)
    if kind != "bin" or length != math.prod(shape) * dtype.itemsize:
        raise cursor.refuse(f"{show(shape)} of {dtype} is not {length} bytes")
    check_shape(cursor, shape, dtype)
    return Array(shape, dtype, ((cursor.skip(length), length),))


def check_shape(cursor: Cursor, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Refuses what numpy cannot hold, an empty array of huge axes included."""
    if len(shape) > _RANK or math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise cursor.refuse(f"impossible shape {show(shape)}")


def _length(cursor: Cursor, kind: str, value: Any) -> int:
    if kind != "int" or value < 0:
        raise cursor.refuse("an axis of a shape is a number of at least 0")
    return value


def _complex(cursor: Cursor) -> Array:
    """A Python complex: (real, imaginary)."""
    parts = [_token(cursor) for _ in range(3)]
    if parts[0] != ("array", 2) or {kind for kind, _ in parts[1:]} != {"float"}:
        raise cursor.refuse("a complex number is two floats")
    value = np.complex128(complex(float(parts[1][1]), float(parts[2][1])))
    return Array((), value.dtype, value=value.tobytes())
