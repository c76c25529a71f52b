"""Arithmetic of whole trees, accumulated in at least float32."""

from collections.abc import Callable
import functools as ft
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from ..types import Params
from ._paths import check_like


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Casts to at least float32: accumulate wide, return narrow.

    Args:
      x: a floating-point array of any width.

    Returns:
      `x` in float32, or as it is where it is that wide already.

    Raises:
      ValueError: `x` is not floating-point.

    Example:
      >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating-point values, got {x.dtype}")
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def add(a: Params, b: Params) -> Params:
    """Adds two trees leaf by leaf, in at least float32, in the dtypes of `a`.

    Args:
      a: one tree; its leaves give the result's dtypes.
      b: another of the same structure.

    Returns:
      $a + b$.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> add({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
      {'w': Array([2., 2.], dtype=float32)}
    """
    check_like(b, a, name="b")
    return jax.tree.map(lambda x, y: _together(jnp.add, x, y), a, b)


def subtract(a: Params, b: Params) -> Params:
    """Subtracts two trees leaf by leaf, in at least float32, in the dtypes of `a`.

    Args:
      a: one tree; its leaves give the result's dtypes.
      b: another of the same structure.

    Returns:
      $a - b$.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> subtract({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
      {'w': Array([0., 0.], dtype=float32)}
    """
    check_like(b, a, name="b")
    return jax.tree.map(lambda x, y: _together(jnp.subtract, x, y), a, b)


def scale(tree: Params, factor: ArrayLike) -> Params:
    """Multiplies every leaf by one number, in at least float32.

    Args:
      tree: any tree of floating-point leaves.
      factor: a scalar; may be traced.

    Returns:
      The tree times `factor`, in its own dtypes.

    Example:
      >>> scale({"w": jnp.ones(2)}, 3.0)
      {'w': Array([3., 3.], dtype=float32)}
    """

    def leaf(x: Array) -> Array:
        wide = widen(x)
        return (wide * jnp.asarray(factor, wide.dtype)).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def dot(a: Params, b: Params) -> Float[Array, ""]:
    r"""The inner product $\sum_i a_i b_i$ of two trees.

    Args:
      a: one tree.
      b: another of the same structure.

    Returns:
      A scalar, accumulated in at least float32; 0 for trees without leaves.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> float(dot({"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}))
      3.0
    """
    check_like(b, a, name="b")
    parts = jax.tree.map(lambda x, y: jnp.sum(widen(x) * widen(y)), a, b)
    return _total(parts)


def norm(tree: Params, *, ord: Literal[1, 2, "inf"] = 2) -> Float[Array, ""]:  # noqa: A002  (numpy's word)
    r"""The vector norm of a whole tree.

    Args:
      tree: any tree of floating-point leaves.
      ord: 1 is $\sum|x_i|$, 2 is $\sqrt{\sum x_i^2}$, "inf" is $\max|x_i|$.

    Returns:
      A scalar, accumulated in at least float32; 0 for a tree without leaves. Its
      gradient at 0 is 0.

    Raises:
      ValueError: an unknown `ord`.

    Example:
      >>> float(norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
    """
    if ord == 1:
        return _total(jax.tree.map(lambda x: jnp.sum(jnp.abs(widen(x))), tree))
    if ord == "inf":
        sizes = [
            jnp.max(jnp.abs(widen(x)), initial=0.0).astype(widen(x).dtype)
            for x in jax.tree.leaves(tree)
        ]
        return ft.reduce(jnp.maximum, sizes, jnp.zeros((), jnp.float32))
    if ord == 2:
        square = _total(jax.tree.map(lambda x: jnp.sum(jnp.square(widen(x))), tree))
        safe = jnp.where(square > 0, square, jnp.ones_like(square))
        return jnp.where(square > 0, jnp.sqrt(safe), jnp.zeros_like(square))
    raise ValueError(f"ord must be 1, 2 or 'inf', got {ord!r}")


def cosine(a: Params, b: Params) -> Float[Array, ""]:
    r"""The cosine $\langle a, b\rangle / (\|a\|\,\|b\|)$ of two trees.

    Args:
      a: one tree.
      b: another of the same structure.

    Returns:
      A scalar in [-1, 1]; 0 where either norm is 0.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> float(cosine({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 0.0])}))
      1.0
    """
    na, nb = norm(a), norm(b)
    unit = lambda x, n: scale(x, 1 / jnp.where(n > 0, n, jnp.ones_like(n)))
    return jnp.clip(dot(unit(a, na), unit(b, nb)), -1, 1)


def _together(op: Callable[..., Array], x: Array, y: Array) -> Array:
    """Applies `op` in the wider of the two float types; returns `x`'s type."""
    wide = jnp.promote_types(widen(x).dtype, widen(y).dtype)
    return op(x.astype(wide), y.astype(wide)).astype(x.dtype)


def _total(parts: Params) -> Float[Array, ""]:
    """The sum of a tree of scalars."""
    return ft.reduce(jnp.add, jax.tree.leaves(parts), jnp.zeros((), jnp.float32))
