"""The header of a safetensors file: a grammar, checked before anything is allocated.

Eight bytes of length, then UTF-8 JSON that begins with `{` and is padded with spaces:
names to dtype, shape and data_offsets, and string metadata. The tensors tile the rest
of the file. What the reference reader lets through but the format does not mean
(duplicates, unknown fields, other padding, impossible shapes) is refused too.
"""

from collections.abc import Callable, Iterable, Mapping
import json
import math
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from ._dtypes import from_code, little, to_code
from ._errors import refuse, show
from ._grammar import FORM, Misfit, Pairs, members

LIMIT = 100_000_000  # bytes of header, as in the reference implementation
NAME = 2**16  # bytes of one name
RANK = 64  # axes, numpy's own limit
_WORD = 2**63  # no size may pass this

_LFS = b"version https://git-lfs"


class Entry(NamedTuple):
    """What a header says of one tensor, except where it lies."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Header(NamedTuple):
    """A checked header: tensors by offset, each with its first byte in the file."""

    entries: tuple[tuple[Entry, int], ...]
    metadata: dict[str, str]


def read_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Reads and checks the header of a file of `size` bytes by `read(first, count)`."""
    head = read(0, min(size, len(_LFS)))
    if head == _LFS:
        why = "a git-lfs pointer, not a checkpoint; run `git lfs pull` in its folder"
        raise refuse(path, why)
    if size < 8:
        raise refuse(path, f"{size} bytes, too short for a safetensors file", byte=0)
    length = int.from_bytes(head[:8], "little")
    if length > LIMIT:
        why = f"a header of {length} bytes; at most {LIMIT} are allowed"
        raise refuse(path, why, byte=0)
    if length > size - 8:
        why = f"a header of {length} bytes in a file of {size}: truncated, or no "
        raise refuse(path, why + "safetensors file", byte=0)
    raw = read(8, length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        why = "the header is not UTF-8"
        raise refuse(path, why, byte=8 + error.start) from None
    return _parse(path, text, 8 + length, size)


def header_bytes(
    entries: Iterable[Entry], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a file that holds the tensors in this order, without holes.

    Args:
      entries: name, dtype and shape of each tensor.
      metadata: string pairs.

    Returns:
      The length word and the JSON, padded with spaces to a multiple of 8 bytes.

    Raises:
      ValueError: a name twice, or one the format cannot hold; a dtype it lacks; a
        header beyond 100 MB.

    Example:
      >>> header_bytes([Entry("a", np.dtype("float32"), (2,))])[8:]
      b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}  '
    """
    header: dict[str, object] = {}
    if metadata:
        for text in (*metadata.keys(), *metadata.values()):
            if not isinstance(text, str) or not _encodable(text):
                raise ValueError(f"metadata holds {show(text)}; it takes valid strings")
        header["__metadata__"] = dict(metadata)
    begin = 0
    for entry in entries:
        if why := _bad_name(entry.name):
            raise ValueError(f"a tensor cannot be called {show(entry.name)}: {why}")
        if entry.name in header:
            raise ValueError(f"two tensors are called {show(entry.name)}")
        end = begin + entry.nbytes
        header[entry.name] = {
            "dtype": to_code(little(entry.dtype)),
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LIMIT:
        raise ValueError(f"a header of {len(text)} bytes; at most {LIMIT} are allowed")
    return len(text).to_bytes(8, "little") + text


def _parse(path: Path, text: str, start: int, size: int) -> Header:
    """Checks the JSON, then that the tensors tile the bytes [start, size)."""
    found: dict[str, tuple[Entry, int, int]] = {}
    metadata: dict[str, str] | None = None
    try:
        for i, name, pairs in members(text):
            if name in found or (name == "__metadata__" and metadata is not None):
                raise Misfit(i, "the name appears twice", name)
            try:
                if name == "__metadata__":
                    metadata = _metadata(pairs)
                else:
                    found[name] = _entry(name, pairs)
            except ValueError as error:
                raise Misfit(i, str(error), name) from None
    except Misfit as misfit:
        byte = 8 + len(text[: misfit.at].encode())
        raise refuse(path, misfit.why, tensor=misfit.name, byte=byte) from None
    return Header(_tile(path, found, start, size), metadata or {})


def _entry(name: str, pairs: Pairs) -> tuple[Entry, int, int]:
    """Checks one tensor alone: fields, dtype, shape, and that its size fits."""
    if why := _bad_name(name):
        raise ValueError(why)
    names, fields = [field for field, _ in pairs], dict(pairs)
    if sorted(names) != ["data_offsets", "dtype", "shape"]:
        raise ValueError(f"expected {FORM}, found the fields {show(names)}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not (isinstance(code, str) and isinstance(shape, list)):
        raise ValueError(f"expected {FORM}, found {show(fields)}")
    if not (isinstance(offsets, list) and len(offsets) == 2):
        raise ValueError(f"data_offsets must be [begin, end], found {show(offsets)}")
    entry = Entry(name, from_code(code), tuple(shape))
    if len(shape) > RANK:
        raise ValueError(f"{len(shape)} axes; at most {RANK} are supported")
    if math.prod(n or 1 for n in shape) * entry.dtype.itemsize >= _WORD:
        raise ValueError(f"the shape {show(shape)} is beyond any memory")
    begin, end = offsets
    if end - begin != entry.nbytes:
        held = f"data_offsets [{begin}, {end}] hold {end - begin}"
        raise ValueError(f"{code} {show(shape)} takes {entry.nbytes} bytes, {held}")
    return entry, begin, end


def _metadata(pairs: Pairs) -> dict[str, str]:
    """Checks that metadata maps distinct strings to strings."""
    for text in (x for pair in pairs for x in pair):
        if not isinstance(text, str) or not _encodable(text):
            raise ValueError(f"metadata maps strings to strings, found {show(text)}")
    metadata = {str(key): str(value) for key, value in pairs}
    if len(metadata) != len(pairs):
        raise ValueError("a metadata key appears twice")
    return metadata


def _tile(
    path: Path, found: Mapping[str, tuple[Entry, int, int]], start: int, size: int
) -> tuple[tuple[Entry, int], ...]:
    """The tensors by offset, after a check that they leave no hole, overlap or tail."""
    here = 0
    tiles = sorted(found.values(), key=lambda x: x[1:])
    for entry, begin, end in tiles:
        if begin != here:
            kind = "leave a hole" if begin > here else "overlap the tensor before"
            why = f"data_offsets [{begin}, {end}] {kind}: the next free byte is {here}"
            raise refuse(path, why, tensor=entry.name, byte=start + begin)
        if end > size - start:
            why = f"data_offsets [{begin}, {end}] run past the end: {size - start}"
            why += " bytes of data, the file is truncated"
            raise refuse(path, why, tensor=entry.name, byte=start + begin)
        here = end
    if here != size - start:
        why = f"{size - start - here} bytes follow the last tensor"
        raise refuse(path, why, byte=start + here)
    return tuple((entry, start + begin) for entry, begin, _ in tiles)


def _bad_name(name: str) -> str | None:
    """Why a tensor may not have this name."""
    if not _encodable(name):
        return "the name is not valid Unicode"
    if len(name.encode()) > NAME:
        return f"the name is longer than {NAME} bytes"
    if name == "__metadata__":
        return "the name is the format's own"
    return "the name holds a NUL" if "\0" in name else None


def _encodable(text: str) -> bool:
    """Whether the text is Unicode: no half of a surrogate pair."""
    return re.search("[\ud800-\udfff]", text) is None
