"""What is in a checkpoint: streamed, in bounded memory.

Statistics accumulate in float64 over blocks, a few blocks per thread, so memory does
not grow with the tensors. Complex entries count as two real ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import dataclasses as dc
import math
import os
import re
from typing import TypeVar

import numpy as np

from ._checkpoint import Checkpoint, Tensor

BLOCK = 2**16  # entries: a block and its float64 copy stay in a core's cache

Advance = Callable[[int], object]
In = TypeVar("In")
Out = TypeVar("Out")


@dc.dataclass(frozen=True)
class TensorReport:
    """One tensor; the statistics are those of its finite entries."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int  # as stored
    norm: float  # $\\sqrt{\\sum x^2}$
    min: float  # 0 where no entry is finite, as is max
    max: float
    zeros: int
    nan: int
    inf: int


@dc.dataclass(frozen=True)
class Inspection:
    """A checkpoint: every tensor, and their totals."""

    path: str
    format: str
    tensors: tuple[TensorReport, ...]
    parameters: int
    bytes: int
    norm: float
    nan: int
    inf: int
    dtypes: dict[str, int]  # entries of each dtype


def inspect(checkpoint: Checkpoint, *, advance: Advance = lambda _: None) -> Inspection:
    """Reads every tensor of a checkpoint once and says what is in it.

    Args:
      checkpoint: an open checkpoint, of any format.
      advance: called with the number of bytes read since the last call, from any
        thread.

    Returns:
      The tensors in natural order, layer 2 before layer 10, and totals.

    Degenerate inputs:
      NaN and infinite entries are counted and left out of norm, min and max.
    """
    one = lambda tensor: _inspect(tensor, advance)
    ordered = sorted(checkpoint.tensors.values(), key=lambda t: natural(t.name))
    tensors = tuple(threads(one, ordered))
    dtypes: Counter[str] = Counter()
    for t in tensors:
        dtypes[t.dtype] += math.prod(t.shape)
    return Inspection(
        str(checkpoint.path),
        checkpoint.format,
        tensors,
        parameters=sum(math.prod(t.shape) for t in tensors),
        bytes=sum(t.bytes for t in tensors),
        norm=math.sqrt(sum(t.norm**2 for t in tensors)),
        nan=sum(t.nan for t in tensors),
        inf=sum(t.inf for t in tensors),
        dtypes=dict(dtypes),
    )


def _inspect(tensor: Tensor, advance: Advance) -> TensorReport:
    square, low, high, zeros, nan, inf = 0.0, math.inf, -math.inf, 0, 0, 0
    for x in blocks(tensor):
        advance(stored(x, tensor))
        finite = x
        if not math.isfinite(np.dot(x, x)):  # else all are finite, and masks cost most
            finite = x[np.isfinite(x)]
            missing = int(np.count_nonzero(np.isnan(x)))
            nan, inf = nan + missing, inf + x.size - finite.size - missing
        square += float(np.dot(finite, finite))
        zeros += finite.size - int(np.count_nonzero(finite))
        low = min(low, float(np.min(finite, initial=math.inf)))
        high = max(high, float(np.max(finite, initial=-math.inf)))
    return TensorReport(
        tensor.name,
        str(tensor.dtype),
        tensor.shape,
        tensor.nbytes,
        norm=math.sqrt(square),
        min=low if low <= high else 0.0,
        max=high if low <= high else 0.0,
        zeros=zeros,
        nan=nan,
        inf=inf,
    )


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that counts numbers in a name as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(x[:18]), x) if i % 2 else (0, x) for i, x in enumerate(parts)]


def blocks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The entries of a tensor in order as flat float64; each block reuses its buffer.

    A fresh array per block would cost more in page faults than all the arithmetic.
    """
    raw = np.empty(min(BLOCK, tensor.size) * tensor.dtype.itemsize, np.uint8)
    parts = 2 if tensor.dtype.kind == "c" else 1
    wide = np.empty(min(BLOCK, tensor.size) * parts)
    for start in range(0, tensor.size, BLOCK):
        count = min(BLOCK, tensor.size - start)
        yield _fill(tensor, start, count, raw, wide[: count * parts])


def stored(block: np.ndarray, tensor: Tensor) -> int:
    """The bytes in the file of a block of `blocks`."""
    parts = 2 if tensor.dtype.kind == "c" else 1
    return block.size // parts * tensor.dtype.itemsize


def read(tensor: Tensor, low: int, high: int) -> np.ndarray:
    """Entries [low, high) of a real tensor as float64."""
    raw = np.empty((high - low) * tensor.dtype.itemsize, np.uint8)
    return _fill(tensor, low, high - low, raw, np.empty(high - low))


def _fill(
    tensor: Tensor, first: int, count: int, raw: np.ndarray, wide: np.ndarray
) -> np.ndarray:
    """Reads `count` entries through `raw` into `wide`; a complex entry is two."""
    width = tensor.dtype.itemsize
    raw = raw[: count * width]
    tensor.read_into(raw, first * width)
    x = raw.view(tensor.dtype)
    if x.dtype.kind == "c":
        x = x.view(f"f{width // 2}")
    with np.errstate(invalid="ignore"):  # a signalling NaN stays one
        np.copyto(wide, x, casting="unsafe")
    return wide


def threads(fn: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """Maps in order, on every core: reading and numpy release the interpreter."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        try:
            yield from pool.map(fn, items)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
