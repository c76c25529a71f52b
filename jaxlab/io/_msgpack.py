"""Flax's msgpack: nested maps of arrays, walked strictly and read lazily.

Opening a file costs its structure, and reading a tensor costs that tensor. Flax cuts
arrays of more than 1 GiB into chunks, which are joined here. Our metadata are a map
`__metadata__` at the root.
"""

from collections.abc import Callable, Iterator, Mapping
import functools as ft
import math
from pathlib import Path
import struct
from typing import Any, BinaryIO

import msgpack
import numpy as np

from ._atomic import atomic_file
from ._checkpoint import Checkpoint, Tensor
from ._errors import refuse, show
from ._files import reader
from ._msgpack_walk import (
    NAMED,
    NDARRAY,
    SCALAR,
    Array,
    Cursor,
    check_shape,
    walk,
)
from ._names import nest, to_name, to_path

_METADATA = "__metadata__"
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 2**30  # bytes of one array before it is cut: Flax's own number
_BLOCK = 2**24
_FIXED = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
_WIDTHS = ((2**8, "B"), (2**16, "H"), (2**32, "I"))


def open_msgpack(path: Path | str) -> Checkpoint:
    """Opens a Flax msgpack file; nested keys become dotted names."""
    path = Path(path)
    read_at, size, shut = reader(path)
    try:
        cursor = Cursor(path, read_at, size)
        root = walk(cursor)
        if cursor.at != size:
            raise cursor.refuse("bytes follow the root")
        if not isinstance(root, dict):
            raise refuse(path, "the root is no map of names to arrays")
        metadata = root.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(
            isinstance(x, str) for x in metadata.values()
        ):
            raise refuse(path, "metadata must be a map of text to text")
        tensors: dict[str, Tensor] = {}
        for name, array in _leaves(cursor, root, ()):
            if name in tensors:
                raise refuse(path, "two leaves have this path", tensor=name)
            read = ft.partial(_read, path, name, read_at, array)
            tensors[name] = Tensor(name, array.shape, array.dtype, path, read)
    except BaseException:
        shut()
        raise
    return Checkpoint(path, "msgpack", tensors, metadata, shut=shut)


def save_msgpack(
    path: Path | str,
    flat: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    *,
    chunk: int = _CHUNK,
) -> None:
    """Writes arrays by dotted name, nested as Flax reads them, one at a time."""
    root = nest({to_path(name): x for name, x in flat.items()})
    if _METADATA in root:
        raise ValueError(f"{path}: the key {_METADATA!r} is reserved")
    if metadata:
        root[_METADATA] = dict(metadata)
    with atomic_file(path) as file:
        _write(file, root, chunk, "")


def _leaves(
    cursor: Cursor, node: Any, keys: tuple[str, ...]
) -> Iterator[tuple[str, Array]]:
    """Dotted names and arrays; what JAX sees as no leaf is left out."""
    name = to_name("/".join(keys))
    if isinstance(node, dict) and _CHUNKED in node:
        yield name, _joined(cursor, node, name)
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(cursor, child, (*keys, key))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from _leaves(cursor, child, (*keys, str(i)))
    elif isinstance(node, Array):
        yield name, node
    elif node is not None:
        why = f"the text {show(node)} where an array is due"
        raise refuse(cursor.path, why, tensor=name)


def _joined(cursor: Cursor, node: dict[str, Any], name: str) -> Array:
    """An array that Flax has cut: flat chunks of one dtype that fill the shape."""
    shape, chunks = node.get("shape", {}), node.get("chunks", {})
    if set(node) != {_CHUNKED, "shape", "chunks"} or not (
        _numbered(shape) and _numbered(chunks)
    ):
        raise refuse(cursor.path, "not a chunked array", tensor=name)
    parts = list(chunks.values())
    good = all(isinstance(p, Array) and len(p.shape) == 1 for p in parts)
    if not parts or not good or len({p.dtype for p in parts}) > 1:
        raise refuse(cursor.path, "chunks are flat arrays of one dtype", tensor=name)
    sizes = tuple(
        int(np.frombuffer(n.value, n.dtype)[0])
        for n in shape.values()
        if isinstance(n, Array) and n.value and n.dtype.kind in "iu"
    )
    count = sum(p.shape[0] for p in parts)
    if (
        len(sizes) < len(shape)
        or min(sizes, default=0) < 0
        or math.prod(sizes) != count
    ):
        why = f"{count} entries in chunks do not fill the shape {show(sizes)}"
        raise refuse(cursor.path, why, tensor=name)
    check_shape(cursor, sizes, parts[0].dtype)
    return Array(sizes, parts[0].dtype, tuple(x for p in parts for x in p.pieces))


