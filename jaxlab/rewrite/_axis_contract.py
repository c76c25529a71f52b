"""Operations that sum over axes, or mix the positions of one."""

from collections.abc import Sequence

import numpy as np

from ._axis_elementwise import distinct, shared_marks
from ._axis_shape import Shapes, moved
from ._constants import is_range
from ._terms import Term, fresh, pin, product, unify
from ._values import Index, Mark, Operand, Trace, Value, meet, plain, record

REDUCE = frozenset(
    f"reduce_{n}" for n in ("sum", "max", "min", "prod", "and", "or", "xor")
)
WINDOWS = frozenset(
    ["reduce_window"] + [f"reduce_window_{n}" for n in ("sum", "max", "min")]
)
CUMULATIVE = frozenset(f"cum{n}" for n in ("sum", "prod", "max", "min", "logsumexp"))


def dot_general(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Contracted and batch axes are one; an index may depend only on those."""
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    l, r = xs
    batch = [meet(l.axes[i], r.axes[j]) for i, j in zip(lb, rb, strict=True)]
    summed = []
    for i, j in zip(lc, rc, strict=True):
        if l.axes[i] is not None and r.axes[j] is not None:
            unify(l.axes[i], r.axes[j])
            summed.append(l.axes[i])
    lf = [i for i in range(len(l.shape)) if i not in lb and i not in lc]
    rf = [j for j in range(len(r.shape)) if j not in rb and j not in rc]
    left = {i: k for k, i in enumerate((*lb, *lf))}
    right = {j: k for k, j in enumerate((*rb, *range(-len(lf), 0), *rf))}
    marks: tuple[Mark, ...] = ()
    over: tuple[Mark, ...] = ()
    if l.marks or r.marks:
        both = [_carried(l, left), _carried(r, right)]
        marks = shared_marks(both)
        inner = [v._replace(marks=tuple(m for m in v.marks if max(m.axes, default=-1)
                                        < len(lb))) for v in both]  # fmt: skip
        over = tuple(
            m for m in shared_marks(inner)
            if all(any(m.token == o.token for o in v.marks) for v in inner)
        )  # fmt: skip
    if summed:
        record(trace, batch + summed, over)
        for x, free, to in ((l, lf, left), (r, rf, right)):
            # what stays depends on nothing that was summed, even if the other
            # operand brings it back
            record(trace, batch + [x.axes[i] for i in free], _carried(x, to).marks)
    axes = (*batch, *(l.axes[i] for i in lf), *(r.axes[j] for j in rf))
    return [Value(shapes[0], axes, None, marks)]


def _carried(x: Value, axis_of: dict[int, int]) -> Value:
    """An operand whose marks name axes of the result; those that cannot are gone."""
    kept = [m for m in x.marks if all(k in axis_of for k in m.axes)]
    marks = tuple(m._replace(axes=tuple(axis_of[k] for k in m.axes)) for m in kept)
    return x._replace(marks=marks)


def conv(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Channels are groups x channels; positions are mixed, but by 1 x 1 kernels."""
    numbers, groups, (l, r) = (
        params["dimension_numbers"], params["feature_group_count"], xs,
    )  # fmt: skip
    if params["batch_group_count"] != 1:
        return pin_all(trace, "conv_general_dilated", xs, shapes)
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    axes: list[Term | None] = [None] * len(out)
    for k, (i, j, o) in enumerate(zip(lhs[2:], rhs[2:], out[2:], strict=True)):
        same = r.shape[j] == params["window_strides"][k] == 1
        same &= tuple(params["padding"][k]) == (0, 0)
        same &= params["lhs_dilation"][k] == params["rhs_dilation"][k] == 1
        if same:
            axes[o] = l.axes[i]
        else:
            axes[o] = _mixed(l.axes[i], shapes[0][o])
            if r.axes[j] is not None:
                pin(r.axes[j])
    channels, inputs, outputs = l.axes[lhs[1]], r.axes[rhs[1]], r.axes[rhs[0]]
    kept = [l.axes[lhs[0]], *(axes[o] for o in out[2:])]
    if groups == 1:
        if channels is not None and inputs is not None:
            unify(channels, inputs)
            record(trace, [channels])
            record(trace, kept)
            record(trace, [outputs])
    else:
        group = fresh(groups)
        inputs = inputs or fresh(r.shape[rhs[1]])
        each = fresh(r.shape[rhs[0]] // groups)
        unify(channels, product([group, inputs]))
        outputs_by_group = product([group, each])
        unify(outputs, outputs_by_group)
        outputs = outputs or outputs_by_group
        record(trace, [group, inputs])
        record(trace, [group, *kept])
        record(trace, [outputs])
    axes[out[0]], axes[out[1]] = l.axes[lhs[0]], outputs
    axes = [t if n != 1 else None for t, n in zip(axes, shapes[0], strict=True)]
    return [Value(shapes[0], tuple(axes))]


def _mixed(term: Term | None, size: int) -> Term | None:
    """Pins an axis whose positions are mixed, and makes that of the result."""
    if term is not None:
        pin(term)
    return fresh(size, pinned=True) if size != 1 else None


def reduce(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Sums, products and extremes depend on no order."""
    del trace
    gone = params["axes"]
    kept = [k for k in range(len(xs[0].shape)) if k not in gone]
    return [moved(xs[0], shapes[0], kept)]


def windows(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Windows over axes: those are pinned; pooling over others passes."""
    sizes, strides = params["window_dimensions"], params["window_strides"]
    still = [n == s == 1 for n, s in zip(sizes, strides, strict=True)]
    padding = params.get("padding") or ((0, 0),) * len(sizes)
    axes = [k for k, s in enumerate(still) if not s or tuple(padding[k]) != (0, 0)]
    return mix(trace, xs, shapes, axes)


def cumulative(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Sums from one end of an axis: order matters there."""
    return mix(trace, xs, shapes, [params["axis"]])


def mix(
    trace: Trace, xs: Sequence[Value], shapes: Shapes, over: Sequence[int]
) -> list[Operand]:
    """Operands are one; axes `over` are pinned, and nothing else depends on them."""
    axes = xs[0].axes
    for x in xs[1:]:
        axes = tuple(map(meet, axes, x.axes))
    record(trace, [t for k, t in enumerate(axes) if k not in over])
    mixed = [_mixed(axes[k], shapes[0][k]) for k in over]
    out = list(axes)
    for k, term in zip(over, mixed, strict=True):
        out[k] = term
    return [Value(shape, tuple(out)) for shape in shapes]


def sort(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Sorted values depend on no order; what is sorted along with them is an index."""
    axis, keys = params["dimension"], params["num_keys"]
    firm = len(xs) == 1 or distinct(xs[0], axis)
    counts = [isinstance(x, np.ndarray) and is_range(x) == axis for x in xs]
    values = [plain(trace, x) for x, c in zip(xs, counts, strict=True) if not c]
    axes = (None,) * len(shapes[0])
    for x in values:
        axes = tuple(map(meet, axes, x.axes))
    term = axes[axis]
    if term is not None and (not firm or any(counts[:keys])):
        pin(term)
    out = list(axes)
    out[axis] = None
    record(trace, out)
    out[axis] = fresh(shapes[0][axis], pinned=True)
    index = None if term is None else Index(term, object(), True)
    return [Value(s, tuple(out), index if c else None)
            for s, c in zip(shapes, counts, strict=True)]  # fmt: skip


def top_k(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """The largest values in order, and where they were: an index."""
    x = xs[0]
    axis = params.get("axis", -1) % len(x.shape)
    axes = list(x.axes)
    term, axes[axis] = axes[axis] or fresh(x.shape[axis], pinned=True), None
    record(trace, axes)
    axes[axis] = fresh(shapes[0][axis], pinned=True) if shapes[0][axis] != 1 else None
    index = Index(term, object(), distinct(x, axis))
    return [Value(shapes[0], tuple(axes)), Value(shapes[1], tuple(axes), index)]


def extreme(trace: Trace, params: dict, xs: list, shapes: Shapes) -> list[Operand]:
    """Where the largest or smallest entry is: an index."""
    del trace
    (axis,) = params["axes"]
    x = xs[0]
    term = x.axes[axis] or fresh(x.shape[axis], pinned=True)
    axes = (*x.axes[:axis], *x.axes[axis + 1 :])
    return [Value(shapes[0], axes, Index(term, object(), distinct(x, axis)))]


def pin_all(
    trace: Trace, name: str, xs: Sequence[Value], shapes: Shapes
) -> list[Operand]:
    """What is not understood: everything that it touches stays where it is."""
    del trace
    for x in xs:
        for term in x.axes:
            if term is not None:
                pin(term, name)
    return [Value(s, tuple(fresh(n, pinned=True, why=name) if n != 1 else None
                           for n in s)) for s in shapes]  # fmt: skip
