"""safetensors: one file, opened lazily, written as a stream."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
import dataclasses
import functools as ft
import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ._atomic import atomic_file
from ._checkpoint import Checkpoint, Tensor
from ._errors import refuse
from ._files import reader
from ._header import Entry, header_bytes, read_header


def open_safetensors(path: Path | str) -> Checkpoint:
    """Opens one safetensors file: its header is read and checked, its tensors are not.

    Args:
      path: the file.

    Returns:
      A checkpoint whose tensors read themselves from the open file.

    Raises:
      FormatError: any departure from the format; names the tensor and the byte.
      OSError: the file cannot be opened.
    """
    path = Path(path)
    read_at, size, shut = reader(path)

    def read(first: int, count: int) -> bytes:
        buffer = np.empty(count, np.uint8)
        read_at(buffer, first)
        return buffer.tobytes()

    try:
        header = read_header(path, size, read)
    except BaseException:
        shut()
        raise
    tensors = {
        entry.name: Tensor(
            *(entry.name, entry.shape, entry.dtype, path),
            ft.partial(_fill, read_at, path, entry, first),
        )
        for entry, first in header.entries
    }
    return Checkpoint(path, "safetensors", tensors, header.metadata, shut=shut)


@dataclasses.dataclass
class Writer:
    """A file being written: call it with the next bytes.

    Attributes:
      size: the bytes of the file so far, header included.
      sha256: the hex digest of the file; empty until it is complete.
    """

    _path: Path
    _file: BinaryIO = dataclasses.field(repr=False)
    _due: int
    size: int = 0
    sha256: str = ""
    _hash: "hashlib._Hash" = dataclasses.field(
        default_factory=hashlib.sha256, repr=False
    )

    def __call__(self, data: bytes | memoryview | np.ndarray) -> None:
        """Appends bytes, or the bytes of a contiguous array."""
        if isinstance(data, np.ndarray):
            data = data.reshape(-1).view(np.uint8).data
        self.size += len(data)
        if self.size > self._due:
            raise ValueError(f"{self._path}: more than the {self._due} bytes announced")
        self._file.write(data)
        self._hash.update(data)


@contextmanager
def safetensors_writer(
    path: Path | str,
    entries: Iterable[Entry],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Writer]:
    """Writes one safetensors file as a stream: the header now, the tensors later.

    Args:
      path: the target; it appears whole and on disk when the block ends, or not at all.
      entries: name, dtype and shape of the tensors, in the order of their bytes.
      metadata: string pairs.

    Yields:
      A function of the next bytes, in pieces of any size: little-endian, row-major, one
      tensor after the other. Its `size` and `sha256` hold once the block has ended.

    Raises:
      ValueError: the header is impossible, or the bytes are too many or too few.
      OSError: disk full, target read-only; names `path`. The older file stays.
    """
    entries = tuple(entries)
    header = header_bytes(entries, metadata)
    due = len(header) + sum(entry.nbytes for entry in entries)
    with atomic_file(path) as file:
        write = Writer(Path(path), file, due)
        write(header)
        yield write
        if write.size != due:
            raise ValueError(f"{path}: {write.size} bytes written, {due} announced")
    write.sha256 = write._hash.hexdigest()


def _fill(
    read_at: Callable[..., None],
    path: Path,
    entry: Entry,
    start: int,
    buffer: np.ndarray,
    first: int,
) -> None:
    """Fills `buffer` from byte `first` of a tensor on; BOOL bytes must be 0 or 1."""
    if first < 0 or first + len(buffer) > entry.nbytes:
        end = first + len(buffer)
        raise ValueError(f"bytes [{first}, {end}) of {entry.name!r}: {entry.nbytes}")
    read_at(buffer, start + first, entry.name)
    if entry.dtype == np.bool_ and len(buffer) and buffer.max() > 1:
        where = int(np.argmax(buffer > 1))
        why = f"a BOOL byte of {buffer[where]}, neither 0 nor 1"
        raise refuse(path, why, tensor=entry.name, byte=start + first + where)
