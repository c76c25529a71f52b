"""Looking up: positions of an axis that are chosen by an index."""

from typing import Any

import numpy as np

from ._axis_shape import Shapes
from ._constants import uniform
from ._terms import Term, fresh, pin, reorder, unify
from ._values import (
    Mark,
    Operand,
    Trace,
    Value,
    meet,
    plain,
    positions,
    record,
    slice_axis,
    use,
)


def gather(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Windows of an array at given positions.

    A looked-up axis is pinned, unless the index is known to be one of its positions.
    """
    numbers, sizes, (shape,) = (
        params["dimension_numbers"],
        params["slice_sizes"],
        shapes,
    )
    x, index = use(trace, xs[0]), xs[1]
    if x.index is not None:
        x = plain(trace, x)
    collapsed, paired = numbers.collapsed_slice_dims, numbers.operand_batching_dims
    if isinstance(index, np.ndarray) and (out := _by_constant(params, x, index, shape)):
        return [out]
    one = len(numbers.start_index_map) == 1 and tuple(collapsed) == tuple(
        numbers.start_index_map
    )
    typed = one and _points_into(index, x.shape[collapsed[0]])
    where = use(trace, index) if typed else plain(trace, index)
    for a, b in zip(paired, numbers.start_indices_batching_dims, strict=True):
        unify(x.axes[a], where.axes[b])
    axes: list[Term | None] = [None] * len(shape)
    window = [i for i in range(len(x.shape)) if i not in (*collapsed, *paired)]
    for i, o in zip(window, numbers.offset_dims, strict=True):
        whole = sizes[i] == x.shape[i]
        axes[o] = x.axes[i] if whole else _unknown(x.axes[i], shape[o])
    lead = [o for o in range(len(shape)) if o not in numbers.offset_dims]
    for o, term in zip(lead, where.axes[:-1], strict=True):
        axes[o] = term
    marks: tuple[Mark, ...] = ()
    for i in collapsed:
        if not typed:
            _unknown(x.axes[i], 1)
        elif x.axes[i] is not None:
            assert where.index is not None
            unify(x.axes[i], positions(where.index))
            at = tuple(o for o in lead if shape[o] != 1)
            marks = (Mark(x.axes[i], where.index.token, at),)
    return [Value(shape, tuple(axes), None, marks)]


def _points_into(x: Operand, size: int) -> bool:
    """Is it an index into an axis of that length?"""
    if not isinstance(x, Value) or x.index is None:
        return False
    return x.index.term.size == size


def _by_constant(
    params: dict[str, Any], x: Value, index: np.ndarray, shape: tuple
) -> Value | None:
    """The gather of known positions of one axis, one by one: perhaps a reordering."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else None
    if axis is None or sizes[axis] != 1 or numbers.operand_batching_dims:
        return None
    others = [i for i in range(len(x.shape)) if i != axis]
    if any(sizes[i] != x.shape[i] for i in others):
        return None
    at = index.reshape(-1).tolist()
    if any(not 0 <= i < x.shape[axis] for i in at):
        return None
    lead = [o for o in range(len(shape)) if o not in numbers.offset_dims]
    many = [o for o in lead if shape[o] != 1]
    if axis not in numbers.collapsed_slice_dims or len(many) > 1:
        return None
    axes: list[Term | None] = [None] * len(shape)
    for i, o in zip(others, numbers.offset_dims, strict=True):
        axes[o] = x.axes[i]
    term = x.axes[axis]
    if many and term is not None:
        if sorted(at) == list(range(x.shape[axis])):
            axes[many[0]] = reorder(term, at)
        elif at == list(range(at[0], at[0] + len(at))):
            axes[many[0]] = slice_axis(term, at[0], at[0] + len(at))
        else:
            axes[many[0]] = _unknown(term, shape[many[0]])
    elif term is not None:
        slice_axis(term, at[0], at[0] + 1)
    return Value(shape, tuple(axes))


def _unknown(term: Term | None, size: int) -> Term | None:
    """Pins an axis that is cut at an unknown place."""
    if term is None:
        return None
    pin(term)
    return fresh(size, pinned=True) if size != 1 else None


def dynamic_slice(
    trace: Trace, params: dict, xs: list, shapes: Shapes
) -> list[Operand]:
    """A slice that starts where the operands say: known, an index, or unknown."""
    del params
    x, shape = use(trace, xs[0]), shapes[0]
    token = None if x.index is None else object()
    index = x.index and x.index._replace(token=token)
    axes: list[Term | None] = []
    marks: list[Mark] = []
    for k, (term, start, n) in enumerate(zip(x.axes, xs[1:], shape, strict=True)):
        known = uniform(start)
        if n == x.shape[k]:
            axes.append(term)
        elif known is not None and 0 <= known <= x.shape[k] - n:
            axes.append(slice_axis(term, int(known), int(known) + n))
        elif n == 1 and _points_into(start, x.shape[k]):
            axes.append(None)
            unify(term, positions(start.index))
            if term is not None:
                marks.append(Mark(term, start.index.token, ()))
        else:
            plain(trace, start)
            axes.append(_unknown(term, n))
    return [Value(shape, tuple(axes), index, tuple(marks))]


def dynamic_update_slice(
    trace: Trace, params: dict, xs: list, shapes: Shapes
) -> list[Operand]:
    """Axes that are written whole are one; the others are pinned."""
    del params
    x, update = plain(trace, xs[0]), plain(trace, xs[1])
    for start in xs[2:]:
        plain(trace, start)
    axes: list[Term | None] = []
    for k, (a, b) in enumerate(zip(x.axes, update.axes, strict=True)):
        if x.shape[k] == update.shape[k]:
            axes.append(meet(a, b))
        else:
            _unknown(a, 1)
            _unknown(b, 1)
            axes.append(fresh(x.shape[k], pinned=True))
    record(trace, [t for k, t in enumerate(axes) if x.shape[k] == update.shape[k]])
    return [Value(shapes[0], tuple(axes))]


def iota(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Positions too many to be worth a constant."""
    del trace, xs
    axes = tuple(fresh(n, pinned=True) if k == params["dimension"] and n != 1 else None
                 for k, n in enumerate(shapes[0]))  # fmt: skip
    return [Value(shapes[0], axes)]
