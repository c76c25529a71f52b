"""Isotropic merging, Iso-C and Iso-CTS (Marczak et al., 2025)."""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, total, wide
from ._matrices import Axes, per_matrix
from ._svd import polar, product, significant, svd, t
from ._tsv import scaled


def iso_c(deltas: Stacked, *, scale: PerModel = 1.0, axes: Axes = "nm") -> Params:
    r"""Gives the summed task vectors one singular value, the mean of theirs.

    $\sum_k\tau_k = U\Sigma V^T$, $\tau = \lambda\,\bar\sigma\,UV^T$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      axes: how a leaf is a matrix `[n in, m out]`. "nm" goes by the number of its axes:
        `[n, m]`, `[e, n, m]` (a matrix for each e), `[..., n, m]` with four or more
        (all but the last are n); "mn" is PyTorch's layout, `[m, n]`, `[e, m, n]`,
        `[m, n, ...]`. A mapping of paths or globs to a letter per axis, such as
        `{"**/query": "nmm"}` with "b" for an axis of several matrices and "" for a
        vector, or to what `rewrite.uses` says of the leaf, has "nm" for the others.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices get the mean, times the scale.

    Raises:
      ValueError: letters that do not fit a leaf.

    Degenerate inputs:
      A null space of the sum stays one: only what is not 0 is given the mean, which is
      over all min(n, m). So a sum of 0 gives 0. Transposing in and out transposes the
      result.

    References:
      Marczak et al., 2025, "No Task Left Behind: Isotropic Model Merging with Common
      and Task-Specific Subspaces", https://arxiv.org/abs/2502.04959, Algorithm 1. The
      authors' code fills a null space with an arbitrary basis; vectors have no scale.

    Example:
      >>> import jax.numpy as jnp
      >>> iso_c({"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]]])})["w"].tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    x = wide(deltas, name="deltas")

    def matrix(v: Float[Array, "k *batch n m"]) -> Float[Array, "*batch n m"]:
        factor, sum_of_s = polar(total(slices(v)))
        return sum_of_s[..., None, None] / min(v.shape[-2:]) * factor

    return narrow(scaled(per_matrix(matrix, x, axes=axes), x, scale), deltas)


def iso_cts(
    deltas: Stacked,
    *,
    common: float = 0.8,
    scale: PerModel = 1.0,
    axes: Axes = "nm",
) -> Params:
    r"""Iso-C with some directions left to each task alone.

    The first c singular triplets of $\sum_k\tau_k$, and of each task the first of
    $(I - U_cU_c^T)\tau_k$, are put side by side as $U$, $\Sigma$, $V$; then $\tau =
    \lambda\,\bar\sigma\,U_\perp V_\perp^T$ with the polar factors of $U$ and $V$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      common: the part of the directions that are common, in [0, 1]; the rest is rounded
        to the nearest multiple of k.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      axes: as in `iso_c`. The common directions are projected out on the side of the
        outputs m.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices get the mean, times the scale.

    Raises:
      ValueError: `common` out of range, or letters that do not fit a leaf.

    Degenerate inputs:
      Directions without a singular value take no part. With `common=1.0`, or less than
      half a direction for each task, it is `iso_c`.

    References:
      Marczak et al., 2025, https://arxiv.org/abs/2502.04959, Algorithm 2, as in the
      authors' code. Where rounding asks for more directions than there are, fewer.

    Example:
      >>> import jax.numpy as jnp
      >>> deltas = {"w": jnp.array([[[3.0, 0.0], [0.0, 1.0]]])}
      >>> jnp.round(iso_cts(deltas, common=0.5)["w"], 4).tolist()
      [[2.0, 0.0], [0.0, 2.0]]
    """
    if not 0 <= common <= 1:
        raise ValueError(f"common must be in [0, 1], got {common}")
    x = wide(deltas, name="deltas")

    def matrix(v: Float[Array, "k *batch n m"]) -> Float[Array, "*batch n m"]:
        w = t(v)  # the paper's [out, in]
        k, full = len(w), min(w.shape[-2:])
        each = round((full - int(full * common + 1e-9)) / k)
        each = min(each, full // k)
        shared = _triplets(total(slices(w)), full - k * each)
        inside = product(shared[0], t(shared[0]))
        own = w - jax.vmap(ft.partial(product, inside))(w)
        size = jnp.sqrt(jnp.sum(w**2, (-2, -1)))
        u, s, vt = _triplets(own, each, size)
        side = lambda parts, last, axis: jnp.concatenate([*parts, last], axis)
        left, _ = polar(side(u, shared[0], -1))
        right, _ = polar(side(vt, shared[2], -2))
        mean = jnp.mean(side(s, shared[1], -1), -1)
        return t(mean[..., None, None] * product(left, right))

    return narrow(scaled(per_matrix(matrix, x, axes=axes), x, scale), deltas)


def _triplets(
    x: Float[Array, "*batch n m"], r: int, size: Array | None = None
) -> tuple[Array, Array, Array]:
    """The first r singular triplets; vectors are 0 where the singular value is."""
    u, s, vt = svd(x)
    u, s, vt = u[..., :r], s[..., :r], vt[..., :r, :]
    keep = jnp.where(significant(s, x, size), 1, 0).astype(x.dtype)
    return u * keep[..., None, :], s, vt * keep[..., :, None]
