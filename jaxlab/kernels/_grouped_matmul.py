"""Row i of x times one of many matrices, for rows sorted by matrix.

Unmeasured, as `many_lowrank_matmul`, which alone calls it.
"""

from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from ._blocks import dot, padded, power

_GPU_ROWS, _GPU_COLUMNS, _GPU_DEPTH = 16, 128, 128
_TPU_ROWS, _TPU_COLUMNS, _TPU_DEPTH = 128, 512, 512
_ORDER = ("parallel", "arbitrary", "arbitrary")  # blocks of rows add up in turn


class Groups(NamedTuple):
    """Sorted rows, in blocks, and the adapters of each."""

    rank: Array
    """`[rows, 1]`: which of the distinct adapters a row has."""
    which: Array
    """The distinct adapters, in order."""
    first: Array
    """Of each block, the rank of its first row."""
    last: Array


def grouped(x: Array, stack: Array, ids: Array) -> Array:
    """Row i of `x` times `stack[ids[i]]`, for sorted ids."""
    sizes = jnp.bincount(ids, length=len(stack)).astype(jnp.int32)
    y = lax.ragged_dot(x, stack, sizes, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _groups(ids: Array, rows: int, count: int) -> Groups:
    """What a block of sorted rows needs to know; whole blocks, the last id repeated."""
    ids = jnp.pad(ids, (0, -len(ids) % rows), mode="edge")
    fresh = jnp.concatenate([jnp.zeros(1, jnp.bool_), ids[1:] != ids[:-1]])
    rank = jnp.cumsum(fresh, dtype=jnp.int32)
    which = jnp.zeros(min(count, len(ids)), jnp.int32).at[rank].set(ids)
    return Groups(rank[:, None], which, rank[::rows], rank[rows - 1 :: rows])


def by_gpu(x: Array, stack: Array, ids: Array, interpret: Any = False) -> Array:
    """One Triton program per block of rows and columns, over the adapters in it."""
    from jax.experimental.pallas import triton

    (t, n), m = x.shape, stack.shape[2]
    columns, depth = power(m, _GPU_COLUMNS), power(n, _GPU_DEPTH)
    x, stack = padded(x, _GPU_ROWS, depth), padded(stack, 1, depth, columns)
    wide, out = x.shape[1], (x.shape[0], stack.shape[2])
    groups = _groups(ids, _GPU_ROWS, len(stack))

    def kernel(
        rank: Any, which: Any, first: Any, last: Any, x_ref: Any, s_ref: Any, o: Any
    ) -> None:
        mine = rank[...]

        def group(j: Array, y: Array) -> Array:
            number = which[j]

            def step(c: Array, y: Array) -> Array:
                at = pl.ds(c * depth, depth)
                w = triton.load(s_ref.at[number, at, :])
                return y + dot(triton.load(x_ref.at[:, at]), w)

            own = lax.fori_loop(0, wide // depth, step, jnp.zeros_like(y))
            return y + jnp.where(mine == j, own, 0)

        start = jnp.zeros((_GPU_ROWS, columns), jnp.float32)
        y = lax.fori_loop(first[0], last[0] + 1, group, start)
        o[...] = y.astype(x.dtype)

    one = pl.BlockSpec((1,), lambda i, _: (i,))
    return pl.pallas_call(
        kernel,
        grid=(out[0] // _GPU_ROWS, out[1] // columns),
        in_specs=[
            pl.BlockSpec((_GPU_ROWS, 1), lambda i, _: (i, 0)),
            pl.BlockSpec(groups.which.shape, lambda *_: (0,)),
            one,
            one,
            pl.BlockSpec((_GPU_ROWS, wide), lambda i, _: (i, 0)),
            pl.BlockSpec((len(stack), wide, columns), lambda _, j: (0, 0, j)),
        ],
        out_specs=pl.BlockSpec((_GPU_ROWS, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct(out, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="many_lowrank_matmul",
    )(*groups, x, stack)[:t, :m]


def by_tpu(x: Array, stack: Array, ids: Array, interpret: Any = False) -> Array:
    """A grid step per block of columns, block of rows with an adapter in it, and n."""
    from jax.experimental.pallas import tpu

    if x.dtype == jnp.float16:  # Mosaic loads none
        return grouped(x, stack, ids)
    (t, n), m, rows = x.shape, stack.shape[2], _TPU_ROWS
    columns, depth = min(_TPU_COLUMNS, m), min(_TPU_DEPTH, n)
    x, stack = padded(x, rows, depth), padded(stack, 1, depth, columns)
    steps, out = x.shape[1] // depth, (x.shape[0], stack.shape[2])
    groups = _groups(ids, rows, len(stack))
    pairs = _pairs(groups)

    def kernel(
        block: Any, rank: Any, _: Any, mine: Any, x_ref: Any, s_ref: Any, o: Any, y: Any
    ) -> None:
        i, c = pl.program_id(1), pl.program_id(2)
        fresh = (i == 0) | (block[i] != block[jnp.maximum(i - 1, 0)])

        @pl.when(fresh & (c == 0))
        def _() -> None:
            y[...] = jnp.zeros_like(y)

        own = dot(x_ref[...], s_ref[0])
        y[...] += jnp.where(mine[...] == rank[i], own, 0)

        @pl.when(c == steps - 1)
        def _() -> None:
            o[...] = y[...].astype(x.dtype)

    # A place is a function of (columns, pair, step) and of the three arrays of pairs.
    grid = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(out[1] // columns, len(pairs[0]), steps),
        in_specs=[
            pl.BlockSpec((rows, 1), lambda *at: (at[3][at[1]], 0)),
            pl.BlockSpec((rows, depth), lambda *at: (at[3][at[1]], at[2])),
            pl.BlockSpec((1, depth, columns), lambda *at: (at[5][at[1]], at[2], at[0])),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda *at: (at[3][at[1]], at[0])),
        scratch_shapes=[tpu.VMEM((rows, columns), jnp.float32)],
    )
    return pl.pallas_call(
        kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(out, x.dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=_ORDER),
        interpret=interpret,
        name="many_lowrank_matmul",
    )(*pairs, groups.rank, x, stack)[:t, :m]


def _pairs(groups: Groups) -> tuple[Array, Array, Array]:
    """Every block with each adapter in it: block, rank and adapter, at most so many.

    What is left over is of the last block and of rank -1, which no row has.
    """
    blocks = len(groups.first)
    ends = jnp.cumsum(groups.last - groups.first + 1)
    items = jnp.arange(blocks + len(groups.which) - 1, dtype=jnp.int32)
    block = jnp.searchsorted(ends, items, side="right").astype(jnp.int32)
    block = jnp.minimum(block, blocks - 1)
    rank = groups.last[block] - (ends[block] - 1 - items)
    real = items < ends[-1]
    which = groups.which[jnp.where(real, rank, 0)]
    return block, jnp.where(real, rank, -1), which
