"""The part of a program that one pass needs, as a compiled function of a block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
import functools as ft
from typing import Any, NamedTuple

import jax
from jaxtyping import Array
import numpy as np

from ._program import Op, Program
from ._rules import Split
from ._split import Splits
from ._threefry import bits_slice, cpu_options

_LENGTHS = {
    "broadcast_in_dim": "shape",
    "iota": "shape",
    "reshape": "new_sizes",
    "slice": "limit_indices",
}


# A reduction over the models, axis 0, runs across memory: XLA's CPU loops do that fifty
# times slower than the same additions written out, which fuse with what comes before.
_UNROLLED = {
    "reduce_sum": jax.lax.add,
    "reduce_max": jax.lax.max,
    "reduce_min": jax.lax.min,
    "reduce_and": jax.lax.bitwise_and,
    "reduce_or": jax.lax.bitwise_or,
}
_MODELS = 64  # more are left to XLA


class Rows(NamedTuple):
    """In place of a length: `per_row` for each row of the block at hand."""

    per_row: int


class Line(NamedTuple):
    """One operation of a block's function, its values renumbered from 0."""

    op: Op
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class BlockCode:
    """A block's function; two with one `text` are the same and compile once."""

    text: str
    lines: tuple[Line, ...] = field(compare=False)
    fixed: dict[int, Any] = field(compare=False)
    known: tuple[int, ...] = field(compare=False)
    blocks: tuple[int, ...] = field(compare=False)
    row_of: tuple[int, int] | None = field(compare=False)  # (axis, per_row) of block 0
    results: tuple[int, ...] = field(compare=False)


class Draw(NamedTuple):
    """Random bits that a block needs. They are drawn before it and passed to it.

    XLA would otherwise fuse the hash into every use of a bit, and hash many times over.
    """

    key: int  # the value of the program that is the key
    shape: tuple[int, ...]  # of all the bits
    cut: Split

    def bits(self, key: Any, row: int, rows: int) -> Array:
        """Those of a block of rows."""
        start, size = row * self.cut.per_row, rows * self.cut.per_row
        return bits_slice(key, self.shape, self.cut.axis, start, size)


class Block(NamedTuple):
    """`run(offset, known, blocks) -> results`, and what to call it with."""

    run: Callable[..., list[Array]]
    known: tuple[int, ...]  # the program's values to pass as `known`
    blocks: tuple[int, ...]  # the inputs to pass a block of
    draws: tuple[Draw, ...]  # what to draw, and pass after those


def block(
    program: Program,
    splits: Splits,
    targets: Sequence[int],
    ready: frozenset[int],
    anchor: int | None = None,
) -> Block:
    """The function that computes `targets` from a block, given the `ready` values.

    `anchor` is the input whose block says how many rows there are.
    """
    made = _draws(program, splits)
    needed = _needed(program, targets, ready | made.keys())
    number: dict[int, int] = {}
    known, blocks, drawn, fixed, lines, text = [], [], [], {}, [], []

    def read(value: int) -> int:
        if value in number:
            return number[value]
        number[value] = len(number)
        if value in program.consts and _embeds(program, value):
            fixed[number[value]] = program.consts[value]
            text.append(f"{number[value]}={program.consts[value]!r}")
        elif value in made:
            drawn.append(value)
            text.append(f"{number[value]}:drawn{program.avals[value].dtype}")
        elif value in program.inputs and value in splits.splits:
            blocks.append(value)
            text.append(f"{number[value]}:block{splits.splits[value][1:]}")
        else:
            known.append(value)
            text.append(f"{number[value]}:known{program.avals[value]}")
        return number[value]

    if anchor is not None:
        read(anchor)
    for op, params in needed:
        inputs = tuple(read(i) for i in op.inputs)
        outputs = tuple(number.setdefault(o, len(number)) for o in op.outputs)
        local = _localise(op, params, splits.splits.get(op.outputs[0]))
        lines.append(Line(op, local, inputs, outputs))
        text.append(f"{outputs}={op.name}{inputs}{local}")
    results = tuple(read(t) for t in targets)
    numbers = lambda values: tuple(number[v] for v in values)
    first = splits.splits[blocks[0]][1:] if blocks else None
    code = BlockCode(
        "\n".join([*text, str(results)]), tuple(lines), fixed, numbers(known),
        numbers([*blocks, *drawn]), first, results,
    )  # fmt: skip
    draws = tuple(made[v] for v in drawn)
    return Block(_compile(code), tuple(known), tuple(blocks), draws)


