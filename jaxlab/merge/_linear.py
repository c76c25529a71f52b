"""Averages of models (Wortsman et al., 2022)."""

from ..types import Params, PerModel, Stacked
from ._fuse import fuse


def linear(
    models: Stacked, *, weights: PerModel = 1.0, normalize: bool = True
) -> Params:
    r"""The weighted sum of models, by default divided by the sum of weights.

    $\theta = \sum_k w_k\theta_k / \sum_k w_k$.

    Args:
      models: `[k, *leaf]` models $\theta_k$.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      normalize: divide by $\sum_k w_k$.

    Returns:
      `[*leaf]` the merged model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: weights that sum to 0 with `normalize`, NaN, or of another shape.

    Degenerate inputs:
      Traced weights that sum to 0 are not normalised. One model gives itself.

    References:
      Wortsman et al., 2022, "Model soups", https://arxiv.org/abs/2203.05482, Section 2.
      Equal to mergekit's `linear`.

    Example:
      >>> import jax.numpy as jnp
      >>> linear({"w": jnp.array([[1.0], [3.0]])}, weights=[3.0, 1.0])
      {'w': Array([1.5], dtype=float32)}
    """
    return fuse(models, weights=weights, mean="weight" if normalize else None)


def average(models: Stacked) -> Params:
    r"""The plain mean of models, the uniform soup: $\theta = \frac1k\sum_k\theta_k$.

    Args:
      models: `[k, *leaf]` models $\theta_k$.

    Returns:
      `[*leaf]` the merged model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: a leaf is not floating-point, or holds another number of models.

    Degenerate inputs:
      One model gives itself.

    References:
      Wortsman et al., 2022, "Model soups", https://arxiv.org/abs/2203.05482, Section 2.

    Example:
      >>> import jax.numpy as jnp
      >>> average({"w": jnp.array([[1.0], [3.0]])})
      {'w': Array([2.], dtype=float32)}
    """
    return fuse(models, mean="count")
