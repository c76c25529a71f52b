"""Similarity of representations (Kornblith et al., 2019; Nguyen et al., 2021)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ._sums import dot


class Hsic(NamedTuple):
    """The three dependences that CKA is made of; those of minibatches add up."""

    xy: Float[Array, "*batch"]
    xx: Float[Array, "*batch"]
    yy: Float[Array, "*batch"]


def hsic(
    x: Float[Array, "*batch b n"],
    y: Float[Array, "*batch b m"],
    *,
    unbiased: bool = True,
) -> Hsic:
    r"""The Hilbert-Schmidt independence criterion of rows, with linear kernels.

    Unbiased: $\mathrm{HSIC}_1(K, L) = \frac1{b(b-3)}\Big(\mathrm{tr}(\tilde K\tilde L)
    + \frac{1^\top\tilde K11^\top\tilde L1}{(b-1)(b-2)} - \frac2{b-2}1^\top\tilde K
    \tilde L1\Big)$ for $K = XX^\top$, $L = YY^\top$ and the tilde a zeroed diagonal.
    Biased: $\frac1{(b-1)^2}\|X_c^\top Y_c\|_F^2$ of centred features.

    Args:
      x: `[*batch, b, n]` the features of b examples.
      y: `[*batch, b, m]` other features of the same examples.
      unbiased: so that a sum over minibatches estimates that over all data.

    Returns:
      `Hsic(xy, xx, yy)`, each `[*batch]`, in at least float32; of minibatches of one
      size, sums of these (`tree.add`) give `cka` through `similarity`.

    Raises:
      ValueError: different numbers of rows, fewer than 4 of them where unbiased, or
        than 2.

    Degenerate inputs:
      Constant features give 0.

    References:
      Song et al., 2012, "Feature Selection via Dependence Maximization",
      https://www.jmlr.org/papers/v13/song12a.html, Section 4; Nguyen et al., 2021, "Do
      Wide and Deep Networks Learn the Same Things?", https://arxiv.org/abs/2010.15327,
      Section 2.

    Example:
      >>> x = jnp.array([[1.0], [-1.0], [1.0], [-1.0]])
      >>> float(9 * hsic(x, x, unbiased=False).xy)
      16.0
    """
    b, least = x.shape[-2], 4 if unbiased else 2
    if y.shape[:-1] != x.shape[:-1] or b < least:
        raise ValueError(
            f"expected the same at least {least} rows in x and y, got the shapes "
            f"{x.shape} and {y.shape}"
        )
    x, y = (v - jnp.mean(v, -2, keepdims=True) for v in (tree.widen(x), tree.widen(y)))
    one = _unbiased if unbiased else _biased
    return Hsic(one(x, y), one(x, x), one(y, y))


def similarity(sums: Hsic) -> Float[Array, "*batch"]:
    r"""CKA from sums of dependences: $xy/\sqrt{xx\cdot yy}$.

    Args:
      sums: what `hsic` gives, or the sum of several.

    Returns:
      `[*batch]`, at most 1 for biased sums.

    Degenerate inputs:
      0 where either side depends on itself by 0 or less, as constant features do.

    References:
      Nguyen et al., 2021, https://arxiv.org/abs/2010.15327, Section 2.

    Example:
      >>> float(similarity(Hsic(jnp.float32(1), jnp.float32(4), jnp.float32(1))))
      0.5
    """
    safe = (sums.xx > 0) & (sums.yy > 0)
    inside = lambda v: jnp.where(safe, v, jnp.ones_like(v))
    below = jnp.sqrt(inside(sums.xx)) * jnp.sqrt(inside(sums.yy))
    return jnp.where(safe, sums.xy / below, jnp.zeros_like(below))


def cka(
    x: Float[Array, "*batch b n"],
    y: Float[Array, "*batch b m"],
    *,
    unbiased: bool = False,
) -> Float[Array, "*batch"]:
    r"""Linear centred kernel alignment of two representations of the same examples.

    $\mathrm{CKA} = \frac{\mathrm{HSIC}(K, L)}{\sqrt{\mathrm{HSIC}(K, K)\,
    \mathrm{HSIC}(L, L)}}$. No orthogonal map and no scale of either side changes it.

    Args:
      x: `[*batch, b, n]` the features of b examples.
      y: `[*batch, b, m]` other features of the same examples.
      unbiased: estimate HSIC without the bias that makes few examples look similar. For
        minibatches, add up `hsic` and take the `similarity`.

    Returns:
      `[*batch]`, in [0, 1]; unbiased estimates may leave that interval.

    Raises:
      ValueError: as `hsic`.

    Degenerate inputs:
      Constant features give 0.

    References:
      Kornblith et al., 2019, "Similarity of Neural Network Representations Revisited",
      https://arxiv.org/abs/1905.00414, Section 3; unbiased as in Nguyen et al., 2021.

    Example:
      >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
      >>> round(float(cka(x, 2 * x)), 4)
      1.0
    """
    return similarity(hsic(x, y, unbiased=unbiased))


def _biased(x: Array, y: Array) -> Float[Array, "*batch"]:
    """HSIC of centred features, through the smaller of the two Gram matrices."""
    b, n, m = x.shape[-2], x.shape[-1], y.shape[-1]
    if n * m <= b * b:
        square = jnp.sum(jnp.square(dot("...bi,...bj->...ij", x, y)), (-2, -1))
    else:
        square = jnp.sum(_kernel(x) * _kernel(y), (-2, -1))
    return square / (b - 1) ** 2


def _unbiased(x: Array, y: Array) -> Float[Array, "*batch"]:
    """HSIC_1; that the features are centred changes nothing but the rounding."""
    b = x.shape[-2]
    off = 1 - jnp.eye(b, dtype=x.dtype)
    off = jnp.broadcast_to(off, (*x.shape[:-2], b, b))
    k, l = _kernel(x) * off, _kernel(y) * off.astype(y.dtype)
    k_rows, l_rows = jnp.sum(k, -1), jnp.sum(l, -1)
    total = jnp.sum(k * l, (-2, -1))
    total += jnp.sum(k_rows, -1) * jnp.sum(l_rows, -1) / ((b - 1) * (b - 2))
    total -= 2 / (b - 2) * jnp.sum(k_rows * l_rows, -1)
    return total / (b * (b - 3))


def _kernel(x: Array) -> Float[Array, "*batch b b"]:
    """All inner products of rows."""
    return dot("...ai,...bi->...ab", x, x)
