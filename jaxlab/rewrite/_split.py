"""Which axis of each value of a program runs along the rows of a leaf.

One forward sweep over the operations. A value is small (the same whole, whatever the
block), or split: one of its axes has `per_row` entries for every row of leaf `group`,
so a block of rows of the leaf holds a contiguous range of it. What a sum, a maximum or
a count over that axis makes is small again, but known only after a pass over the data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
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


class Stat(NamedTuple):
    """A value that is known after a pass: how the parts of the blocks combine."""

    value: int  # what it is in the program
    how: str  # "sum", "max", "min" or "kth"
    op: Op
    groups: tuple[int, ...]  # the leaves that must be passed over


class Refused(ValueError):
    """A program that cannot be evaluated block by block."""


class Splits(NamedTuple):
    """The answer of `split`."""

    splits: dict[int, Split]
    stats: tuple[Stat, ...]
    stage: dict[int, int]  # after how many passes a value is known


def split(
    program: Program,
    inputs: dict[int, Split],
    outputs: dict[int, Split],
    rows: Sequence[int],
) -> Splits:
    """Follows the split axes from the inputs to the outputs, or raises `Refused`."""
    sweep = _Sweep(program, dict(inputs), tuple(rows), {}, {}, {})
    stats = []
    for op, params in zip(program.ops, program.params, strict=True):
        for out in op.outputs:
            sweep.made_by[out] = (op, params)
        cut = [sweep.splits.get(i) for i in op.inputs]
        stage = max([sweep.stage.get(i, 0) for i in op.inputs], default=0)
        if any(cut) and _joins(op, params, cut):
            groups = tuple(dict.fromkeys(c.group for c in cut if c))
            stats.append(Stat(op.outputs[0], _how(op), op, groups))
            stage += 1
        elif any(cut):
            _apply(sweep, op, params, cut)
        elif _all_loose(sweep, op) or _makes(program, op, params):
            sweep.loose[op.outputs[0]] = None
        for out in op.outputs:
            sweep.stage[out] = stage
    for value, want in outputs.items():
        _assign(sweep, value, want)
    return Splits(sweep.splits, tuple(stats), sweep.stage)


class _Sweep(NamedTuple):
    program: Program
    splits: dict[int, Split]
    rows: tuple[int, ...]
    loose: dict[int, None]  # made from nothing split: small, or cut on demand
    made_by: dict[int, tuple[Op, dict[str, Any]]]
    stage: dict[int, int]

    def shape(self, value: int) -> tuple[int, ...]:
        return self.program.avals[value].shape


def _makes(program: Program, op: Op, params: dict[str, Any]) -> bool:
    """Can the operation make any part of its result alone?"""
    if op.name != "random_bits":
        return op.name in MADE
    counted = jax.config.jax_threefry_partitionable  # pyright: ignore (a dynamic flag)
    threefry = str(program.avals[op.inputs[0]].dtype) == "key<fry>"
    scalar = not program.avals[op.inputs[0]].shape
    return bool(counted) and threefry and scalar and params["bit_width"] == 32


def _all_loose(sweep: _Sweep, op: Op) -> bool:
    """An elementwise operation on something of any length is of any length too."""
    return op.name in ELEMENTWISE and any(i in sweep.loose for i in op.inputs)


def _joins(op: Op, params: dict[str, Any], cut: Sequence[Split | None]) -> bool:
    """Does the operation reduce over the split axis?"""
    if op.name == KTH:
        return True
    if op.name in REDUCTIONS:
        return cut[0] is not None and cut[0].axis in params["axes"]
    if op.name == "dot_general":
        (left, right), _ = params["dimension_numbers"]
        a, b = cut
        return (a is not None and a.axis in left) or (b is not None and b.axis in right)
    return False


def _how(op: Op) -> str:
    return "kth" if op.name == KTH else REDUCTIONS.get(op.name, "sum")


def _apply(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> None:
    """Finds the split axis of what an operation on split values returns."""
    rule = _elementwise if op.name in ELEMENTWISE else _RULES.get(op.name)
    if rule is None:
        raise Refused(f"{op.name} is not known to work block by block")
    out = rule(sweep, op, params, cut)
    for value in op.outputs:
        sweep.splits[value] = out


def _elementwise(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del params
    found = {c for c in cut if c is not None}
    if len(found) != 1:
        raise Refused(f"{op.name} meets values cut in different ways")
    (out,) = found
    for value, c in zip(op.inputs, cut, strict=True):
        shape = sweep.shape(value)
        if c is None and len(shape) > out.axis and shape[out.axis] != 1:
            _assign(sweep, value, out)
    return out


def _assign(sweep: _Sweep, value: int, want: Split) -> None:
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
                _assign(sweep, i, want)
    elif op.name not in MADE:
        raise Refused(f"{op.name} of a made value")
    sweep.splits[value] = want


def _reduce(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del sweep, op
    (c,) = cut
    assert c is not None
    return c._replace(axis=c.axis - sum(a < c.axis for a in params["axes"]))


def _reduce_other(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    c = cut[0]
    assert c is not None
    if c.axis in params["axes"]:
        raise Refused(f"{op.name} over the split axis")
    return _reduce(sweep, op, params, cut)


def _broadcast(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    c = cut[0]
    assert c is not None
    axis = params["broadcast_dimensions"][c.axis]
    if params["shape"][axis] != sweep.shape(op.inputs[0])[c.axis]:
        raise Refused("a split axis is broadcast")
    return c._replace(axis=axis)


def _squeeze(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del sweep, op
    c = cut[0]
    assert c is not None
    if c.axis in params["dimensions"]:
        raise Refused("the split axis is squeezed")
    return c._replace(axis=c.axis - sum(d < c.axis for d in params["dimensions"]))


def _transpose(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    del sweep, op
    c = cut[0]
    assert c is not None
    return c._replace(axis=tuple(params["permutation"]).index(c.axis))


def _reshape(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
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
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
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


def _concatenate(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> Split:
    found = next(c for c in cut if c is not None)
    if params["dimension"] == found.axis:
        raise Refused("concatenation along the split axis")
    for value, c in zip(op.inputs, cut, strict=True):
        if c is None:
            _assign(sweep, value, found)
        elif c != found:
            raise Refused("concatenation of values cut in different ways")
    return found


def _along(key: str) -> Callable[..., Split]:
    """The rule of an operation that works along one axis, which may not be split."""

    def rule(
        sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
    ) -> Split:
        del sweep
        found = {c for c in cut if c is not None}
        c = next(iter(found))
        axes = params[key] if isinstance(params[key], tuple) else (params[key],)
        if c.axis in axes or len(found) != 1 or None in cut:
            raise Refused(f"{op.name} along the split axis")
        return c

    return rule


def _dot(
    sweep: _Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
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
    "concatenate": _concatenate,
    "dot_general": _dot,
    "sort": _along("dimension"),
    "cumsum": _along("axis"),
    "cummax": _along("axis"),
    "cummin": _along("axis"),
    "cumprod": _along("axis"),
    "rev": _along("dimensions"),
    **dict.fromkeys(("argmax", "argmin", "reduce_prod"), _reduce_other),
}
