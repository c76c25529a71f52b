"""Task arithmetic (Ilharco et al., 2022)."""

from ..types import Params, PerModel, Stacked
from ._fuse import fuse


def task_arithmetic(
    deltas: Stacked,
    *,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    normalize: bool = False,
) -> Params:
    r"""The weighted sum of task vectors: $\lambda\sum_k w_k\tau_k$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$; a negative weight forgets one.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      normalize: divide by $\sum_k w_k$.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: weights that sum to 0 with `normalize`, NaN, or of another shape.

    Degenerate inputs:
      Traced weights that sum to 0 are not normalised.

    References:
      Ilharco et al., 2022, "Editing Models with Task Arithmetic",
      https://arxiv.org/abs/2212.04089, Section 2. Equal to mergekit's and PEFT's.

    Example:
      >>> import jax.numpy as jnp
      >>> task_arithmetic({"w": jnp.array([[1.0], [3.0]])}, scale=0.5)
      {'w': Array([2.], dtype=float32)}
    """
    mean = "weight" if normalize else None
    return fuse(deltas, weights=weights, scale=scale, mean=mean)
