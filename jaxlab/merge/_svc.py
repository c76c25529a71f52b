"""Singular value calibration (Li et al., 2026)."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, spread, total, wide, wide_one
from ._matrices import Axes, per_matrix
from ._svd import product, svd, t


def svc(
    deltas: Stacked,
    merged: Params | None = None,
    *,
    alpha: PerModel = 1.0,
    axes: Axes = "nm",
) -> Params:
    r"""Scales down the singular values that several tasks have added up to.

    Of the merged $\tau = U\Sigma V^T$ (in the paper's layout `[out, in]`), with the
    responses $a_r^k = u_r^T\tau_k$ and $a_r = u_r^T\tau$: $\sigma_r$ is multiplied by
    $\gamma_r = K / \sum_k\max(\alpha, s_r^k)$, $s_r^k = \langle a_r, a_r^k\rangle /
    \|a_r^k\|^2$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      merged: `[*leaf]` the task vector $\tau$ that any merge made of them; None for
        their sum.
      alpha: $\alpha$, above 0: what a response that is not counted twice counts as; a
        larger one scales down more. A scalar, or a tree of scalars by leaf. May be
        traced.
      axes: as in `iso_c`. The responses are those of outputs, so this does not commute
        with transposing in and out.

    Returns:
      `[*leaf]` calibrated task vector, in the dtypes of `deltas`, rounded once. Leaves
      that are no matrices stay as merged.

    Raises:
      ValueError: an alpha out of range, trees that differ, or letters that do not fit a
        leaf.

    Degenerate inputs:
      A task without a response counts as $\alpha$. Where singular values coincide, the
      result depends on which basis of their space the decomposition found. A merged
      task vector of 0 stays 0.

    References:
      Li et al., 2026, "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model
      Merging", https://arxiv.org/abs/2602.05536, Algorithm 1 and Equations 4 and 8.

    Example:
      >>> import jax.numpy as jnp
      >>> svc({"w": jnp.array([[[1.0, 0.0]], [[1.0, 0.0]]])})["w"].tolist()
      [[1.0, 0.0]]
    """
    x = wide(deltas, name="deltas")
    least = spread(
        alpha,
        x,
        name="alpha",
        valid=lambda a: a > 0,
        expected="above 0",
        per_model=False,
    )
    if merged is None:
        sums = jax.tree.map(lambda v: total(slices(v)), x)
    else:
        like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), x)
        tree.check_like(merged, like, name="merged")
        whole = wide_one(merged, name="merged")
        sums = jax.tree.map(lambda m, v: m.astype(v.dtype), whole, x)

    def matrix(v: Float[Array, "k *batch n m"], whole: Any, least: Any) -> Array:
        u, _, _ = svd(t(whole))
        own = jax.vmap(ft.partial(product, t(u)))(t(v))
        joint = product(t(u), t(whole))
        square = jnp.sum(own**2, -1)
        overlap = jnp.sum(own * joint[None], -1) / jnp.where(square > 0, square, 1)
        least = jnp.asarray(least, v.dtype)
        counted = jnp.where(square > 0, jnp.maximum(overlap, least), least)
        factor = len(v) / jnp.sum(counted, 0)
        return t(product(u, factor[..., None] * joint))

    keep = lambda _, *rest: rest[0]
    out = per_matrix(matrix, x, sums, least, axes=axes, vector=keep)
    return narrow(out, deltas)
