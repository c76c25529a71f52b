"""Operations that cut an axis or put axes one after the other."""

from collections.abc import Sequence
from typing import Any

from ._axis_shape import Shapes, moved
from ._terms import Term, chain, find, fresh, pin, product, reorder, unify
from ._values import (
    Operand,
    Pieces,
    Sliced,
    Trace,
    Value,
    emit,
    join,
    meet,
    plain,
    record,
    slice_axis,
    use,
)


def concatenate(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """A concatenation; slices that make up their whole again are a reordering."""
    axis, first = params["dimension"], xs[0]
    if all(
        isinstance(x, Sliced) and x.axis == axis and x.base is first.base for x in xs
    ):
        order = [x.start + i for x in xs for i in range(x.shape[axis])]
        base = first.base
        term = base.axes[axis]
        if sorted(order) == list(range(base.shape[axis])) and term is not None:
            axes = (*base.axes[:axis], reorder(term, order), *base.axes[axis + 1 :])
            return [Value(shapes[0], axes)]
    return [join(trace, [plain(trace, x) for x in xs], axis)]


def reverse(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """An axis from its other end: its parts change places."""
    axes = list(xs[0].axes)
    for k in params["dimensions"]:
        term = axes[k] and find(axes[k])
        if term and term.kind == "" and term.pinned:
            axes[k] = None
            record(trace, axes)
            axes[k] = fresh(term.size, pinned=True)
        elif term:
            axes[k] = reorder(term, range(term.size - 1, -1, -1))
    index = xs[0].index
    if index is not None:
        index = index._replace(token=(index.token, "rev", params["dimensions"]))
    return [Value(shapes[0], tuple(axes), index)]


def slice_(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """A slice; of one axis only, it waits for what becomes of it."""
    (x,), (shape,) = xs, shapes
    rank = len(shape)
    steps = params["strides"] or (1,) * rank
    ends = list(
        zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    )
    cut = [k for k in range(rank) if shape[k] != x.shape[k]]
    if isinstance(x, Pieces):
        if cut == [x.axis] and ends[x.axis][2] == 1:
            some = _pieces_within(x, *ends[x.axis][:2])
            if some is not None:
                return [some]
        x = use(trace, x)
    assert isinstance(x, Value)
    if len(cut) == 1 and ends[cut[0]][2] == 1 and x.index is None:
        return [Sliced(shape, x, cut[0], ends[cut[0]][0])]
    axes = list(x.axes)
    for k in cut:
        axes[k] = _strided(axes[k], *ends[k]) if shape[k] != 1 else slice_axis(
            axes[k], ends[k][0], ends[k][0] + 1)  # fmt: skip
    index = x.index and x.index._replace(token=(x.index.token, "slice", tuple(ends)))
    return [emit(trace, "slice", params, [x], Value(shape, tuple(axes), index))]


def _strided(term: Term | None, start: int, stop: int, step: int) -> Term | None:
    """The term of `x[start:stop:step]`: one residue, if the step divides the axis."""
    if step == 1 or term is None:
        return slice_axis(term, start, stop)
    length = -(-(stop - start) // step)
    if term.size % step == 0 and start < step and length == term.size // step:
        residues = fresh(length), fresh(step, pinned=True)
        unify(term, product(residues))
        return residues[0]
    pin(term)
    return fresh(length, pinned=True)


def _pieces_within(x: Pieces, start: int, stop: int) -> Operand | None:
    """The pieces from start to stop, if that is where some begin and end."""
    found, offset = [], 0
    for v in x.values:
        end = offset + v.shape[x.axis]
        if start <= offset and end <= stop:
            found.append(v)
        elif start < end and offset < stop:
            return None
        offset = end
    if len(found) < 2:
        return found[0] if found else None
    shape = (*x.shape[: x.axis], stop - start, *x.shape[x.axis + 1 :])
    return Pieces(shape, x.axis, tuple(found))


def split(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Pieces of an axis, one after another."""
    axis, offset, out = params["axis"], 0, []
    for shape in shapes:
        start = [0] * len(shape)
        start[axis] = offset
        offset += shape[axis]
        ends = [a + n for a, n in zip(start, shape, strict=True)]
        cut = {"start_indices": start, "limit_indices": ends, "strides": None}
        out += slice_(trace, cut, xs, [shape])
    return out


def unstack(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Every index of an axis, without the axis."""
    (x,), axis = xs, params["axis"]
    rank = len(x.shape)
    unit = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
    cut = split(trace, {"axis": axis}, [x], [unit] * x.shape[axis])
    rest = [k for k in range(rank) if k != axis]
    out: list[Operand] = []
    for v, s in zip((use(trace, v) for v in cut), shapes, strict=True):
        one = moved(v, s, rest)
        out.append(emit(trace, "squeeze", {"dimensions": (axis,)}, [v], one))
    return out


def stack(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Operands along a new axis, which is pinned: each is its own."""
    del trace
    axis, shape = params["axis"], shapes[0]
    axes = xs[0].axes
    for x in xs[1:]:
        axes = tuple(map(meet, axes, x.axes))
    new = fresh(len(xs), pinned=True) if len(xs) > 1 else None
    return [Value(shape, (*axes[:axis], new, *axes[axis:]))]


def pad(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Padding puts exchangeable positions on both sides; within an axis, it pins."""
    del trace
    x, axes = xs[0], list(xs[0].axes)
    for k, (low, high, inside) in enumerate(params["padding_config"]):
        term, size = axes[k], shapes[0][k]
        if (low, high, inside) == (0, 0, 0):
            continue
        whole = term or fresh(x.shape[k])
        if inside or low < 0 or high < 0:
            pin(whole)
            axes[k] = fresh(size, pinned=True)
        else:
            axes[k] = chain([fresh(low), whole, fresh(high)])
    return [
        Value(
            shapes[0],
            tuple(t if n != 1 else None for t, n in zip(axes, shapes[0], strict=True)),
        )
    ]


def piecewise(
    trace: Trace, name: str, params: dict[str, Any], xs: Sequence[Any], shape: tuple
) -> tuple[int, list[list[Any]], list[tuple]] | None:
    """Operands and result shape of an operation, for each piece of its operands.

    Returns the axis of the result that is in pieces too; None if it cannot be.
    """
    whole = next(x for x in xs if isinstance(x, Pieces))
    axis, sizes = whole.axis, [v.shape[whole.axis] for v in whole.values]
    operands: list[list[Any]] = [[] for _ in sizes]
    for x in xs:
        if isinstance(x, Pieces):
            if (x.axis, [v.shape[axis] for v in x.values]) != (axis, sizes):
                return None
            parts_of = list(x.values)
        else:
            x = use(trace, x)
            if len(x.shape) == len(whole.shape):
                if x.axes[axis] is not None:
                    return None
                parts_of = [
                    x._replace(shape=(*x.shape[:axis], s, *x.shape[axis + 1 :]))
                    for s in sizes
                ]
            else:
                parts_of = [x] * len(sizes)
        for args, part in zip(operands, parts_of, strict=True):
            args.append(part)
    out = _axis_after(name, params, whole.shape, shape, axis)
    if out is None:
        return None
    shapes = [(*shape[:out], s, *shape[out + 1 :]) for s in sizes]
    return out, operands, shapes


def _axis_after(
    name: str, params: dict[str, Any], old: tuple, new: tuple, axis: int
) -> int | None:
    """Where an operation moves an axis that it leaves whole."""
    if name == "transpose":
        return list(params["permutation"]).index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    if name in ("squeeze", "reduce_sum", "reduce_max", "reduce_min"):
        gone = params["dimensions" if name == "squeeze" else "axes"]
        return None if axis in gone else axis - sum(d < axis for d in gone)
    return axis if len(old) == len(new) and name != "reshape" else None
