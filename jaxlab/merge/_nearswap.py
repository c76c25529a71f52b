"""NearSwap: a bounded step towards another model."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, spread, wide


def nearswap(models: Stacked, *, t: PerModel) -> Params:
    r"""Moves each entry of the base towards the other model, by at most t.

    $\theta = \theta_1 + \mathrm{clip}(\theta_2 - \theta_1, -t, t)$.

    Args:
      models: `[2, *leaf]` the base $\theta_1$ and the other model $\theta_2$.
      t: the largest step, at least 0: a scalar, or a tree of scalars by leaf. May be
        traced.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: there are not exactly two models; `t` is negative or NaN.

    Degenerate inputs:
      `t = 0` gives the base, to the bit.

    References:
      alchemonaut, 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
      mergekit writes the same as a weight $t/|\theta_2-\theta_1|$ clipped to [0, 1],
      and takes differences below 1e-6 for 1e-6 there.

    Example:
      >>> import jax.numpy as jnp
      >>> nearswap({"w": jnp.array([[1.0, 1.0], [1.1, 3.0]])}, t=0.5)
      {'w': Array([1.1, 1.5], dtype=float32)}
    """
    x = wide(models, name="models", k=2)
    steps = spread(
        t, x, name="t", valid=lambda s: s >= 0, expected="at least 0", per_model=False
    )

    def leaf(v: Float[Array, "2 ..."], s: Any) -> Float[Array, "..."]:
        base, other = slices(v)
        s = jnp.asarray(s, v.dtype)
        return base + jnp.clip(other - base, -s, s)

    return narrow(jax.tree.map(leaf, x, steps), models)