def _numbered(node: Any) -> bool:
    """Whether a map has the keys "0", "1", ... in order."""
    return isinstance(node, dict) and list(node) == [str(i) for i in range(len(node))]


def _read(
    path: Path,
    name: str,
    read_at: Callable[..., None],
    array: Array,
    buffer: np.ndarray,
    start: int,
) -> None:
    """Fills a buffer from the pieces of an array."""
    if array.value:
        buffer[:] = np.frombuffer(array.value, np.uint8)[start : start + len(buffer)]
    place, end = 0, start + len(buffer)
    for first, length in array.pieces:
        low, high = max(start, place), min(end, place + length)
        if low < high:
            read_at(buffer[low - start : high - start], first + low - place, name)
        place += length
    if array.dtype.kind == "b" and buffer.max(initial=0) > 1:
        raise refuse(path, "a bool that is neither 0 nor 1", tensor=name)


def _write(file: BinaryIO, node: Any, chunk: int, path: str) -> None:
    """Appends a map, an array, or a word or number of our own, as Flax packs it."""
    packer = msgpack.Packer()
    if isinstance(node, Mapping):
        file.write(packer.pack_map_header(len(node)))
        for key, child in node.items():
            file.write(packer.pack(key))
            _write(file, child, chunk, f"{path}/{key}".strip("/"))
    elif isinstance(node, np.generic):
        _write_array(file, np.asarray(node), SCALAR, path)
    elif isinstance(node, bool | int | str):
        file.write(packer.pack(node))
    else:
        _write_chunks(file, np.asarray(node), chunk, path)


def _write_chunks(file: BinaryIO, x: np.ndarray, chunk: int, path: str) -> None:
    """Appends an array; one larger than a chunk as a map of flat pieces."""
    if x.nbytes <= chunk:
        return _write_array(file, x, NDARRAY, path)
    count = max(1, chunk // x.itemsize)
    flat = np.ascontiguousarray(x).reshape(-1)
    pieces = [flat[i : i + count] for i in range(0, flat.size, count)]
    node = {
        _CHUNKED: True,
        "shape": {str(i): n for i, n in enumerate(x.shape)},
        "chunks": {str(i): piece for i, piece in enumerate(pieces)},
    }
    return _write(file, node, x.nbytes, path)


def _write_array(file: BinaryIO, x: np.ndarray, code: int, path: str) -> None:
    """Appends (shape, dtype, bytes) as an extension."""
    if x.dtype not in NAMED.values():
        raise ValueError(f"msgpack cannot hold {path!r}, of dtype {x.dtype}")
    packer = msgpack.Packer()
    head = packer.pack_array_header(3) + packer.pack(x.shape)
    head += packer.pack(x.dtype.name) + _sized(x.nbytes, 0xC4, {}, b"")
    file.write(_sized(len(head) + x.nbytes, 0xC7, _FIXED, bytes([code])) + head)
    data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    for at in range(0, data.size, _BLOCK):
        file.write(data[at : at + _BLOCK].tobytes())


def _sized(length: int, first: int, fixed: Mapping[int, int], code: bytes) -> bytes:
    """The shortest head of a type that comes in three widths."""
    if length in fixed:
        return bytes([fixed[length]]) + code
    for i, (limit, width) in enumerate(_WIDTHS):
        if length < limit:
            return struct.pack(f">B{width}", first + i, length) + code
    raise ValueError(f"{length} bytes in one piece: msgpack has at most 2^32 - 1")
