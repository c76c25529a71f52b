"""ExPO: extrapolation beyond an aligned model (Zheng et al., 2024)."""

from typing import Any

import jax
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import mix, narrow, spread, wide


def expo(deltas: Stacked, *, alpha: PerModel) -> Params:
    r"""Goes on in the direction of alignment: $\tau = (1 + \alpha)\,\Delta\theta$.

    $\theta = \theta_1 + \alpha(\theta_1 - \theta_0)$ with $\theta_0$ the supervised
    model, $\theta_1$ the aligned one, $\Delta\theta = \theta_1 - \theta_0$. Of several
    aligned models the mean is taken first.

    Args:
      deltas: `[k, *leaf]` aligned models minus the supervised one; the paper has k = 1.
      alpha: $\alpha$: a scalar, or a tree of scalars by leaf. May be traced. The paper
        searches (0, 0.5]; a negative one goes back towards $\theta_0$.

    Returns:
      `[*leaf]` task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an `alpha` that is not finite, or one per model.

    Degenerate inputs:
      An alpha of 0 gives the mean of the task vectors, -1 gives 0.

    References:
      Zheng et al., 2024, "Weak-to-Strong Extrapolation Expedites Alignment",
      https://arxiv.org/abs/2404.16792, Equation 1. The mean of several models is
      FusionBench's.

    Example:
      >>> import jax.numpy as jnp
      >>> expo({"w": jnp.array([[2.0, -4.0]])}, alpha=0.5)
      {'w': Array([ 3., -6.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    factor = spread(alpha, x, name="alpha", per_model=False)

    def leaf(v: Float[Array, "k ..."], a: Any) -> Float[Array, "..."]:
        k = v.shape[0]
        return (1 + a.astype(v.dtype)) * mix([v.dtype.type(1 / k)] * k, v)

    return narrow(jax.tree.map(leaf, x, factor), deltas)
