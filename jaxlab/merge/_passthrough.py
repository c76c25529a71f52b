"""One model, unchanged or scaled."""

import jax

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, rows, slices, spread, wide


def passthrough(models: Stacked, *, scale: PerModel = 1.0) -> Params:
    r"""The one model that is given, times a scale: $s\,\theta_1$.

    Args:
      models: `[1, *leaf]` the model $\theta_1$.
      scale: $s$: a scalar, `[1]`, or a tree of either by leaf. May be traced.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: there is not exactly one model.

    Degenerate inputs:
      A scale of 1 gives the model to the bit.

    References:
      mergekit's `passthrough`, used to stack layers of several models.

    Example:
      >>> import jax.numpy as jnp
      >>> passthrough({"w": jnp.array([[1.0, 3.0]])}, scale=0.5)
      {'w': Array([0.5, 1.5], dtype=float32)}
    """
    x = wide(models, name="models", k=1)
    factors = spread(scale, x, name="scale")
    scaled = jax.tree.map(lambda v, s: rows(s, v)[0] * slices(v)[0], x, factors)
    return narrow(scaled, models)