def _draws(program: Program, splits: Splits) -> dict[int, Draw]:
    """The random bits of a program that are cut by rows."""
    return {
        op.outputs[0]: Draw(op.inputs[0], tuple(params["shape"]), cut)
        for op, params in zip(program.ops, program.params, strict=True)
        if op.name == "random_bits" and (cut := splits.splits.get(op.outputs[0]))
    }


@ft.lru_cache(maxsize=512)
def _compile(code: BlockCode) -> Callable[..., list[Array]]:
    """Compiles a block's function; one executable serves every leaf with this text."""
    options = cpu_options(jax.default_backend() == "cpu")

    @ft.partial(jax.jit, compiler_options=options)
    def run(offset: Array, known: list[Array], blocks: list[Array]) -> list[Array]:
        env = dict(code.fixed)
        env.update(zip(code.known, known, strict=True))
        env.update(zip(code.blocks, blocks, strict=True))
        size = 0
        if code.row_of is not None:
            axis, per_row = code.row_of
            size = blocks[0].shape[axis] // per_row
        for line in code.lines:
            outs = _evaluate(line, [env[i] for i in line.inputs], offset, size)
            env.update(zip(line.outputs, outs, strict=True))
        return [env[r] for r in code.results]

    return run


def _evaluate(line: Line, args: list[Any], offset: Array, size: int) -> list[Any]:
    """Applies one operation to the block's values."""
    params = {
        k: tuple(size * v.per_row if isinstance(v, Rows) else v for v in value)
        if k == _LENGTHS.get(line.op.name)
        else value
        for k, value in line.params.items()
    }
    cut = line.params.get(_LENGTHS.get(line.op.name, ""), ())
    axis = next((i for i, v in enumerate(cut) if isinstance(v, Rows)), None)
    over_models = line.op.name in _UNROLLED and params["axes"] == (0,)
    if over_models and args[0].ndim > 1 and len(args[0]) <= _MODELS:
        return [ft.reduce(_UNROLLED[line.op.name], list(args[0]))]
    out = line.op.bind(*args, **params)
    if line.op.name == "iota" and axis is not None and params["dimension"] == axis:
        shift = (offset * np.uint64(cut[axis].per_row)).astype(out.dtype)
        return [out + shift]
    return list(out) if line.op.multiple else [out]


def _needed(
    program: Program, targets: Sequence[int], ready: frozenset[int]
) -> list[tuple[Op, dict[str, Any]]]:
    """The operations between the ready values and the targets, in order."""
    wanted = set(targets) - ready
    out = []
    for op, params in zip(reversed(program.ops), reversed(program.params), strict=True):
        if wanted & set(op.outputs):
            out.append((op, params))
            wanted |= set(op.inputs) - ready
    return out[::-1]


def _embeds(program: Program, value: int) -> bool:
    """Is a constant part of the code? Small integers are; numbers to tune are not."""
    const = program.consts[value]
    if not isinstance(const, np.ndarray) or const.ndim or const.dtype.kind not in "iub":
        return False
    if const.dtype.itemsize > 4:
        return False
    return not any(
        value in op.inputs for op in program.ops if op.name.startswith("random_")
    )


def _localise(op: Op, params: dict[str, Any], cut: Split | None) -> dict[str, Any]:
    """Puts `Rows` where the parameters name a length that is the block's."""
    key = _LENGTHS.get(op.name)
    if cut is None or key is None:
        return params
    full = tuple(params[key])
    return {
        **params,
        key: (*full[: cut.axis], Rows(cut.per_row), *full[cut.axis + 1 :]),
    }
