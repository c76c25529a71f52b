"""Which axis of each value of a program runs along the rows of a leaf.

One forward sweep over the operations. A value is small (the same whole, whatever the
block), or split: one of its axes has `per_row` entries for every row of leaf `group`,
so a block of rows of the leaf holds a contiguous range of it. What a sum, a maximum or
a count over that axis makes is small again, but known only after a pass over the data.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ._program import Op, Program
from ._rules import (
    ELEMENTWISE,
    KTH,
    MADE,
    REDUCTIONS,
    Refused,
    Split,
    Sweep,
    apply,
    assign,
)


class Stat(NamedTuple):
    """A value that is known after a pass: how the parts of the blocks combine."""

    value: int  # what it is in the program
    how: str  # "sum", "max", "min" or "kth"
    op: Op
    groups: tuple[int, ...]  # the leaves that must be passed over


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
    sweep = Sweep(program, dict(inputs), tuple(rows), {}, {}, {})
    stats = []
    for op, params in zip(program.ops, program.params, strict=True):
        for out in op.outputs:
            sweep.made_by[out] = (op, params)
        cut = [sweep.splits.get(i) for i in op.inputs]
        stage = max([sweep.stage.get(i, 0) for i in op.inputs], default=0)
        if any(cut) and _joins(sweep, op, params, cut):
            groups = tuple(dict.fromkeys(c.group for c in cut if c))
            stats.append(Stat(op.outputs[0], _how(op), op, groups))
            stage += 1
        elif any(cut):
            apply(sweep, op, params, cut)
        elif _all_loose(sweep, op) or _makes(program, op, params):
            sweep.loose[op.outputs[0]] = None
        for out in op.outputs:
            sweep.stage[out] = stage
    for value, want in outputs.items():
        assign(sweep, value, want)
    return Splits(sweep.splits, tuple(stats), sweep.stage)


def _makes(program: Program, op: Op, params: dict[str, Any]) -> bool:
    """Can the operation make any part of its result alone?"""
    if op.name != "random_bits":
        return op.name in MADE
    counted = jax.config.jax_threefry_partitionable  # pyright: ignore (a dynamic flag)
    threefry = str(program.avals[op.inputs[0]].dtype) == "key<fry>"
    scalar = not program.avals[op.inputs[0]].shape
    return bool(counted) and threefry and scalar and params["bit_width"] == 32


def _all_loose(sweep: Sweep, op: Op) -> bool:
    """An elementwise operation on something of any length is of any length too."""
    return op.name in ELEMENTWISE and any(i in sweep.loose for i in op.inputs)


def _joins(
    sweep: Sweep, op: Op, params: dict[str, Any], cut: Sequence[Split | None]
) -> bool:
    """Does the operation reduce over the split axis?"""
    if op.name == KTH:
        if cut[0] or any(c is None or c.axis == 0 for c in cut[1:]):
            raise Refused("an order statistic of values that are not cut by rows")
        return True
    if op.name in REDUCTIONS:
        return cut[0] is not None and cut[0].axis in params["axes"]
    if op.name != "dot_general":
        return False
    (left, right), _ = params["dimension_numbers"]
    for mine, other, near, far in ((0, 1, left, right), (1, 0, right, left)):
        c = cut[mine]
        if c is not None and c.axis in near:
            assign(sweep, op.inputs[other], c._replace(axis=far[near.index(c.axis)]))
            return True
    return False


def _how(op: Op) -> str:
    return "kth" if op.name == KTH else REDUCTIONS.get(op.name, "sum")
