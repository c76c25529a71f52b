"""How each operation moves the split axis of its operands to its result."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ._program import Op, Program

KTH = "kth_largest_rows"

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bitcast_convert_type
    cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne neg
    nextafter not or population_count pow reduce_precision rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor""".split()
)
REDUCTIONS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "min",
    "reduce_or": "max",
}
MADE = frozenset({"broadcast_in_dim", "iota", "random_bits"})  # of any length


class Split(NamedTuple):
    """How a value is cut: `per_row` entries of `axis` for each row of leaf `group`."""

    group: int
    axis: int
    per_row: int


class Refused(ValueError):
    """A program that cannot be evaluated block by block."""


class Sweep(NamedTuple):
    program: Program
    splits: dict[int, Split]
    rows: tuple[int, ...]
    loose: dict[int, None]  # made from nothing split: small, or cut on demand
    made_by: dict[int, tuple[Op, dict[str, Any]]]
    stage: dict[int, int]

    def shape(self, value: int) -> tuple[int, ...]:
        return self.program.avals[value].shape


def apply(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> None:
    """Finds the split axis of what an operation on split values returns."""
    rule = _elementwise if op.name in ELEMENTWISE else _RULES.get(op.name)
    if rule is None:
        raise Refused(f"{op.name} is not known to work block by block")
    out = rule(sweep, op, params, cut)
    for value in op.outputs:
        sweep.splits[value] = out


def assign(sweep: Sweep, value: int, want: Split) -> None:
    """Cuts a loose value, and what it was made of, the way its partner is cut."""
    if value in sweep.splits:
        if sweep.splits[value] != want:
            raise Refused("one made value is cut in two ways")
        return
    if value not in sweep.loose or value not in sweep.made_by:
        raise Refused("a value as long as the leaf is neither read nor made")
    op, params = sweep.made_by[value]
    if op.name == "broadcast_in_dim":
        dims = params["broadcast_dimensions"]
        operand = sweep.shape(op.inputs[0])
        if want.axis in dims and operand[dims.index(want.axis)] != 1:
            raise Refused("a constant as long as the leaf")
    elif op.name in ELEMENTWISE:
        for i in op.inputs:
            shape = sweep.shape(i)
            if len(shape) > want.axis and shape[want.axis] != 1:
                assign(sweep, i, want)
    elif op.name not in MADE:
        raise Refused(f"{op.name} of a made value")
    sweep.splits[value] = want


def _elementwise(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del params
    found = {c for c in cut if c is not None}
    if len(found) != 1:
        raise Refused(f"{op.name} meets values cut in different ways")
    (out,) = found
    for value, c in zip(op.inputs, cut, strict=True):
        shape = sweep.shape(value)
        if c is None and len(shape) > out.axis and shape[out.axis] != 1:
            assign(sweep, value, out)
    return out


def _reduce(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del sweep, op
    (c,) = cut
    assert c is not None
    return c._replace(axis=c.axis - sum(a < c.axis for a in params["axes"]))


def _reduce_other(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    c = cut[0]
    assert c is not None
    if c.axis in params["axes"]:
        raise Refused(f"{op.name} over the split axis")
    return _reduce(sweep, op, params, cut)


def _broadcast(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    c = cut[0]
    assert c is not None
    axis = params["broadcast_dimensions"][c.axis]
    if params["shape"][axis] != sweep.shape(op.inputs[0])[c.axis]:
        raise Refused("a split axis is broadcast")
    return c._replace(axis=axis)


def _squeeze(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del sweep, op
    c = cut[0]
    assert c is not None
    if c.axis in params["dimensions"]:
        raise Refused("the split axis is squeezed")
    return c._replace(axis=c.axis - sum(d < c.axis for d in params["dimensions"]))


def _transpose(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del sweep, op
    c = cut[0]
    assert c is not None
    return c._replace(axis=tuple(params["permutation"]).index(c.axis))


def _reshape(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    c = cut[0]
    assert c is not None
    old, new = sweep.shape(op.inputs[0]), params["new_sizes"]
    rows = sweep.rows[c.group]
    before = int(np.prod(old[: c.axis], dtype=np.int64))
    for axis, length in enumerate(new):
        same = int(np.prod(new[:axis], dtype=np.int64)) == before
        if same and (length > 1 or rows == 1) and length % rows == 0:
            return Split(c.group, axis, length // rows)
    raise Refused(f"reshape {old} -> {new} breaks up the rows")


def _slice(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    c = cut[0]
    assert c is not None
    full = sweep.shape(op.inputs[0])[c.axis]
    strides = params["strides"]
    whole = params["start_indices"][c.axis] == 0
    whole &= params["limit_indices"][c.axis] == full
    if not whole or (strides is not None and strides[c.axis] != 1):
        raise Refused("a slice of the split axis")
    return c


def _along(key: str) -> Callable[..., Split]:
    """The rule of an operation that works along one axis, which may not be split."""

    def rule(
        sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
    ) -> Split:
        found = next(c for c in cut if c is not None)
        axes = params[key] if isinstance(params[key], tuple) else (params[key],)
        if found.axis in axes:
            raise Refused(f"{op.name} along the split axis")
        for value in op.inputs:
            assign(sweep, value, found)
        return found

    return rule


def _dot(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    (left, right), (batch_l, batch_r) = params["dimension_numbers"]
    a, b = cut
    if a is not None and b is not None:
        raise Refused("a matrix product whose result is split twice")
    side = 0 if a is not None else 1
    c, contract, batch = ((a, left, batch_l), (b, right, batch_r))[side]
    assert c is not None
    if c.axis in batch:
        raise Refused("a batched matrix product over the split axis")
    gone = (*contract, *batch)
    free = c.axis - sum(d < c.axis for d in gone)
    ndim = len(sweep.shape(op.inputs[0]))
    skip = len(batch_l) + (ndim - len(left) - len(batch_l) if side else 0)
    return c._replace(axis=skip + free)


_RULES: dict[str, Callable[..., Split]] = {
    **dict.fromkeys(REDUCTIONS, _reduce),
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "reshape": _reshape,
    "slice": _slice,
    "concatenate": _along("dimension"),
    "dot_general": _dot,
    "sort": _along("dimension"),
    "cumsum": _along("axis"),
    "cummax": _along("axis"),
    "cummin": _along("axis"),
    "cumprod": _along("axis"),
    "rev": _along("dimensions"),
    **dict.fromkeys(("argmax", "argmin", "reduce_prod"), _reduce_other),
}
