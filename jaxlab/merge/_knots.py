"""KnOTS (Stoica et al., 2024)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import rewrite, tree
from ..types import Params, Stacked
from ._coefficients import narrow, wide
from ._matrices import Axes, as_matrices, matrix_use
from ._svd import product, significant, svd, t
from ._ties import ties


def knots(
    deltas: Stacked,
    *,
    method: Callable[..., Params] = ties,
    axes: Axes = "nm",
) -> Params:
    r"""Merges task vectors in the basis that their joint decomposition gives them.

    $[\tau_1, \dots, \tau_K] = U\Sigma\,[V_1^T, \dots, V_K^T]$, side by side along the
    inputs (in the paper's layout `[out, in]`), and $\tau = U\,m(\Sigma V_1^T, \dots,
    \Sigma V_K^T)$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      method: the merge $m$ of task vectors, its hyperparameters and its key bound. It
        gets `[k, *batch, n, r]` for each matrix, all leaves at once.
      axes: as in `iso_c`. The basis is one of the outputs m.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices are merged as they are.

    Raises:
      ValueError: from the method, or letters that do not fit a leaf.

    Degenerate inputs:
      Directions whose singular value is 0 are 0 in every task. Where singular values
      coincide, the basis of their space is whichever the decomposition finds; signs of
      singular vectors make no difference to a method that is odd in every entry.

    References:
      Stoica et al., 2024, "Model merging with SVD to tie the Knots",
      https://arxiv.org/abs/2410.19735, Section 4. The authors join a weight and its
      bias; here a bias is a leaf of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> deltas = {"w": jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])}
      >>> jnp.round(knots(deltas, method=merge.average)["w"], 4).tolist()
      [[0.5, 1.0]]
    """
    x = wide(deltas, name="deltas")
    bases: dict[str, tuple[rewrite.Use, Array]] = {}

    def aligned(path: str, v: Array) -> Array:
        use = matrix_use(path, v.shape[1:], axes)
        if use is None:
            return v
        w = as_matrices(v, use)
        tall = jnp.concatenate(list(w), -2)
        _, s, vt = svd(tall)
        keep = jnp.where(significant(s, tall), 1, 0).astype(w.dtype)
        bases[path] = use, vt * keep[..., :, None]
        return jax.vmap(lambda y: product(y, t(bases[path][1])))(w)

    def back(path: str, y: Array, v: Array) -> Array:
        if path not in bases:
            return y
        use, basis = bases[path]
        like: Any = jax.ShapeDtypeStruct(v.shape[1:], y.dtype)
        return rewrite.from_matrix(product(y, basis), use, like)

    merged = method(tree.path_map(aligned, x))
    return narrow(tree.path_map(back, merged, x), deltas)
