"""Exact order statistics without a sort."""

import functools as ft
from typing import Any, Literal

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Shaped
import numpy as np

from ..types import Params
from ._algebra import widen


def count(fraction: ArrayLike, total: int) -> Int[ArrayLike, "*k"]:
    r"""How many of `total` entries a fraction keeps: $\max(1, \lfloor f n\rfloor)$.

    Exact in float64: the same integer as Python's `max(1, int(f * n))`, of any size.

    Args:
      fraction: $f$, scalar or `[k]`, in [0, 1]. May be traced.
      total: $n$, the number of entries.

    Returns:
      An integer, or `[k]` of them; int64 where the fraction is concrete.

    Degenerate inputs:
      A fraction of 0 keeps 0; any positive fraction keeps at least 1.

    Example:
      >>> int(count(0.29, 100)), int(count(0.001, 100)), int(count(0.0, 100))
      (28, 1, 0)
    """
    if not isinstance(fraction, Tracer):
        exact = np.asarray(fraction, np.float64)
        kept = np.maximum(1, np.floor(exact * total)).astype(np.int64)
        return np.where(exact > 0, np.minimum(kept, total), 0)
    with jax.enable_x64(True):
        exact = jnp.asarray(fraction, jnp.float64)
        kept = jnp.maximum(1, jnp.floor(exact * np.float64(total))).astype(jnp.int64)
        return jnp.where(exact > 0, jnp.minimum(kept, total), 0)


def kth_largest(
    tree: Params,
    k: ArrayLike,
    *,
    per: Literal["tree", "leaf"] = "tree",
    stacked: bool = False,
) -> Any:
    r"""The exact k-th largest value of a nonnegative tree, without a sort.

    Bisects the bits of the value: a nonnegative float orders as its bit pattern does,
    so each round fixes one bit by counting the entries above it. Counts are 64-bit, so
    more than $2^{31}$ entries are exact; nothing is gathered or reshaped, so any
    sharding works. The gradient is that of a constant.

    Args:
      tree: nonnegative leaves `[*leaf]`, or `[k, *leaf]` where `stacked`.
      k: the rank, 1 for the maximum; scalar, or one per model where `stacked`; a tree
        of either with `per="leaf"`. May be traced.
      per: "tree" ranks all entries together, "leaf" each leaf alone.
      stacked: rank each model of axis 0 alone.

    Returns:
      The value $v$ with $|\{x > v\}| < k \le |\{x \ge v\}|$: a scalar, `[k]` where
      `stacked`, or with `per="leaf"` a tree of those. At least float32.

    Raises:
      ValueError: an unknown `per`, or a tree without leaves.

    Degenerate inputs:
      Ties: `x >= v` holds for every entry equal to the k-th, so it may select more than
      k. A rank of 0 gives infinity (nothing is selected); one beyond the size gives 0
      (all is). NaN ranks above infinity.

    Example:
      >>> float(kth_largest({"a": jnp.array([1.0, 5.0]), "b": jnp.array([3.0])}, 2))
      3.0
    """
    if per == "leaf":
        ranks = k if jax.tree.structure(k) == jax.tree.structure(tree) else None
        if ranks is None:
            ranks = jax.tree.map(lambda _: k, tree)
        one = lambda x, r: kth_largest([x], r, stacked=stacked)
        return jax.tree.map(one, tree, ranks)
    if per != "tree":
        raise ValueError(f"per must be 'tree' or 'leaf', got {per!r}")
    leaves = [widen(x) for x in jax.tree.leaves(tree)]
    if not leaves:
        raise ValueError("kth_largest of a tree without leaves")
    wide = jnp.result_type(*leaves)
    rows = [x.astype(wide) if stacked else x.astype(wide)[None] for x in leaves]
    rows = [jax.lax.stop_gradient(x) for x in rows]
    with jax.enable_x64(True):
        rank = jnp.broadcast_to(jnp.asarray(k, jnp.int64), rows[0].shape[:1])
        value = kth_largest_rows(rank, *rows)
    return value if stacked else value[0]


@jax.jit
def kth_largest_rows(
    rank: Int[Array, " k"], *rows: Float[Array, "k ..."]
) -> Float[Array, " k"]:
    """`kth_largest` per row; `rewrite.passes` knows it by name and counts in blocks."""
    dtype = rows[0].dtype
    width = jnp.finfo(dtype).bits
    word = jnp.uint32 if width == 32 else jnp.uint64
    bits = [jax.lax.bitcast_convert_type(x, word) for x in rows]

    def round_(i: Array, low: Array) -> Array:
        level = low | (jnp.array(1 << (width - 2), word) >> i.astype(word))
        counts = [_count(b >= _lift(level, b.ndim)) for b in bits]
        return jnp.where(ft.reduce(jnp.add, counts) >= rank, level, low)

    zero = jnp.zeros(rows[0].shape[:1], word)
    low = jax.lax.fori_loop(0, width - 1, round_, zero)
    value = jax.lax.bitcast_convert_type(low, dtype)
    return jnp.where(rank > 0, value, jnp.full_like(value, jnp.inf))


def _count(mask: Bool[Array, "k ..."]) -> Int[Array, " k"]:
    """How many hold, per row, in 64 bits: innermost axis first, in 32 bits there."""
    inner = mask.ndim > 1 and mask.shape[-1] < 2**31
    small = jnp.sum(mask, axis=-1, dtype=jnp.int32) if inner else mask
    with jax.enable_x64(True):
        return jnp.sum(small, axis=tuple(range(1, small.ndim)), dtype=jnp.int64)


def _lift(x: Shaped[Array, " k"], ndim: int) -> Shaped[Array, "k ..."]:
    """Appends axes of length 1 until there are `ndim`."""
    return x.reshape(x.shape + (1,) * (ndim - 1))
