"""Operations that move, join, split and repeat axes."""

from collections.abc import Sequence
import math
from typing import Any

from ._terms import LEAF, Term, chain, find, fresh, product, take, unify
from ._values import Operand, Pieces, Trace, Value, emit, plain

Shapes = list[tuple[int, ...]]


def moved(
    x: Value, shape: tuple[int, ...], sources: Sequence[int | None], token: Any = None
) -> Value:
    """A value whose axis k is axis `sources[k]` of x, or new; marks move along."""
    axes = tuple(
        None if s is None or n == 1 else x.axes[s]
        for s, n in zip(sources, shape, strict=True)
    )
    index = x.index
    if index is not None and token is not None:
        index = index._replace(token=(index.token, token))
    marks = x.marks and tuple(
        m._replace(axes=tuple(map(sources.index, m.axes)))
        for m in x.marks if set(m.axes) <= set(sources)
    )  # fmt: skip
    return Value(shape, axes, index, marks)


def transpose(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Axes in another order."""
    del trace
    order = params["permutation"]
    return [moved(xs[0], shapes[0], order, ("transpose", order))]


def broadcast(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """New and lengthened axes hold equal entries: they are free."""
    del trace
    (x, *_), (shape,) = xs, shapes
    sources: list[int | None] = [None] * len(shape)
    for k, d in enumerate(params["broadcast_dimensions"]):
        sources[d] = k if x.shape[k] == shape[d] else None
    units = math.prod(x.shape) == math.prod(shape)
    token = None if units else ("broadcast", shape, params["broadcast_dimensions"])
    return [moved(x, shape, sources, token)]


def squeeze(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Axes of length 1 are left out."""
    del trace
    rank = len(xs[0].shape)
    gone = {d % rank for d in params["dimensions"]}
    return [moved(xs[0], shapes[0], [k for k in range(rank) if k not in gone])]


def reshape(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Matches runs of axes of equal product; splits and merges them as products."""
    del params
    (x,), (shape,) = xs, shapes
    runs = _runs(x.shape, shape)
    if runs is None:  # an axis of length 0: nothing to permute
        return [Value(shape, tuple(None if n == 1 else fresh(n, pinned=True)
                                   for n in shape))]  # fmt: skip
    sources = {b[0]: a[0] for a, b in runs if len(a) == len(b) == 1}
    if len(sources) == len(runs):  # only axes of length 1 come or go
        return [moved(x, shape, [sources.get(k) for k in range(len(shape))])]
    if x.index is not None:
        x = plain(trace, x)
    axes: list[Term | None] = [None] * len(shape)
    for number, (old, new) in enumerate(runs):
        terms = [x.axes[k] for k in old]
        if all(t is None for t in terms):
            continue
        whole = product(t or fresh(x.shape[k]) for t, k in zip(terms, old, strict=True))
        if len(new) == 1:
            axes[new[0]] = whole
            continue
        pieces = _cut(trace, whole, shape[new[0]], number) if len(old) == 1 else None
        if pieces:
            return [_in_pieces(trace, x, shape, runs, number, pieces)]
        factors = [fresh(shape[k]) for k in new]
        trace.splits[(*trace.place, number)] = factors[0]
        unify(whole, product(factors))
        for k, factor in zip(new, factors, strict=True):
            axes[k] = factor
    return [Value(shape, tuple(axes))]


def _runs(old: tuple, new: tuple) -> list[tuple[list[int], list[int]]] | None:
    """The shortest groups of axes, old and new, of equal product; without units."""
    if 0 in old:
        return None
    left = [k for k, n in enumerate(old) if n != 1][::-1]
    right = [k for k, n in enumerate(new) if n != 1][::-1]
    out = []
    while left and right:
        a, b = [left.pop()], [right.pop()]
        x, y = old[a[0]], new[b[0]]
        while x != y:
            if x < y:
                a.append(left.pop())
                x *= old[a[-1]]
            else:
                b.append(right.pop())
                y *= new[b[-1]]
        out.append((a, b))
    return out


def _cut(trace: Trace, whole: Term, major: int, number: int) -> list[Term] | None:
    """A term in the pieces that its major factor is to be cut into, if it is.

    A leaf remembers whether it was cut evenly.
    """
    sizes = trace.cuts.get((*trace.place, number))
    if sizes is None or sum(sizes) != major:
        return None
    unit = whole.size // major
    if find(whole).kind == LEAF and not find(whole).pinned:
        even = chain(fresh(s * unit) for s in sizes)
        even.even = True
        unify(whole, even)
    pieces, offset = [], 0
    for s in sizes:
        piece = take(whole, offset * unit, (offset + s) * unit)
        if piece is None:
            return None
        pieces.append(piece)
        offset += s
    return pieces


def _in_pieces(
    trace: Trace, x: Value, shape: tuple, runs: list, number: int, pieces: list[Term]
) -> Pieces:
    """A reshape whose major factor is cut: each piece is reshaped for itself."""
    (old,), new = runs[number]
    unit = math.prod(shape[k] for k in new[1:])
    values, start = [], 0
    for i, piece in enumerate(pieces):
        before = (*x.shape[:old], piece.size, *x.shape[old + 1 :])
        after = (*shape[: new[0]], piece.size // unit, *shape[new[0] + 1 :])
        axes = (*x.axes[:old], piece, *x.axes[old + 1 :])
        cut = {"axis": old, "start": start}
        part = emit(trace, "cut", cut, [x], Value(before, axes))
        trace.place.append(-1 - i)
        out = reshape(trace, {}, [part], [after])[0]
        trace.place.pop()
        assert isinstance(out, Value)
        values.append(emit(trace, "reshape", {}, [part], out))
        start += piece.size
    return Pieces(shape, new[0], tuple(values))
