"""WiSE-FT (Wortsman et al., 2021) and BANG (Lin et al., 2023)."""

from typing import Any

import jax
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import lift, mix, narrow, spread, wide


def wise_ft(models: Stacked, *, alpha: PerModel = 0.5) -> Params:
    r"""The straight path from a zero-shot model to its fine-tuned self.

    $\theta_\alpha = (1 - \alpha)\theta_0 + \alpha\theta_1$. `jax.vmap` over `alpha`
    gives the path, `score` scores it in one program.

    Args:
      models: `[2, *leaf]` the zero-shot model $\theta_0$ and the fine-tuned $\theta_1$.
      alpha: $\alpha$: a scalar, or a tree of scalars by leaf; beyond [0, 1] it
        extrapolates. May be traced.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: another number of models than 2.

    Degenerate inputs:
      0 gives the first model and 1 the second, to the bit.

    References:
      Wortsman et al., 2021, "Robust fine-tuning of zero-shot models",
      https://arxiv.org/abs/2109.01903, Section 3; 0.5 is the authors' default.
      Lin et al., 2023, "Spurious Feature Diversification Improves Out-of-distribution
      Generalization", https://arxiv.org/abs/2309.17230: BANG is this merge of a
      $\theta_1$ that was tuned with label smoothing (`optax.smooth_labels`), mixup
      (`data.mixup`) or both, so that its over-confidence does not outweigh $\theta_0$.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> models = {"w": jnp.array([1.0, 3.0])}
      >>> jax.vmap(lambda a: wise_ft(models, alpha=a)["w"])(jnp.linspace(0, 1, 3))
      Array([1., 2., 3.], dtype=float32)
    """
    stacked = wide(models, name="models", k=2)
    factors = spread(alpha, stacked, name="alpha", per_model=False)

    def leaf(x: Float[Array, "2 ..."], a: Any) -> Float[Array, "..."]:
        a = lift(a, x)
        return mix([1 - a, a], x)

    return narrow(jax.tree.map(leaf, stacked, factors), models)
