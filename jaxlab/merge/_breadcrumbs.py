"""Model Breadcrumbs (Davari & Belilovsky, 2023)."""

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, wide
from ._fuse import Consensus, fuse, reach_consensus
from ._trim import Per, trim_outliers


def breadcrumbs(
    deltas: Stacked,
    *,
    density: PerModel = 0.9,
    gamma: PerModel = 0.01,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    normalize: bool = False,
    per: Per = "leaf",
) -> Params:
    r"""Drops the largest and smallest entries of each task vector, and sums.

    $\tau = \lambda\sum_k w_k\, m_k \odot \tau_k$, with $m_k$ from `trim_outliers`.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      density: the fraction kept, in (0, 1]: a scalar, `[k]`, or a tree of either by
        leaf. May be traced.
      gamma: $\gamma$, the fraction of largest entries dropped, in [0, 1); likewise.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      normalize: divide by $\sum_k w_k$.
      per: "leaf" ranks the entries of each leaf alone, "tree" those of a model
        together.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range; weights that sum to 0 with `normalize`.

    Degenerate inputs:
      A density of 1 keeps everything, whatever `gamma` is. Ties: see `trim_outliers`.

    References:
      Davari & Belilovsky, 2023, "Model Breadcrumbs", https://arxiv.org/abs/2312.06795,
      Section 3; the paper masks the smallest fraction $\beta = 1 - d - \gamma$. Equal
      to mergekit's with these keywords.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[4.0, -1.0, 0.5, 2.0]])}
      >>> breadcrumbs(x, density=0.5, gamma=0.25)
      {'w': Array([ 0., -1.,  0.,  2.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    thin = trim_outliers(x, density=density, gamma=gamma, per=per)
    mean = "weight" if normalize else None
    return narrow(fuse(thin, weights=weights, scale=scale, mean=mean), deltas)


def breadcrumbs_ties(
    deltas: Stacked,
    *,
    density: PerModel = 0.9,
    gamma: PerModel = 0.01,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    per: Per = "leaf",
    consensus: Consensus = "mean",
) -> Params:
    r"""Drops the largest and smallest entries, then merges by elected sign.

    TIES with `trim_outliers` in place of `trim`.

    Args:
      deltas: `[k, *leaf]` task vectors.
      density: the fraction kept, in (0, 1]: a scalar, `[k]`, or a tree of either by
        leaf. May be traced.
      gamma: $\gamma$, the fraction of largest entries dropped, in [0, 1); likewise.
      weights: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      per: "leaf" ranks the entries of each leaf alone, "tree" those of a model
        together.
      consensus: as in `ties`.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range.

    Degenerate inputs:
      An entry with no survivor is 0; a tied election elects +.

    References:
      Davari & Belilovsky, 2023, https://arxiv.org/abs/2312.06795, Section 3, with Yadav
      et al., 2023, https://arxiv.org/abs/2306.01708, Algorithm 1. mergekit:
      `consensus="weighted_sum"`, and "weighted_mean" for its `normalize: true`.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[4.0, -1.0, 0.5, 2.0]])}
      >>> breadcrumbs_ties(x, density=0.5, gamma=0.25)
      {'w': Array([ 0., -1.,  0.,  2.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    thin = trim_outliers(x, density=density, gamma=gamma, per=per)
    merged = reach_consensus(thin, weights=weights, scale=scale, consensus=consensus)
    return narrow(merged, deltas)
