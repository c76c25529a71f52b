"""MagMax (Marczak et al., 2024)."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, spread, wide


def magmax(deltas: Stacked, *, scale: PerModel = 1.0) -> Params:
    r"""Takes each entry from the task vector where it is largest in magnitude.

    $\tau_i = \lambda\,\tau_{k^*,i}$ with $k^* = \arg\max_k |\tau_{k,i}|$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$, in the order of the tasks.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Which model
      an entry is taken from is a constant to a gradient.

    Raises:
      ValueError: a scale that is not finite, or one per model.

    Degenerate inputs:
      Of entries of equal magnitude the last one is taken, as in the authors' code.

    References:
      Marczak et al., 2024, "MagMax: Leveraging Model Merging for Seamless Continual
      Learning", https://arxiv.org/abs/2407.06322, Algorithm 1. FusionBench has 0.5
      for its default scale.

    Example:
      >>> import jax.numpy as jnp
      >>> magmax({"w": jnp.array([[4.0, -1.0], [2.0, -3.0]])})
      {'w': Array([ 4., -3.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    factor = spread(scale, x, name="scale", per_model=False)
    later = lambda a, b: jnp.where(jnp.abs(b) >= jnp.abs(a), b, a)

    def leaf(v: Float[Array, "k ..."], s: Any) -> Float[Array, "..."]:
        return s.astype(v.dtype) * ft.reduce(later, slices(v))

    return narrow(jax.tree.map(leaf, x, factor), deltas)
