"""DELLA-Merging (Deep et al., 2024)."""

from jaxtyping import PRNGKeyArray

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, wide
from ._drop import Rescale, drop_by_rank
from ._fuse import Consensus, fuse, reach_consensus


def della(
    deltas: Stacked,
    *,
    density: PerModel = 0.5,
    epsilon: PerModel = 0.15,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    rescale: Rescale = "density",
    consensus: Consensus = "mean",
    key: PRNGKeyArray,
) -> Params:
    r"""Drops small entries more often than large ones, then merges by elected sign.

    Drop, elect, fuse: TIES with `drop_by_rank` in place of `trim`.

    Args:
      deltas: `[k, *leaf]` task vectors; a row runs along axis 1 of a leaf.
      density: $d$, the mean chance to stay, in (0, 1]: a scalar, `[k]`, or a tree of
        either by leaf. May be traced.
      epsilon: half the range of the chances, likewise; $d \pm \epsilon$ in (0, 1].
      weights: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      rescale: "density" divides an entry by its chance, "l1" restores the L1 norm of
        each leaf of each model, None does neither.
      consensus: as in `ties`.
      key: consumed. The draw of a leaf depends on its path and shape alone.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range.

    Degenerate inputs:
      An entry with no survivor is 0; a tied election elects +; see `drop_by_rank`.

    References:
      Deep et al., 2024, "DELLA-Merging", https://arxiv.org/abs/2406.11617, Section 3.
      mergekit: `rescale="l1"` (None for its `rescale: false`),
      `consensus="weighted_mean"`, and "weighted_sum" for its `normalize: false`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = della({"w": jnp.ones((1, 99))}, density=0.5, key=jax.random.key(0))
      >>> sorted({round(v, 3) for v in x["w"].tolist()})
      [0.0, 2.0]
    """
    x = wide(deltas, name="deltas")
    thin = drop_by_rank(x, density=density, epsilon=epsilon, rescale=rescale, key=key)
    merged = reach_consensus(thin, weights=weights, scale=scale, consensus=consensus)
    return narrow(merged, deltas)


def della_linear(
    deltas: Stacked,
    *,
    density: PerModel = 0.5,
    epsilon: PerModel = 0.15,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    normalize: bool = False,
    rescale: Rescale = "density",
    key: PRNGKeyArray,
) -> Params:
    r"""Drops small entries more often than large ones, rescales, and sums.

    Args:
      deltas: `[k, *leaf]` task vectors; a row runs along axis 1 of a leaf.
      density: $d$, the mean chance to stay, in (0, 1]: a scalar, `[k]`, or a tree of
        either by leaf. May be traced.
      epsilon: half the range of the chances, likewise; $d \pm \epsilon$ in (0, 1].
      weights: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      normalize: divide by the sum of the weights.
      rescale: "density" divides an entry by its chance, "l1" restores the L1 norm of
        each leaf of each model, None does neither.
      key: consumed. The draw of a leaf depends on its path and shape alone.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range; weights that sum to 0 with `normalize`.

    Degenerate inputs:
      A density of 1 gives `task_arithmetic`; see `drop_by_rank`.

    References:
      Deep et al., 2024, "DELLA-Merging", https://arxiv.org/abs/2406.11617, Section 3,
      without the election. mergekit: `rescale="l1"`, or None for its `rescale: false`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = della_linear({"w": jnp.ones((1, 99))}, density=0.5, key=jax.random.key(0))
      >>> sorted({round(v, 3) for v in x["w"].tolist()})
      [0.0, 2.0]
    """
    x = wide(deltas, name="deltas")
    thin = drop_by_rank(x, density=density, epsilon=epsilon, rescale=rescale, key=key)
    mean = "weight" if normalize else None
    return narrow(fuse(thin, weights=weights, scale=scale, mean=mean), deltas)
