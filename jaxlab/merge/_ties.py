"""TIES-Merging (Yadav et al., 2023)."""

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, wide
from ._fuse import Consensus, reach_consensus
from ._trim import Per, trim


def ties(
    deltas: Stacked,
    *,
    density: PerModel = 0.2,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    per: Per = "tree",
    consensus: Consensus = "mean",
) -> Params:
    r"""Trims task vectors, elects a sign entry by entry, and averages what agrees.

    $\hat\tau_k$ = the largest entries of $\tau_k$, $\gamma =
    \mathrm{sgn}\sum_k\hat\tau_k$, and $\tau = \lambda\,\mathrm{mean}\{w_k\hat\tau_k :
    \mathrm{sgn}\,\hat\tau_k = \gamma\}$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      density: the fraction kept, in (0, 1]: a scalar or `[k]`; with `per="leaf"` also a
        tree of either by leaf. May be traced.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      per: "tree" ranks the entries of a model together, "leaf" those of each leaf
        alone.
      consensus: "mean" elects by the plain sum and divides by the count that agrees;
        "majority" elects by the number of signs instead; "weighted_mean" elects by the
        weighted sum and divides by the weight that agrees; "weighted_sum" the same
        without dividing.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range, or a density by leaf with `per="tree"`.

    Degenerate inputs:
      An entry with no survivor is 0; a tied election elects +; entries equal to the
      threshold all survive. With k = 1 the result is the trimmed vector.

    References:
      Yadav et al., 2023, "TIES-Merging", https://arxiv.org/abs/2306.01708, Algorithm 1.
      mergekit: `per="leaf", consensus="weighted_mean"`, and "weighted_sum" for its
      `normalize: false`. PEFT: `per="leaf"`, and "majority" for its "frequency".

    Example:
      >>> import jax.numpy as jnp
      >>> ties({"w": jnp.array([[4.0, -1.0], [2.0, 3.0]])}, density=1.0)
      {'w': Array([3., 3.], dtype=float32)}
    """
    trimmed = trim(wide(deltas, name="deltas"), density=density, per=per)
    merged = reach_consensus(trimmed, weights=weights, scale=scale, consensus=consensus)
    return narrow(merged, deltas)
