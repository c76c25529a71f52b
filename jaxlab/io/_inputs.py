"""The inputs of a step: cast, and with the rows of a new vocabulary, as one reads."""

from collections.abc import Callable, Mapping, Sequence
import functools as ft
import itertools
import math
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from ._checkpoint import Checkpoint, Tensor
from ._plan import Step
from ._vocabulary import MEAN, ZERO, Remap

_CHUNK = 2**22  # bytes that are made at once

Make = Callable[[int, int], np.ndarray]
"""Makes entries [low, high) of a tensor."""


def inputs(
    step: Step, models: Mapping[str, Checkpoint]
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The tensors that a step's method is applied to, and the base.

    Nothing is read yet. A tensor that needs neither a cast nor new rows is the
    checkpoint's own.

    Args:
      step: of a plan.
      models: the open checkpoints the plan was built on.

    Returns:
      (one tensor per model, the base or None), all of the step's shape.
    """
    found = (*step.models, *([step.base] if step.base else []))
    tensors = [models[s.model].tensors[s.tensor] for s in found]
    if step.remap is not None:
        tensors = [
            _aligned(_Rows(remap, tensors, step.dtype or own.dtype), own)
            for remap, own in zip(step.remap, tensors, strict=True)
        ]
    elif step.dtype is not None:
        tensors = [_cast(tensor, step.dtype) for tensor in tensors]
    count = len(step.models)
    return tuple(tensors[:count]), tensors[count] if step.base else None


def _cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """A tensor in another dtype, cast as it is read.

    Narrow floats stay as they are where float32 is asked for: every merge widens them
    to that, faster than it is done here.
    """
    widens = dtype == np.float32 and np.can_cast(tensor.dtype, dtype)
    if tensor.dtype == dtype or widens:
        return tensor
    make = lambda low, high: _flat(tensor, low, high).astype(dtype)
    return _made(tensor.name, tensor.shape, dtype, tensor.file, make)


class _Rows(NamedTuple):
    """The rows of one input under a new vocabulary."""

    remap: Remap
    tensors: Sequence[Tensor]
    dtype: np.dtype

    @property
    def width(self) -> int:
        """Entries per row."""
        return math.prod(self.tensors[0].shape[1:])

    def read(self, low: int, high: int) -> np.ndarray:
        """Rows [low, high), none of them padding."""
        out = np.zeros((high - low, self.width), self.dtype)
        for start, stop in _runs(self.remap, low, high):
            source, row = int(self.remap.source[start]), int(self.remap.row[start])
            part = out[start - low : stop - low]
            if source == MEAN:
                part[:] = self.mean(self.remap.means[start])
            elif source != ZERO:
                part[:] = self.block(source, row, row + stop - start)
        return out

    def mean(self, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """The mean of some rows, rounded once."""
        found = [self.block(i, r, r + 1)[0].astype(self.dtype) for i, r in pairs]
        return np.mean([x.astype(np.float64) for x in found], 0).astype(self.dtype)

    def block(self, source: int, low: int, high: int) -> np.ndarray:
        """Rows of one of the inputs as they are."""
        flat = _flat(self.tensors[source], low * self.width, high * self.width)
        return flat.reshape(high - low, self.width)

    def average(self) -> np.ndarray:
        """The mean of all rows, rounded once."""
        count = len(self.remap.row)
        total = np.zeros(self.width, np.float64)
        step = max(1, _CHUNK // (self.width * 8))
        for low in range(0, count, step):
            block = self.read(low, min(low + step, count))
            total += block.astype(np.float64).sum(0)
        return (total / max(1, count)).astype(self.dtype)


def _aligned(rows: _Rows, tensor: Tensor) -> Tensor:
    """A tensor whose rows are those of a new vocabulary, padded with their mean."""
    width, count, padding = rows.width, len(rows.remap.row), _once(rows.average)

    def make(low: int, high: int) -> np.ndarray:
        first, last = low // width, -(-high // width)
        block = np.empty((last - first, width), rows.dtype)
        own = max(0, min(last, count) - first)
        if own:
            block[:own] = rows.read(first, first + own)
        if own < len(block):
            block[own:] = padding()
        return block.reshape(-1)[low - first * width : high - first * width]

    shape = (rows.remap.rows, *tensor.shape[1:])
    return _made(tensor.name, shape, rows.dtype, tensor.file, make)


def _runs(remap: Remap, low: int, high: int) -> list[tuple[int, int]]:
    """Ranges of rows that lie in a row in one input, so that they are read at once."""
    source, row = remap.source[low:high], remap.row[low:high]
    breaks = (np.diff(source) != 0) | (source[1:] == MEAN)
    breaks |= (np.diff(row) != 1) & (source[1:] >= 0)
    edges = [low, *(np.flatnonzero(breaks) + low + 1), high]
    return [(int(a), int(b)) for a, b in itertools.pairwise(edges) if a < b]


def _once(compute: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """A value that is computed when it is first wanted, by one thread."""
    lock, known = Lock(), []

    def get() -> np.ndarray:
        with lock:
            if not known:
                known.append(compute())
        return known[0]

    return get


def _flat(tensor: Tensor, low: int, high: int) -> np.ndarray:
    """Entries [low, high) of a tensor."""
    out = np.empty(high - low, tensor.dtype)
    if out.size:
        tensor.read_into(out.view(np.uint8), low * tensor.dtype.itemsize)
    return out


def _made(
    name: str, shape: tuple[int, ...], dtype: np.dtype, file: Path, make: Make
) -> Tensor:
    """A tensor whose entries are made when they are read."""
    return Tensor(name, shape, dtype, file, ft.partial(_read, make, dtype.itemsize))


def _read(make: Make, size: int, buffer: np.ndarray, first: int) -> None:
    """Fills a buffer with the bytes of made entries, some at a time."""
    last, step = first + len(buffer), _CHUNK // size
    low = first // size
    while low * size < last:
        high = min(low + step, -(-last // size))
        made = make(low, high).view(np.uint8)
        start, stop = max(first, low * size), min(last, high * size)
        part = made[start - low * size : stop - low * size]
        buffer[start - first : stop - first] = part
        low = high
