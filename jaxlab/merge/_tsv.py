"""Task Singular Vectors (Gargiulo et al., 2024)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import rewrite, tree
from ..types import Params, PerModel, Stacked
from ._coefficients import lift, narrow, spread, wide
from ._matrices import Axes, as_matrices, matrix_use, per_matrix
from ._svd import polar, product, significant, svd


class Factors(NamedTuple):
    """The largest singular triplets of k matrices, `u * s @ v` each."""

    u: Float[Array, "k *batch n r"]
    s: Float[Array, "k *batch r"]
    v: Float[Array, "k *batch r m"]


def tsv_m(
    deltas: Stacked,
    *,
    fraction: float | None = None,
    scale: PerModel = 1.0,
    axes: Axes = "nm",
) -> Params:
    r"""Merges the largest singular triplets of each task after decorrelating them.

    With $\tau_k \approx U_k\Sigma_kV_k^T$ truncated, $U = [U_1, \dots, U_K]$ and
    $V = [V_1, \dots, V_K]$: $\tau = \lambda\,U_\perp\,\mathrm{diag}(\Sigma_1, \dots,
    \Sigma_K)\,V_\perp^T$, where $U_\perp$ and $V_\perp$ are the nearest matrices with
    orthonormal columns (or rows): the polar factors.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      fraction: the part of the singular triplets kept of each task, in (0, 1]; None for
        1/k, the paper's, and 1.0 for its lossless variant.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      axes: which axes of a leaf are in and out, where the shape does not say: "nm",
        "mn" (PyTorch's layout) or a mapping by path, as in `iso_c`. In and out play the
        same part.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices get the mean, times the scale.

    Raises:
      ValueError: a fraction out of range, or letters that do not fit a leaf.

    Degenerate inputs:
      Triplets whose singular value is 0 take no part. A task keeps at least one. One
      task gives itself.

    References:
      Gargiulo et al., 2024, "Task Singular Vectors: Reducing Task Interference in Model
      Merging", https://arxiv.org/abs/2412.00081, Algorithm 1. The authors' code lets
      null directions take part in the decorrelation; vectors have no scale there.

    Example:
      >>> import jax.numpy as jnp
      >>> first, second = jnp.array([2.0, 1.0]), jnp.array([0.0, 3.0])
      >>> deltas = {"w": jnp.stack([jnp.diag(first), jnp.diag(second)])}
      >>> jnp.round(tsv_m(deltas)["w"], 4).tolist()
      [[2.0, 0.0], [0.0, 3.0]]
    """
    x = wide(deltas, name="deltas")

    def matrix(v: Float[Array, "k *batch n m"]) -> Float[Array, "*batch n m"]:
        part = _truncated(v, fraction)
        keep = jnp.where(significant(part.s, v, part.s[..., 0]), 1, 0).astype(v.dtype)
        # The tasks' triplets side by side: [*batch, n, k r], [*batch, k r, m].
        side = lambda a, axis: jnp.concatenate(list(a), axis)
        u, _ = polar(side(part.u * keep[..., None, :], -1))
        vt, _ = polar(side(part.v * keep[..., :, None], -2))
        return product(u * side(part.s, -1)[..., None, :], vt)

    return narrow(scaled(per_matrix(matrix, x, axes=axes), x, scale), deltas)


def tsv_c(
    deltas: Stacked, *, fraction: float | None = None, axes: Axes = "nm"
) -> Params:
    r"""Compresses task vectors to their largest singular triplets.

    $\hat\tau_k = \sum_{i \le r} \sigma_i u_i v_i^T$, kept as factors: with the paper's
    fraction 1/k the factors of all tasks are about as large as two models.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      fraction: the part of the singular triplets kept of each task, in (0, 1]; None for
        1/k.
      axes: which axes of a leaf are in and out, as in `tsv_m`.

    Returns:
      A tree with `Factors` `u [k, *batch, n, r]`, `s [k, *batch, r]` and
      `v [k, *batch, r, m]` in the place of each leaf of matrices, in its dtype; other
      leaves as they are. `tsv_expand` undoes it.

    Raises:
      ValueError: a fraction out of range, or letters that do not fit a leaf.

    Degenerate inputs:
      A task keeps at least one triplet. With `fraction=1.0` nothing is lost but
      rounding.

    References:
      Gargiulo et al., 2024, https://arxiv.org/abs/2412.00081, Section 4.2.

    Example:
      >>> import jax.numpy as jnp
      >>> tsv_c({"w": jnp.ones((4, 8, 8))})["w"].u.shape
      (4, 8, 2)
    """

    def leaf(path: str, x: Array, original: Array) -> Any:
        use = matrix_use(path, x.shape[1:], axes)
        if use is None:
            return original
        part = _truncated(as_matrices(x, use), fraction)
        return Factors(*(p.astype(original.dtype) for p in part))

    stacked = jax.tree.map(jnp.asarray, deltas)
    return tree.path_map(leaf, wide(deltas, name="deltas"), stacked)


def tsv_expand(compressed: Params, like: Params, *, axes: Axes = "nm") -> Stacked:
    r"""Multiplies out what `tsv_c` has kept: $\hat\tau_k = U_k\Sigma_kV_k^T$.

    Args:
      compressed: from `tsv_c`.
      like: `[*leaf]` one model, arrays or shapes: the leaves' shapes.
      axes: as `tsv_c` was given it.

    Returns:
      `[k, *leaf]` task vectors, in the dtypes of the factors, rounded once.

    Raises:
      ValueError: the trees differ.

    Degenerate inputs:
      None beyond those of `tsv_c`.

    References:
      Gargiulo et al., 2024, https://arxiv.org/abs/2412.00081, Section 4.2.

    Example:
      >>> import jax.numpy as jnp
      >>> deltas = {"w": jnp.ones((4, 8, 8))}
      >>> tsv_expand(tsv_c(deltas), {"w": jnp.zeros((8, 8))})["w"].shape
      (4, 8, 8)
    """

    def leaf(path: str, one: Any, part: Any) -> Array:
        use = matrix_use(path, one.shape, axes)
        if use is None:
            return part
        wider = Factors(*map(tree.widen, part))
        whole = product(wider.u * wider.s[..., None, :], wider.v).astype(part.u.dtype)
        like: Any = jax.ShapeDtypeStruct(one.shape, whole.dtype)
        return jax.vmap(lambda w: rewrite.from_matrix(w, use, like))(whole)

    whole = lambda x: isinstance(x, Factors)
    marks = lambda x: jax.tree.map(lambda _: 0.0, x, is_leaf=whole)
    tree.check_like(marks(compressed), marks(like), name="compressed")
    return tree.path_map(leaf, like, compressed)


def scaled(merged: Params, stacked: Stacked, scale: PerModel) -> Params:
    """The merged tree times a scale, one for all leaves or one each."""
    factors = spread(scale, stacked, name="scale", per_model=False)
    return jax.tree.map(lambda y, s: lift(s, y[None]) * y, merged, factors)


def _truncated(x: Float[Array, "k *batch n m"], fraction: float | None) -> Factors:
    """The largest singular triplets of each matrix."""
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    full = min(x.shape[-2:])
    part = full // len(x) if fraction is None else int(full * fraction + 1e-9)
    rank = max(1, part)
    u, s, vt = svd(x)
    return Factors(u[..., :rank], s[..., :rank], vt[..., :rank, :])
