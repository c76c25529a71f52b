"""Singular value and polar decompositions with finite derivatives everywhere.

A decomposition is not unique where singular values coincide or vanish, and the usual
formulas divide by zero there. Here each such reciprocal counts as 0: derivatives are
exact where the decomposition is unique, and finite elsewhere.
"""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Matrix = Float[Array, "*batch n m"]


def product(*factors: Array) -> Array:
    """The product of matrices from the left, in full precision on every device."""
    return ft.reduce(ft.partial(jnp.matmul, precision="highest"), factors)


def t(x: Matrix) -> Float[Array, "*batch m n"]:
    """The transposed matrices."""
    return jnp.swapaxes(x, -1, -2)


def significant(
    s: Float[Array, "*batch r"], x: Matrix, size: Float[Array, "*batch"] | None = None
) -> Bool[Array, "*batch r"]:
    """Which singular values of x are more than rounding errors.

    The tolerance is numpy's for a rank: that of the largest one times `max(n, m)`
    units of rounding; `size` takes the place of the largest.
    """
    largest = s[..., :1] if size is None else size[..., None]
    return s > _tolerance(x) * largest


@jax.custom_jvp
def svd(x: Matrix) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition `u [n, r], s [r], vt [r, m]`, r = min(n, m).

    The derivative leaves out what turns singular vectors of equal singular values into
    each other, and what comes with a reciprocal of one that is 0.
    """
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    return u, s, vt


@svd.defjvp
def _svd_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    u, s, vt = out = svd(x)
    size, unit, d = _normalised(s, dx)
    p = product(t(u), d, t(vt))
    row, column = unit[..., None, :], unit[..., :, None]
    turn = _reciprocal(row - column, _tolerance(x)) / jnp.where(
        row + column > 0, row + column, 1
    )
    inverse = jnp.where(significant(s, x), _reciprocal(unit, 0), 0)
    outside = (product(d, t(vt)) - product(u, p)) * inverse[..., None, :]
    du = product(u, turn * (p * row + column * t(p))) + outside
    outside = (product(t(u), d) - product(p, vt)) * inverse[..., :, None]
    dvt = product(t(turn) * (column * p + t(p) * row), vt) + outside
    ds = jnp.diagonal(p, axis1=-2, axis2=-1) * size
    return out, (du, ds, dvt)


@jax.custom_jvp
def polar(x: Matrix) -> tuple[Array, Array]:
    r"""The orthogonal polar factor $\sum_i u_i v_i^T$, and the sum of singular values.

    The sum is over significant singular values alone, so it is unique for every matrix:
    a null space stays one.
    """
    u, s, vt = svd(x)
    keep = jnp.where(significant(s, x), 1, 0).astype(x.dtype)
    return product(u * keep[..., None, :], vt), jnp.sum(s, -1)


@polar.defjvp
def _polar_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    u, s, vt = svd(x)
    _, unit, d = _normalised(s, dx)
    keep = jnp.where(significant(s, x), 1, 0).astype(x.dtype)
    u, vt = u * keep[..., None, :], vt * keep[..., :, None]
    factor = product(u, vt)
    p = product(t(u), d, t(vt))
    both = unit[..., None, :] + unit[..., :, None]
    turn = (p - t(p)) / jnp.where(both > 0, both, 1)
    inverse = keep * _reciprocal(unit, 0)
    left = (product(d, t(vt)) - product(u, p)) * inverse[..., None, :]
    right = (product(t(u), d) - product(p, vt)) * inverse[..., :, None]
    moved = product(u, turn, vt) + product(left, vt) + product(u, right)
    return (factor, jnp.sum(s, -1)), (moved, jnp.sum(factor * dx, (-2, -1)))


def _normalised(s: Array, dx: Array) -> tuple[Array, Array, Array]:
    """The largest singular value (1 where it is 0), all over it, dx over it."""
    size = jnp.where(s[..., :1] > 0, s[..., :1], 1)
    return size, s / size, dx / size[..., None]


def _reciprocal(x: Array, tolerance: float) -> Array:
    """1/x, and 0 where x is no larger than the tolerance."""
    large = jnp.abs(x) > tolerance
    return jnp.where(large, 1 / jnp.where(large, x, 1), 0)


def _tolerance(x: Matrix) -> float:
    return max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)
