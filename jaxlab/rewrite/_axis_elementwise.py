"""Entry by entry: the axes of the operands are one; and what that does to indices."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._constants import is_range, uniform
from ._terms import Term, find, unify
from ._values import Mark, Operand, Trace, Value, meet, plain, positions, use

ANALYTIC = frozenset(
    """abs acos acosh add add_any asin asinh atan atan2 atanh cbrt
    convert_element_type copy copy_p cos cosh div erf erf_inv erfc exp exp2 expm1
    integer_pow lgamma digamma log log1p logistic mul mul_add neg optimization_barrier
    pow reduce_precision rsqrt sin sinh sqrt square stop_gradient sub tan tanh
    """.split()
)  # entries that differ by chance differ after it
SAME = frozenset(
    """copy copy_p stop_gradient optimization_barrier sharding_constraint name pvary
    pcast reduce_precision""".split()
)
ELEMENTWISE = (
    ANALYTIC
    | SAME
    | frozenset(
        """and bessel_i0e bessel_i1e bitcast_convert_type ceil clamp clz complex conj
        eq floor ge gt igamma igammac imag is_finite le lt max min ne nextafter not or
        polygamma population_count real regularized_incomplete_beta rem round select_n
        shift_left shift_right_arithmetic shift_right_logical sign symbolic_zeros xor
        zeta""".split()
    )
)
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def elementwise(
    trace: Trace, name: str, params: dict[str, Any], xs: Sequence[Operand], shape: tuple
) -> Operand:
    """One result of an operation that works entry by entry."""
    if name == "select_n" and (which := uniform(xs[0])) is not None:
        return xs[1 + int(which)]
    if any(type(x) is Value and x.index is not None for x in xs):
        out = _of_indices(name, params, xs, shape)
        if out is not None:
            return out
        xs = [plain(trace, x) for x in xs]
    values = [x if type(x) is Value else use(trace, x) for x in xs]
    full = [v for v in values if len(v.shape) == len(shape)]
    axes = full[0].axes
    for v in full[1:]:
        if v.axes != axes:
            axes = tuple(map(meet, axes, v.axes))
    marks = shared_marks(values) if any(v.marks for v in values) else ()
    return Value(shape, axes, None, marks)


def shared_marks(values: Sequence[Value]) -> tuple[Mark, ...]:
    """The marks that hold of a combination: no two operands may differ in one."""
    found: dict[Any, Mark | None] = {}
    for mark in (m for v in values for m in v.marks):
        term = find(mark.term)
        seen = found.setdefault(term, mark)
        if seen is not None and (seen.token, seen.axes) != (mark.token, mark.axes):
            found[term] = None
    return tuple(m for m in found.values() if m is not None)


def _of_indices(
    name: str, params: dict[str, Any], xs: Sequence[Operand], shape: tuple
) -> Operand | None:
    """The result where an operand is an index; None if it is used as a number."""
    where = next(i for i, x in enumerate(xs) if type(x) is Value and x.index)
    x = xs[where]
    assert isinstance(x, Value)
    assert x.index is not None
    others = [y for i, y in enumerate(xs) if i != where]
    known: list[Any] = [uniform(y) for y in others]
    last = x.index.term.size - 1
    if name in SAME:
        return x
    if name == "convert_element_type":
        fits = np.dtype(params["new_dtype"]).kind in "iu"
        return x if fits else None
    if name in _COMPARE and known[0] is not None and x.index.safe:
        pair = (0, known[0]), (last, known[0])
        low, high = (bool(_COMPARE[name](*(p if where == 0 else p[::-1])))
                     for p in pair)  # fmt: skip
        outside = not 0 <= known[0] <= last
        if low == high and (outside or name not in ("eq", "ne")):
            return np.broadcast_to(np.asarray(low), shape)
        return None
    if name in ("eq", "ne"):
        return _match(x, others[0], shape)
    bounds = [int(k) for k in known if k is not None]
    if name in ("max", "min", "clamp") and len(bounds) == len(known):
        low = 0 if name == "min" else bounds[0]
        high = last if name == "max" else bounds[-1]
        return x if where == (name == "clamp") and low <= 0 and high >= last else None
    if name in ("add", "sub") and known[0] is not None:
        return x._replace(index=x.index._replace(safe=False))
    return None


def _match(x: Value, y: Operand, shape: tuple) -> Value | None:
    """An index compared with another, or with all positions: a one-hot code."""
    assert x.index is not None
    axes: list[Term | None] = [None] * len(shape)
    if len(x.shape) == len(shape):
        axes = list(x.axes)
    if isinstance(y, np.ndarray):
        k = is_range(y)
        term = x.index.term
        if k is None or shape[k] != term.size or axes[k] is not None:
            return None
        axes[k] = positions(x.index)
        return Value(shape, tuple(axes))
    if (
        type(y) is not Value
        or y.index is None
        or y.index.term.size != x.index.term.size
    ):
        return None
    unify(positions(x.index), positions(y.index))
    if len(y.shape) == len(shape):
        axes = list(map(meet, axes, y.axes))
    return Value(shape, tuple(axes))


def distinct(x: Operand, axis: int | None) -> bool:
    """Do entries along an axis differ with probability one?

    Then a position that is chosen by size is well defined. axis None: is the value
    not zero with probability one?
    """
    if not isinstance(x, Value):
        return axis is None
    if x.origin is None or (axis is not None and x.axes[axis] is None):
        return False
    name, params, operands = x.origin
    if name in ANALYTIC:
        return _distinct_elementwise(name, operands, axis)
    if name == "dot_general":
        return axis is None or _distinct_dot(params, operands, axis)
    if name == "param" or name not in _MOVES:
        return name == "param"
    if axis is None:
        return distinct(operands[0], None)
    back = _MOVES[name](params, operands[0].shape, x.shape, axis)
    return back is not None and distinct(operands[0], back)


def _distinct_elementwise(
    name: str, operands: Sequence[Operand], axis: int | None
) -> bool:
    values = [y for y in operands if isinstance(y, Value)]
    if axis is None:
        return all(distinct(y, None) for y in values)
    along = [y for y in values if len(y.shape) > axis and y.axes[axis] is not None]
    rest = [y for y in values if not any(y is a for a in along)]
    if name in ("mul", "div", "mul_add") and not all(distinct(y, None) for y in rest):
        return False
    return bool(along) and all(distinct(y, axis) for y in along)


def _distinct_dot(params: dict[str, Any], xs: Sequence[Operand], axis: int) -> bool:
    (lc, rc), (lb, rb) = params["dimension_numbers"]
    if axis < len(lb):
        return distinct(xs[0], lb[axis]) or distinct(xs[1], rb[axis])
    free = [(0, k) for k in range(len(xs[0].shape)) if k not in (*lb, *lc)]
    free += [(1, k) for k in range(len(xs[1].shape)) if k not in (*rb, *rc)]
    which, k = free[axis - len(lb)]
    return distinct(xs[which], k)


def _of_reduced(params: dict, old: tuple, new: tuple, axis: int) -> int:
    """The axis of the operand of a reduction that is this axis of its result."""
    del new
    return [k for k in range(len(old)) if k not in params["axes"]][axis]


def _of_broadcast(params: dict, old: tuple, new: tuple, axis: int) -> int | None:
    del old, new
    dims = list(params["broadcast_dimensions"])
    return dims.index(axis) if axis in dims else None


def _of_reshaped(params: dict, old: tuple, new: tuple, axis: int) -> int | None:
    del params
    before = int(np.prod(new[:axis]))
    for k, n in enumerate(old):
        if n == new[axis] and int(np.prod(old[:k])) == before and n > 1:
            return k
    return None


_MOVES: dict[str, Callable[[dict, tuple, tuple, int], int | None]] = {
    "transpose": lambda params, _, __, axis: params["permutation"][axis],
    "broadcast_in_dim": _of_broadcast,
    "layer": _of_broadcast,
}
_MOVES |= dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _of_reduced)
_MOVES |= dict.fromkeys(("reshape", "squeeze", "expand_dims"), _of_reshaped)
