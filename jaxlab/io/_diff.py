"""How two checkpoints differ: by tensor, by layer and in total, in bounded memory."""

import dataclasses as dc
import math
import re

import numpy as np

from ._checkpoint import Checkpoint, Tensor
from ._rank import effective_rank
from ._report import BLOCK, Advance, blocks, natural, read, stored, threads

RANK_SIDE = 2048  # the smaller side up to which an effective rank takes about a second


@dc.dataclass(frozen=True)
class Change:
    """How b differs from a, over the entries that are finite in both."""

    name: str
    entries: int
    norm: float  # of a
    delta: float  # $\\|b - a\\|$
    relative: (
        float  # $\\|b - a\\| / \\|a\\|$; infinite where only a is 0, 0 where both are
    )
    cosine: float  # of a and b; 0 where either is 0
    conflict: float  # share of the entries with $a_i b_i < 0$
    largest: float  # $\\max |b_i - a_i|$
    rank: float | None  # effective rank of b - a; None where it was not taken
    nonfinite: int  # entries that are NaN or infinite in a or b


@dc.dataclass(frozen=True)
class Difference:
    """Two checkpoints: every tensor they share, by layer and in total."""

    a: str
    b: str
    total: Change
    layers: tuple[Change, ...]
    tensors: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    mismatched: tuple[str, ...]  # "name: dtype and shape in a, in b"
    unranked: int  # matrices whose smaller side is beyond `rank_side`


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    rank_side: int = RANK_SIDE,
    advance: Advance = lambda _: None,
) -> Difference:
    """Compares two checkpoints tensor by tensor, layer by layer, and in total.

    Tensors are matched by name, where `.` and `/` are one: the formats spell the same
    leaf either way. A layer is what shares a name up to its first number.

    Args:
      a: the reference, for instance the base.
      b: the other, for instance a fine-tuned model.
      rank_side: effective ranks are taken of matrices whose smaller side is at most
        this; the work grows with its cube. 0 takes none.
      advance: called with the number of bytes read since the last call, from any
        thread.

    Returns:
      The changes in natural order, layer 2 before layer 10. A layer's rank is the mean
      over its matrices.

    Degenerate inputs:
      Entries that are NaN or infinite in either are counted and left out.
    """
    shared = _shared(a, b)
    pairs = [(x, y) for x, y in shared if _alike(x, y)]
    sums = list(threads(lambda pair: _moments(*pair, advance), pairs))
    ranks = [_rank(x, y, rank_side, advance) for x, y in pairs]
    tensors = [
        _change(x.name, [s], [r])
        for (x, _), s, r in zip(pairs, sums, ranks, strict=True)
    ]
    groups: dict[str, list[int]] = {}
    for i, (x, _) in enumerate(pairs):
        groups.setdefault(layer(x.name), []).append(i)
    pick = lambda rows: ([sums[i] for i in rows], [ranks[i] for i in rows])
    return Difference(
        str(a.path),
        str(b.path),
        total=_change("total", sums, ranks),
        layers=tuple(_change(name, *pick(rows)) for name, rows in groups.items()),
        tensors=tuple(tensors),
        only_a=_alone(a, {x.name for x, _ in shared}),
        only_b=_alone(b, {y.name for _, y in shared}),
        mismatched=tuple(
            f"{x.name}: {_kind(x)} in a, {_kind(y)} in b"
            for x, y in shared
            if not _alike(x, y)
        ),
        unranked=sum(
            len(x.shape) > 1 and r is None
            for (x, _), r in zip(pairs, ranks, strict=True)
        ),
    )


def work(a: Checkpoint, b: Checkpoint, *, rank_side: int = RANK_SIDE) -> int:
    """The bytes that `diff` tells `advance` of: once per tensor, and once per rank."""
    pairs = [(x, y) for x, y in _shared(a, b) if _alike(x, y)]
    return sum(
        (x.nbytes + y.nbytes) * (2 if _ranked(x, y, rank_side) else 1) for x, y in pairs
    )


def layer(name: str) -> str:
    """The layer of a tensor: its name up to the first number, else its module."""
    parts = re.split(r"[./]", name)
    for i, part in enumerate(parts[:-1]):
        if re.search(r"(^|_)\d+$", part):
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


