"""NumPy's `.npz` and `.npy`, read lazily: nothing is unpickled, nothing evaluated.

NumPy cannot name bfloat16 and the f8 types: it writes them as the voids `V2` and `V1`.
We write the same, and beside them a member `__metadata__`, the UTF-8 bytes of
`{"dtypes": {name: dtype}, "metadata": {key: text}}`, that says which they are. A `V2`
that no table names is bfloat16; a `V1` could be any f8 type and is refused. Members of
text are metadata.
"""

from collections.abc import Mapping
import functools as ft
import json
from pathlib import Path
import threading
from typing import Any, cast
import zipfile

import numpy as np

from . import _atomic, _npy, _zip
from ._checkpoint import Checkpoint, Tensor
from ._errors import refuse, show
from ._files import reader

_TABLE = "__metadata__"
_BLOCK = 2**24


def open_npz(path: Path | str) -> Checkpoint:
    """Opens a `.npz` or `.npy`; headers are checked now, checksums on first read."""
    path = Path(path)
    read_at, size, shut = reader(path)
    try:
        headers, reads = _arrays(path, read_at, size)
        dtypes, metadata = _table(path, headers, reads)
        tensors = {}
        for name, header in headers.items():
            if header.descr.startswith("<U"):
                metadata[name] = _npy.text(path, name, header, reads[name])
            else:
                dtype = _dtype(path, name, header.descr, dtypes)
                read = ft.partial(_npy.read, path, name, reads[name], header, dtype)
                tensors[name] = Tensor(name, header.shape, dtype, path, read)
    except BaseException:
        shut()
        raise
    return Checkpoint(path, "npz", tensors, metadata, shut=shut)


def save_npz(
    path: Path | str, flat: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays one by one, uncompressed; the same input gives the same bytes."""
    for name, x in flat.items():
        if not _zip.plain(name) or name == _TABLE:
            raise ValueError(f"{path}: npz cannot hold a tensor named {show(name)}")
        if _npy.descr_of(np.dtype(x.dtype)) is None:
            raise ValueError(f"{path}: npz cannot hold {name!r}, of dtype {x.dtype}")
    kinds = {name: np.dtype(x.dtype).name for name, x in flat.items()}
    voids = {name: kind for name, kind in kinds.items() if kind in _npy.VOID}
    table = {"dtypes": voids, "metadata": dict(metadata or {})}
    with (
        _atomic.atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name, x in flat.items():
            _write(archive, name, np.asarray(x))
        if voids or metadata:
            text = json.dumps(table).encode()
            _write(archive, _TABLE, np.frombuffer(text, np.uint8))


def _arrays(
    path: Path, read_at: _zip.Read, size: int
) -> tuple[dict[str, _npy.Header], dict[str, _zip.Read]]:
    """The header of every array, and how to read its bytes."""
    count, name = _npy.HEADER + 12, path.stem
    start = _zip.take(read_at, 0, min(count, size))
    if start[:6] == b"\x93NUMPY":
        return {name: _npy.parse(path, name, start, size)}, {name: read_at}
    if start[:4] not in (b"PK\3\4", b"PK\5\6"):
        raise refuse(path, "neither a zip archive nor an npy array; no pickle is read")
    members = _zip.members(path, read_at, size)
    cache = _zip.Cache({}, threading.Lock())
    reads = {m.name: _zip.reader(path, read_at, m, cache) for m in members}
    headers = {
        m.name: _npy.parse(path, m.name, _zip.head(read_at, m, count), m.size)
        for m in members
    }
    return headers, reads


def _dtype(path: Path, name: str, descr: str, table: Mapping[str, str]) -> np.dtype:
    """The dtype of an array of numbers, with the help of our table for the voids."""
    if descr in _npy.PLAIN:
        return _npy.PLAIN[descr]
    said = table.get(name, "bfloat16" if descr.endswith("V2") else None)
    if said is None:
        raise refuse(path, "one-byte void: no table says which f8 it is", tensor=name)
    dtype = _npy.VOID.get(said)
    if dtype is None or dtype.itemsize != int(descr[-1]):
        raise refuse(path, f"{descr} cannot be {show(said)}", tensor=name)
    return dtype


def _table(
    path: Path, headers: dict[str, _npy.Header], reads: dict[str, _zip.Read]
) -> tuple[dict[str, str], dict[str, str]]:
    """Takes our own member out: the dtypes of the voids, and the metadata."""
    if _TABLE not in headers:
        return {}, {}
    header = headers.pop(_TABLE)
    if header.descr != "|u1" or len(header.shape) != 1 or header.shape[0] > _npy.TEXT:
        raise refuse(path, "not UTF-8 text of at most 16 MiB", tensor=_TABLE)
    text = np.empty(header.shape[0], np.uint8)
    reads[_TABLE](text, header.start)
    try:
        table = json.loads(text.tobytes(), object_pairs_hook=_once)
        parts = [table.pop("dtypes"), table.pop("metadata")]
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise refuse(path, f"broken table: {error}", tensor=_TABLE) from None
    flat = all(
        type(part) is dict and all(type(x) is str for x in part.values())
        for part in parts
    )
    known = flat and all(
        name in headers and headers[name].descr[1:] in ("V1", "V2") for name in parts[0]
    )
    if table or not known:
        raise refuse(path, "not a table of dtypes and metadata", tensor=_TABLE)
    return parts[0], parts[1]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON without duplicate keys."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _write(archive: zipfile.ZipFile, name: str, x: np.ndarray) -> None:
    """Adds one array, in C order, with a date that is always the same."""
    entry = zipfile.ZipInfo(f"{name}.npy")
    fields = {"descr": _npy.descr_of(x.dtype), "fortran_order": False, "shape": x.shape}
    with archive.open(entry, "w", force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(cast("Any", out), fields)
        data = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        for at in range(0, data.size, _BLOCK):
            out.write(data[at : at + _BLOCK].tobytes())
