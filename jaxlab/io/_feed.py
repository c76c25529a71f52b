"""Blocks of tensors, read ahead into aligned memory that JAX takes without a copy."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ._checkpoint import Tensor, aligned
from ._errors import refuse

BLOCK = 2**18  # entries of each input in a block, where there are few inputs
_TOTAL = 2**22  # entries of all inputs in a block, where there are many
_RUNS = 64  # places that a sample is taken from
KEEP = 2**26  # bytes of one leaf that stay in memory between passes


class Group(NamedTuple):
    """The inputs of one output tensor: k tensors of one shape, and perhaps a base."""

    models: tuple[Tensor, ...]
    base: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.models if self.base is None else (*self.models, self.base)

    @property
    def dtype(self) -> np.dtype:
        """The dtype that the models are read in: their own, or the wider of several."""
        dtypes = {t.dtype for t in self.models}
        if len(dtypes) == 1:
            return dtypes.pop()
        return np.dtype("float64" if np.dtype("float64") in dtypes else "float32")

    def avals(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of the stacked models and of the base."""
        shape = self.models[0].shape or (1,)
        models = jax.ShapeDtypeStruct((len(self.models), *shape), self.dtype)
        if self.base is None:
            return (models,)
        return (models, jax.ShapeDtypeStruct(shape, self.base.dtype))


def rows_per_block(group: Group, inner: int) -> int:
    """How many rows of `inner` entries make a block; the same on every machine."""
    inputs = len(group.tensors)
    entries = BLOCK
    while entries * inputs > _TOTAL and entries > 2**12:
        entries //= 2
    return max(1, entries // inner)


class Settings(NamedTuple):
    """What holds for a whole run."""

    seed: int = 0
    allow_nonfinite: bool = False
    seen: Callable[[int], None] = lambda _: None  # told the bytes of every first read


class Feed(NamedTuple):
    """Reads the blocks of one group."""

    group: Group
    rows: int  # along the cut axis
    inner: int  # entries per row
    step: int  # rows per block
    ahead: Executor
    settings: Settings
    kept: list[tuple[int, list[np.ndarray]]]
    shape: tuple[int, ...]  # of one row, as the function sees it

    def blocks(self, *, sample: bool) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Every block, or one block's worth of rows from all over the tensor."""
        if sample:
            yield 0, self._read(self._spread())
            return
        if self.kept:
            yield from self.kept
            return
        nbytes = (
            self.rows * self.inner * sum(t.dtype.itemsize for t in self.group.tensors)
        )
        keep = nbytes <= KEEP
        held = []
        for item in _prefetch(self._all(), self.ahead):
            if keep:
                held.append(item)
            yield item
        self.kept.extend(held)

    def _all(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        for row in range(0, self.rows, self.step):
            runs = [(row, min(row + self.step, self.rows))]
            arrays = self._read(runs)
            self.settings.seen(sum(a.nbytes for a in arrays))
            yield row, arrays

    def _spread(self) -> list[tuple[int, int]]:
        """Runs of rows, evenly spaced, that together make one block."""
        run = max(1, self.step // _RUNS)
        count = min(self.step, self.rows) // run
        starts = np.linspace(0, self.rows - run, count).astype(int)
        return [(int(s), int(s) + run) for s in starts]

    def _read(self, runs: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Reads runs of rows of every input: the stacked models, and the base."""
        rows = sum(stop - start for start, stop in runs)
        dtype = self.group.dtype
        size = rows * self.inner
        stacked = aligned(len(self.group.models) * size * dtype.itemsize).view(dtype)
        stacked = stacked.reshape(len(self.group.models), size)
        for row, tensor in zip(stacked, self.group.models, strict=True):
            if tensor.dtype == dtype:
                self._fill(tensor, runs, row)
            else:
                own = aligned(size * tensor.dtype.itemsize).view(tensor.dtype)
                self._fill(tensor, runs, own)
                row[:] = own.astype(dtype)
        out = [stacked.reshape(len(self.group.models), rows, *self.shape)]
        if self.group.base is not None:
            base = self.group.base
            own = aligned(size * base.dtype.itemsize).view(base.dtype)
            self._fill(base, runs, own)
            out.append(own.reshape(rows, *self.shape))
        return out

    def _fill(
        self, tensor: Tensor, runs: Sequence[tuple[int, int]], out: np.ndarray
    ) -> None:
        at = 0
        for start, stop in runs:
            size = (stop - start) * self.inner
            part = out[at : at + size]
            width = tensor.dtype.itemsize
            tensor.read_into(part.view(np.uint8), start * self.inner * width)
            if not self.settings.allow_nonfinite and not finite(part):
                first = _first_bad(part)
                where = np.unravel_index(start * self.inner + first, tensor.shape)
                why = (
                    f"{part[first]} at {tuple(map(int, where))}; to merge it as it is,"
                )
                why += " allow non-finite values (--allow-nonfinite)"
                raise refuse(tensor.file, why, tensor=tensor.name)
            at += size


def feed(group: Group, flat: bool, ahead: Executor, settings: Settings) -> Feed:
    """Reads a group as one long axis, or in whole rows of its first axis."""
    shape = group.models[0].shape or (1,)
    rows, row_shape = (math.prod(shape), ()) if flat else (shape[0], shape[1:])
    inner = math.prod(row_shape)
    step = rows_per_block(group, max(1, inner))
    return Feed(group, rows, inner, step, ahead, settings, [], tuple(row_shape))


_EXPONENT = {  # dtype name: (bits of magnitude, the smallest that is not finite)
    "bfloat16": (0x7FFF, 0x7F80),
    "float16": (0x7FFF, 0x7C00),
    "float8_e5m2": (0x7F, 0x7C),
    "float8_e4m3fn": (0x7F, 0x7F),
}


def finite(x: np.ndarray) -> bool:
    """Are all values finite? Narrow floats are read as integers, which is quicker."""
    name = x.dtype.name
    if name not in _EXPONENT:
        return bool(np.isfinite(x).all())
    mask, limit = _EXPONENT[name]
    word = np.dtype(f"u{x.dtype.itemsize}").type
    return not x.size or bool((x.view(word) & word(mask)).max() < limit)


def _first_bad(x: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(x.astype(np.float32))))


def _prefetch(items: Iterator[Any], pool: Executor) -> Iterator[Any]:
    """Yields the items while the pool makes the next one."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item
