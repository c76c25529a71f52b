"""DARE: drop and rescale (Yu et al., 2023)."""

from jaxtyping import PRNGKeyArray

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, wide
from ._drop import Rescale, drop
from ._fuse import Consensus, fuse, reach_consensus


def dare_linear(
    deltas: Stacked,
    *,
    density: PerModel = 0.1,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    normalize: bool = False,
    rescale: Rescale = "density",
    key: PRNGKeyArray,
) -> Params:
    r"""Drops entries of task vectors at random, rescales, and sums.

    $\tau = \lambda\sum_k w_k\, m_k \odot \tau_k / d_k$, $m_k \sim
    \mathrm{Bernoulli}(d_k)$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      density: $d_k$, the chance that an entry stays, in (0, 1]: a scalar, `[k]`, or a
        tree of either by leaf. May be traced.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      normalize: divide by $\sum_k w_k$.
      rescale: "density" divides by $d_k$, "l1" restores the L1 norm of each leaf of
        each model, None does neither.
      key: consumed. The draw of a leaf depends on its path and shape alone.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range; weights that sum to 0 with `normalize`.

    Degenerate inputs:
      A density of 1 gives `task_arithmetic`. See `drop` for "l1".

    References:
      Yu et al., 2023, "Language Models are Super Mario",
      https://arxiv.org/abs/2311.03099, Section 3. mergekit: `rescale="l1"`, or None for
      its `rescale: false`. PEFT: the defaults.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = dare_linear({"w": jnp.ones((1, 99))}, density=0.5, key=jax.random.key(0))
      >>> sorted({round(v, 3) for v in x["w"].tolist()})
      [0.0, 2.0]
    """
    x = wide(deltas, name="deltas")
    thin = drop(x, density=density, rescale=rescale, key=key)
    mean = "weight" if normalize else None
    return narrow(fuse(thin, weights=weights, scale=scale, mean=mean), deltas)


def dare_ties(
    deltas: Stacked,
    *,
    density: PerModel = 0.1,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    rescale: Rescale = "density",
    consensus: Consensus = "mean",
    key: PRNGKeyArray,
) -> Params:
    r"""Drops entries of task vectors at random, rescales, and merges by elected sign.

    TIES with `drop` in place of `trim`.

    Args:
      deltas: `[k, *leaf]` task vectors.
      density: the chance that an entry stays, in (0, 1]: a scalar, `[k]`, or a tree of
        either by leaf. May be traced.
      weights: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      rescale: "density" divides by the density, "l1" restores the L1 norm of each leaf
        of each model, None does neither.
      consensus: as in `ties`.
      key: consumed. The draw of a leaf depends on its path and shape alone.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range.

    Degenerate inputs:
      An entry with no survivor is 0; a tied election elects +.

    References:
      Yu et al., 2023, https://arxiv.org/abs/2311.03099, Section 3, with Yadav et al.,
      2023, https://arxiv.org/abs/2306.01708, Algorithm 1. mergekit: `rescale="l1"`
      (None for its `rescale: false`), `consensus="weighted_sum"`, and "weighted_mean"
      for its `normalize: true`. PEFT: the defaults, and "majority" for its "frequency".

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = dare_ties({"w": jnp.ones((1, 99))}, density=0.5, key=jax.random.key(0))
      >>> sorted({round(v, 3) for v in x["w"].tolist()})
      [0.0, 2.0]
    """
    x = wide(deltas, name="deltas")
    thin = drop(x, density=density, rescale=rescale, key=key)
    merged = reach_consensus(thin, weights=weights, scale=scale, consensus=consensus)
    return narrow(merged, deltas)
