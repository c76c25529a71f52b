"""TALL masks and Consensus merging (Wang et al., 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import lift, narrow, slices, spread, total, wide, wide_one
from ._fuse import Consensus
from ._ties import ties
from ._trim import Per


def tall_masks(
    deltas: Stacked, merged: Params | None = None, *, threshold: PerModel = 0.4
) -> Stacked:
    r"""Where a merged task vector still carries the information of each task.

    $m_k = [\,|\tau_k| > \lambda_k\,|\tau_{MTL} - \tau_k|\,]$; the model of task k is
    $\theta_0 + m_k \odot \tau_{MTL}$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      merged: `[*leaf]` the multi-task vector $\tau_{MTL}$; None sums the task vectors.
      threshold: $\lambda_k \ge 0$: a scalar, `[k]`, or a tree of either by leaf. May be
        traced. The paper picks each from 0.2, 0.3, ... 0.6 on held-out data.

    Returns:
      `[k, *leaf]` booleans.

    Raises:
      ValueError: `merged` is another tree than one model of `deltas`; a negative
        threshold.

    Degenerate inputs:
      An entry that task k left alone is not in $m_k$ (with the paper's $\ge$ it would
      be where no task moved it, to no effect). A threshold of 0 keeps every entry that
      the task moved.

    References:
      Wang et al., 2024, "Localizing Task Information for Improved Model Merging and
      Compression", https://arxiv.org/abs/2405.07813, Section 4.1; `>` as in the
      authors' code.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[4.0, -1.0], [1.0, 3.0]])}
      >>> tall_masks(x)["w"]
      Array([[ True, False],
             [False,  True]], dtype=bool)
    """
    x = wide(deltas, name="deltas")
    if merged is None:
        whole = jax.tree.map(lambda v: total(slices(v)), x)
    else:
        one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), x)
        tree.check_like(merged, one, name="merged")
        whole = wide_one(merged, name="merged")
    bounds = spread(
        threshold, x, name="threshold", valid=lambda t: t >= 0, expected="at least 0"
    )
    return jax.tree.map(_holds, x, whole, bounds)


def consensus_ta(
    deltas: Stacked,
    *,
    threshold: PerModel = 0.4,
    votes: int = 2,
    scale: PerModel = 1.0,
) -> Params:
    r"""Task arithmetic without the entries that few tasks use.

    $\tau = \alpha\,[\sum_k m_k \ge n] \odot \sum_k\tau_k$ with the masks $m_k$ of
    `tall_masks`.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      threshold: $\lambda_k$ of the masks: a scalar, `[k]`, or a tree of either by leaf.
        May be traced.
      votes: $n$, how many tasks must use an entry: 2 removes what one or none uses, 1
        what none uses, 0 removes nothing.
      scale: $\alpha$: a scalar, or a tree of scalars by leaf. May be traced.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: negative votes, or a bad threshold or scale.

    Degenerate inputs:
      More votes than models leave 0. Which entries stay is a constant to a gradient.

    References:
      Wang et al., 2024, https://arxiv.org/abs/2405.07813, Section 4.3, "Consensus TA".

    Example:
      >>> import jax.numpy as jnp
      >>> consensus_ta({"w": jnp.array([[4.0, 2.0], [1.0, 3.0]])})
      {'w': Array([0., 5.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    merged = jax.tree.map(lambda v: total(slices(v)), x)
    return narrow(_filtered(x, merged, threshold, votes, scale), deltas)


def consensus_ties(
    deltas: Stacked,
    *,
    density: PerModel = 0.2,
    threshold: PerModel = 0.4,
    votes: int = 2,
    scale: PerModel = 1.0,
    per: Per = "tree",
    consensus: Consensus = "weighted_sum",
) -> Params:
    r"""TIES without the entries that few tasks use.

    As `consensus_ta`, with the multi-task vector of `ties`, for the masks too.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      density: the fraction that TIES keeps, in (0, 1]: a scalar or `[k]`; with
        `per="leaf"` also a tree of either by leaf. May be traced.
      threshold: $\lambda_k$ of the masks: a scalar, `[k]`, or a tree of either by leaf.
        May be traced.
      votes: how many tasks must use an entry.
      scale: $\alpha$: a scalar, or a tree of scalars by leaf. May be traced.
      per: as in `ties`: "tree" ranks the entries of a model together.
      consensus: as in `ties`; the authors' code sums what agrees.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an option out of range.

    Degenerate inputs:
      As `ties` and `consensus_ta`.

    References:
      Wang et al., 2024, https://arxiv.org/abs/2405.07813, Section 4.3, "Consensus
      TIES".

    Example:
      >>> import jax.numpy as jnp
      >>> consensus_ties({"w": jnp.array([[4.0, 2.0], [1.0, 3.0]])}, density=0.5)
      {'w': Array([0., 3.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    merged = ties(x, density=density, per=per, consensus=consensus)
    return narrow(_filtered(x, merged, threshold, votes, scale), deltas)


def _holds(v: Float[Array, "k ..."], whole: Array, bound: Any) -> Bool[Array, "k ..."]:
    """Is the task vector large against what the others make of it?"""
    rest = jnp.abs(whole[None] - v)
    return jnp.abs(v) > lift(bound, v) * rest


def _filtered(
    x: Stacked, merged: Params, threshold: PerModel, votes: int, scale: PerModel
) -> Params:
    """The scaled multi-task vector where at least so many masks agree."""
    if votes < 0:
        raise ValueError(f"votes must be at least 0, got {votes}")
    masks = tall_masks(x, merged, threshold=threshold)
    factors = spread(scale, x, name="scale", per_model=False)

    def leaf(m: Bool[Array, "k ..."], whole: Array, s: Any) -> Array:
        used = jnp.sum(m, axis=0, dtype=jnp.int32) >= votes
        return s.astype(whole.dtype) * jnp.where(used, whole, 0)

    return jax.tree.map(leaf, masks, merged, factors)
