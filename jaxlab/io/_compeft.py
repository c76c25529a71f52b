"""ComPEFT files: ternary tensors at about their entropy (Yadav et al., 2023).

A safetensors file whose metadata say `"compeft": "1"`. Each tensor is a record, a U8
vector of little-endian numbers: dtype, low bits, rank, 0 (a byte each), CRC-32 of the
rest (4 bytes), the bits of the magnitude, the number of nonzero entries, of unary bits
(8 bytes each), the shape (8 bytes each); then the Rice code of the positions of the
nonzero entries, or of the zeros where those are fewer, and a sign bit for each nonzero
entry, 1 for -.
"""

from collections.abc import Mapping
import functools as ft
import math
from pathlib import Path
import struct
import threading
from typing import Any, NamedTuple
import zlib

import ml_dtypes
import numpy as np

from . import _rice
from ._atomic import atomic_file
from ._checkpoint import Checkpoint, Tensor
from ._errors import refuse, show
from ._files import reader
from ._header import RANK, Entry, header_bytes, read_header
from ._zip import Cache, Read

_KINDS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
DTYPES = tuple(np.dtype(kind) for kind in _KINDS)

_KEY, _VERSION = "compeft", "1"
_HEAD = struct.Struct("<BBBBIQQQ")
_RATIO, _FREE = 2**12, 2**32  # bytes per stored byte, beyond those that are free


class Record(NamedTuple):
    """What the head of a tensor says, and where its code lies in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    low: int
    crc: int
    magnitude: int
    nonzero: int
    unary: int
    start: int
    head: int
    size: int

    @property
    def entries(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def coded(self) -> int:
        """How many positions the code holds: of what is fewer."""
        return min(self.nonzero, self.entries - self.nonzero)


def open_compeft(path: Path | str) -> Checkpoint:
    """Opens a ComPEFT file: the heads of its tensors are read and checked."""
    path = Path(path)
    read_at, size, shut = reader(path)
    try:
        records, metadata = read_records(path, read_at, size)
    except BaseException:
        shut()
        raise
    cache = Cache({}, threading.Lock())
    tensors = {
        name: Tensor(
            *(name, record.shape, record.dtype, path),
            ft.partial(_fill, path, read_at, name, record, cache),
        )
        for name, record in records.items()
    }
    return Checkpoint(path, "compeft", tensors, metadata, shut=shut)


def save_compeft(
    path: Path | str,
    flat: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes ternary arrays by dotted name; each is coded before the file is begun."""
    if metadata and _KEY in metadata:
        raise ValueError(f"{path}: the metadata key {_KEY!r} is reserved")
    coded = {name: encode(name, np.asarray(x)) for name, x in flat.items()}
    entries = [Entry(n, np.dtype(np.uint8), (len(x),)) for n, x in coded.items()]
    header = header_bytes(entries, {**(metadata or {}), _KEY: _VERSION})
    with atomic_file(path) as file:
        file.write(header)
        for record in coded.values():
            file.write(record)


def encode(name: str, x: np.ndarray) -> bytes:
    """The record of one tensor."""
    if x.dtype.newbyteorder("=") not in DTYPES:
        kinds = ", ".join(str(d) for d in DTYPES)
        raise ValueError(f"the tensor {show(name)} is {x.dtype}; ComPEFT holds {kinds}")
    dtype = x.dtype.newbyteorder("=")
    word, sign = _word(dtype)
    raw = np.ascontiguousarray(x, dtype).reshape(-1).view(word)
    size = raw & ~sign
    where = np.flatnonzero(size)
    magnitude = size[where[0]] if where.size else word.type(0)
    odd = where[size[where] != magnitude]
    if odd.size or not np.isfinite(magnitude.reshape(1).view(dtype)[0]):
        first = x.reshape(-1)[odd[0] if odd.size else where[0]]
        value = magnitude.reshape(1).view(dtype)[0]
        raise ValueError(
            f"the tensor {show(name)} is not ternary: it holds {value} and {first}, "
            f"expected -s, 0 and s of one finite s; merge.compeft makes it so"
        )
    signs = _rice.bits((raw[where] & sign) != 0)
    fewer = where if 2 * where.size <= raw.size else np.flatnonzero(size == 0)
    low, unary, planes = _rice.encode(fewer)
    numbers = (int(magnitude), where.size, unary)
    kinds = (DTYPES.index(dtype), low, x.ndim, 0)
    shape = struct.pack(f"<{x.ndim}Q", *x.shape)
    body = b"".join([shape, *(p.tobytes() for p in planes), signs.tobytes()])
    crc = zlib.crc32(body, zlib.crc32(_HEAD.pack(*kinds, 0, *numbers)))
    return _HEAD.pack(*kinds, crc, *numbers) + body