@dc.dataclass
class _Sums:
    """What one pass over a pair of tensors adds up."""

    entries: int = 0
    aa: float = 0.0
    bb: float = 0.0
    ab: float = 0.0
    dd: float = 0.0
    opposite: int = 0
    largest: float = 0.0
    nonfinite: int = 0


def _moments(a: Tensor, b: Tensor, advance: Advance) -> _Sums:
    s, scratch = _Sums(), np.empty(2 * min(BLOCK, a.size))
    for x, y in zip(blocks(a), blocks(b), strict=True):
        advance(stored(x, a) + stored(y, b))
        if not math.isfinite(np.dot(x, x) + np.dot(y, y)):
            fine = np.isfinite(x) & np.isfinite(y)
            s.nonfinite += int(fine.size - np.count_nonzero(fine))
            x, y = x[fine], y[fine]
        d = np.subtract(y, x, out=scratch[: x.size])
        s.entries += x.size
        s.aa += float(np.dot(x, x))
        s.bb += float(np.dot(y, y))
        s.ab += float(np.dot(x, y))
        s.dd += float(np.dot(d, d))
        s.opposite += int(np.count_nonzero((x < 0) & (y > 0)))
        s.opposite += int(np.count_nonzero((x > 0) & (y < 0)))
        s.largest = max(s.largest, float(np.max(np.abs(d, out=d), initial=0.0)))
    return s


def _change(name: str, parts: list[_Sums], ranks: list[float | None]) -> Change:
    """The statistics of sums, added up over tensors."""
    add = lambda field: sum(getattr(p, field) for p in parts)
    aa, bb, dd, entries = add("aa"), add("bb"), add("dd"), add("entries")
    known = [r for r in ranks if r is not None]
    both = math.sqrt(aa) * math.sqrt(bb)
    return Change(
        name,
        entries,
        norm=math.sqrt(aa),
        delta=math.sqrt(dd),
        relative=math.sqrt(dd / aa) if aa else math.inf if dd else 0.0,
        cosine=min(1.0, max(-1.0, add("ab") / both)) if both else 0.0,
        conflict=add("opposite") / entries if entries else 0.0,
        largest=max((p.largest for p in parts), default=0.0),
        rank=sum(known) / len(known) if known else None,
        nonfinite=add("nonfinite"),
    )


def _rank(a: Tensor, b: Tensor, side: int, advance: Advance) -> float | None:
    """The effective rank of b - a, where one is taken."""
    if not _ranked(a, b, side):
        return None
    rows, columns = square(a.shape)
    seen = 0

    def delta(low: int, high: int) -> np.ndarray:
        nonlocal seen
        x, y = (
            read(t, low * columns, high * columns).reshape(high - low, columns)
            for t in (a, b)
        )
        fresh, seen = max(0, high - seen), max(seen, high)
        advance(fresh * columns * (a.dtype.itemsize + b.dtype.itemsize))
        fine = np.isfinite(x) & np.isfinite(y)
        return np.subtract(y, x, where=fine, out=np.zeros_like(x))

    return effective_rank(delta, rows, columns)


def _ranked(a: Tensor, b: Tensor, side: int) -> bool:
    """Are they real matrices whose smaller side is at most that?"""
    real = "c" not in (a.dtype.kind, b.dtype.kind)
    return real and len(a.shape) > 1 and 0 < min(square(a.shape)) <= side


def square(shape: tuple[int, ...]) -> tuple[int, int]:
    """Splits the axes into rows and columns where the smaller side is largest."""
    cuts = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
    return max(cuts, key=min, default=(1, math.prod(shape)))


def _by_key(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors by name with one separator, or as spelt where that would clash."""
    spelt = dict(checkpoint.tensors)
    joined = {name.replace("/", "."): t for name, t in spelt.items()}
    return joined if len(joined) == len(spelt) else spelt


def _shared(a: Checkpoint, b: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """The pairs of one name, in natural order."""
    left, right = _by_key(a), _by_key(b)
    names = sorted(left.keys() & right.keys(), key=natural)
    return [(left[name], right[name]) for name in names]


def _alone(checkpoint: Checkpoint, shared: set[str]) -> tuple[str, ...]:
    return tuple(sorted(checkpoint.tensors.keys() - shared, key=natural))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Can the two be compared entry by entry?"""
    return a.shape == b.shape and (a.dtype.kind == "c") == (b.dtype.kind == "c")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"
