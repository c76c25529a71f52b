"""NumPy's array format, `.npy`: a header that is parsed, never evaluated, and bytes."""

from collections.abc import Callable
import json
import math
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from ._dtypes import DTYPES
from ._errors import refuse, show

HEADER = 10_000  # bytes of header: numpy's own limit
TEXT = 2**24  # bytes of one member of text
VOID = {d.name: d for d in DTYPES.values() if d.isbuiltin != 1}
PLAIN = {d.str: d for d in DTYPES.values() if d.isbuiltin == 1} | {
    "<c16": np.dtype(np.complex128)
}

_FIELD = re.compile(
    r"""\s*['"](descr|fortran_order|shape)['"]\s*:"""
    r"""\s*('[^'\\]*'|"[^"\\]*"|True|False|\([\d\sL,]*\))\s*(?:,\s*|(?=\}))"""
)
_SHAPE = re.compile(r"\(\s*(\d{1,18}L?\s*,\s*)*(?<=,)\s*(\d{1,18}L?)?\s*\)|\(\s*\)")
_READABLE = "only little-endian numbers, bools and text are read"

Read = Callable[[np.ndarray, int], None]
"""Fills a byte buffer from that byte on."""


class Header(NamedTuple):
    """What the header of an array declares, and where its data start."""

    shape: tuple[int, ...]
    descr: str
    fortran: bool
    start: int


def parse(path: Path, name: str, head: bytes, size: int) -> Header:
    """Parses the header of one array of `size` bytes; evaluates nothing."""
    wide = head[6:8] == b"\2\0"
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\1\0", b"\2\0"):
        raise refuse(path, "no npy array of version 1 or 2", tensor=name)
    start = 12 if wide else 10
    length = int.from_bytes(head[8:start], "little")
    text = head[start : start + length]
    if length > HEADER or len(text) < length:
        raise refuse(path, f"a header of {length} bytes", tensor=name)
    fields = _fields(text.decode("latin1"))
    if fields is None:
        raise refuse(path, f"no header of a plain array: {show(text)}", tensor=name)
    descr, fortran, shape = fields
    item = _itemsize(path, name, descr)
    if len(shape) > 64 or math.prod(n for n in shape if n) * item >= 2**63:
        raise refuse(path, f"impossible shape {show(shape)}", tensor=name)
    if start + length + math.prod(shape) * item != size:
        raise refuse(
            path,
            f"{show(shape)} of {descr} after a header of {start + length} bytes is not "
            f"{size} bytes",
            tensor=name,
        )
    return Header(shape, descr, fortran, start + length)


def _fields(text: str) -> tuple[str, bool, tuple[int, ...]] | None:
    """(descr, fortran_order, shape) of a header; None where it is anything else."""
    whole, at = text.strip(), 1
    found: dict[str, str] = {}
    while match := _FIELD.match(whole, at):
        if match[1] in found:
            return None
        found[match[1]], at = match[2], match.end()
    if whole[:1] + whole[at:] != "{}" or len(found) < 3:
        return None
    descr, fortran, shape = (found[k] for k in ("descr", "fortran_order", "shape"))
    if descr[0] not in "'\"" or fortran not in ("True", "False"):
        return None
    if not _SHAPE.fullmatch(shape):
        return None
    sizes = tuple(int(n) for n in re.findall(r"\d+", shape))
    return descr[1:-1], fortran == "True", sizes


def text(path: Path, name: str, header: Header, read: Read) -> str:
    """A member of text: as it is, or as a JSON list where it has several."""
    item = _itemsize(path, name, header.descr)
    count = math.prod(header.shape)
    if item * count > TEXT:
        raise refuse(path, "more than 16 MiB of text", tensor=name)
    data = np.empty(item * count, np.uint8)
    if data.size:
        read(data, header.start)
    try:
        words = np.ndarray(
            header.shape, header.descr, data, order="F" if header.fortran else "C"
        ).tolist()
        text = words if isinstance(words, str) else json.dumps(words)
        text.encode()
    except ValueError as error:
        raise refuse(path, f"broken text: {error}", tensor=name) from None
    return text


def read(
    path: Path,
    name: str,
    raw: Read,
    header: Header,
    dtype: np.dtype,
    buffer: np.ndarray,
    start: int,
) -> None:
    """Fills a buffer with bytes of an array in C order."""
    if header.fortran and len(header.shape) > 1:
        _gather(raw, header, dtype.itemsize, buffer, start)
    else:
        raw(buffer, header.start + start)
    if dtype.kind == "b" and buffer.max(initial=0) > 1:
        raise refuse(path, "a bool that is neither 0 nor 1", tensor=name)


def descr_of(dtype: np.dtype) -> str | None:
    """How an npy header spells a dtype; None where it cannot."""
    if dtype.name in VOID:
        return f"|V{dtype.itemsize}"
    return dtype.str if dtype.str in PLAIN else None


def _itemsize(path: Path, name: str, descr: str) -> int:
    """The bytes of one entry of a dtype that may be read at all."""
    if descr in PLAIN:
        return PLAIN[descr].itemsize
    if match := re.fullmatch(r"[<|]V([12])", descr):
        return int(match[1])
    if match := re.fullmatch(r"<U(\d{1,8})", descr):
        return 4 * int(match[1])
    why = "objects are pickles, which are never read" if "O" in descr else _READABLE
    raise refuse(path, f"dtype {show(descr)}: {why}", tensor=name)


def _gather(
    read: Read, header: Header, item: int, buffer: np.ndarray, start: int
) -> None:
    """Reads rows of an array whose file has the first axis innermost."""
    rows, *rest = header.shape
    columns = math.prod(rest)
    row = item * columns
    low, high = start // row, -(-(start + len(buffer)) // row)
    part = np.empty((columns, high - low, item), np.uint8)
    if high - low == rows:
        read(part.reshape(-1), header.start)
    else:
        for i, column in enumerate(part):
            read(column.reshape(-1), header.start + (i * rows + low) * item)
    block = part.reshape(*rest[::-1], high - low, item)
    axes = (*reversed(range(block.ndim - 1)), block.ndim - 1)
    buffer[:] = block.transpose(axes).reshape(-1)[start - low * row :][: len(buffer)]