def read_records(
    path: Path, read_at: Read, size: int
) -> tuple[dict[str, Record], dict[str, str]]:
    """The head of every tensor, and the metadata, all checked."""

    def read(first: int, count: int) -> bytes:
        buffer = np.empty(count, np.uint8)
        read_at(buffer, first)
        return buffer.tobytes()

    header = read_header(path, size, read)
    metadata = dict(header.metadata)
    if (version := metadata.pop(_KEY, None)) != _VERSION:
        why = f"version {show(version)}" if version else "no ComPEFT file"
        raise refuse(path, f"{why}; expected {_KEY!r}: {_VERSION!r} in the metadata")
    records = {e.name: _record(path, read, e, first) for e, first in header.entries}
    grown = {n: r.entries * r.dtype.itemsize for n, r in records.items()}
    if sum(grown.values()) > _FREE + _RATIO * size:
        most = max(grown, key=lambda n: grown[n])
        why = f"{size} bytes would grow to {sum(grown.values())}: that is a bomb"
        raise refuse(path, why, tensor=most, byte=records[most].start)
    return records, metadata


def _record(path: Path, read: Any, entry: Entry, start: int) -> Record:
    """Checks one head against the bytes that the file gives it."""
    wrong = ft.partial(refuse, path, tensor=entry.name)
    size = entry.nbytes
    if entry.dtype != np.uint8 or len(entry.shape) != 1:
        raise wrong("a record is a vector of U8", byte=start)
    if size < _HEAD.size:
        raise wrong(f"{size} bytes are too few for a record", byte=start)
    head = _HEAD.unpack(read(start, _HEAD.size))
    kind, low, rank, zero, crc, magnitude, nonzero, unary = head
    if kind >= len(DTYPES) or low > _rice.WIDEST or rank > RANK or zero:
        raise wrong(f"dtype {kind}, low bits {low}, rank {rank}, {zero}", byte=start)
    if size < _HEAD.size + 8 * rank:
        raise wrong(f"{size} bytes are too few for its shape", byte=start)
    at = start + _HEAD.size
    shape = struct.unpack(f"<{rank}Q", read(at, 8 * rank))
    dtype = DTYPES[kind]
    if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**62:
        raise wrong(f"the shape {show(list(shape))} is beyond any memory", byte=at)
    word, sign = _word(dtype)
    value = np.array(magnitude & int(~sign), np.uint64).astype(word).view(dtype)
    held = _HEAD.size + 8 * rank
    found = Record(
        *(dtype, shape, low, crc, magnitude, nonzero, unary), start, held, size
    )
    if int(value.view(word)) != magnitude or not np.isfinite(value):
        raise wrong(f"{magnitude:#x} is no finite {dtype} magnitude", byte=start + 8)
    if nonzero > found.entries or (nonzero > 0) != (magnitude > 0):
        why = f"{nonzero} of {found.entries} entries are {value}"
        raise wrong(why, byte=start + 16)
    due = held + _rice.length(found.coded, low, unary) + -(-nonzero // 8)
    if due != size or (not found.coded and (low or unary)):
        raise wrong(f"{size} bytes, its numbers make {due}", byte=start)
    return found


def _fill(
    path: Path,
    read_at: Read,
    name: str,
    record: Record,
    cache: Cache,
    buffer: np.ndarray,
    first: int,
) -> None:
    """Fills `buffer` from byte `first` of a tensor on; the last one stays decoded."""
    with cache.lock:
        if name not in cache.slot:
            cache.slot.clear()
            cache.slot[name] = _decode(path, read_at, name, record).view(np.uint8)
        whole = cache.slot[name]
        if first < 0 or first + len(buffer) > len(whole):
            end = first + len(buffer)
            raise ValueError(f"bytes [{first}, {end}) of {name!r}: {len(whole)}")
        buffer[:] = whole[first : first + len(buffer)]
        if first + len(buffer) == len(whole):
            cache.slot.clear()


def _decode(path: Path, read_at: Read, name: str, record: Record) -> np.ndarray:
    """The entries of one tensor, as words of its dtype."""
    raw = np.empty(record.size, np.uint8)
    read_at(raw, record.start)
    head = raw[: _HEAD.size].copy()
    head[4:8] = 0
    if zlib.crc32(raw[_HEAD.size :].data, zlib.crc32(head.data)) != record.crc:
        why = "the checksum is wrong: the record is damaged"
        raise refuse(path, why, tensor=name, byte=record.start)
    end = record.size - -(-record.nonzero // 8)
    word, sign = _word(record.dtype)
    n, m = record.entries, record.nonzero
    code, at = raw[record.head : end], record.head
    try:
        where = _rice.decode(code, record.coded, record.low, record.unary, n)
        at = end
        negative = _rice.unbits(raw[end:], m, 0)
    except _rice.Broken as broken:
        byte = record.start + at + broken.at
        raise refuse(path, str(broken), tensor=name, byte=byte) from None
    values = negative * sign | word.type(record.magnitude)
    out = np.zeros(n, word)
    if 2 * m <= n:
        out[where] = values
    else:
        mask = np.ones(n, np.bool_)
        mask[where] = False
        out[mask] = values
    return out


def _word(dtype: np.dtype) -> tuple[np.dtype, Any]:
    """The unsigned integers of that width, and the one of the sign alone."""
    word = np.dtype(f"u{dtype.itemsize}")
    return word, word.type(1 << (8 * dtype.itemsize - 1))
