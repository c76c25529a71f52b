"""Which task vectors agree on a sign, and what their agreement is worth."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import (
    all_ones,
    lift,
    narrow,
    normalised,
    rounded,
    rows,
    slices,
    spread,
    total,
    wide,
)

Consensus = Literal["mean", "majority", "weighted_mean", "weighted_sum"]
"""How sign-agreeing task vectors merge.

"mean": sign of the plain sum, weighted values over their count (the TIES paper, PEFT);
"majority": sign of most entries, then the same (PEFT's "frequency");
"weighted_mean": sign of the weighted sum, over the agreeing weight (mergekit);
"weighted_sum": the same without the division (mergekit with `normalize: false`).
"""


def elect(
    deltas: Stacked, *, weights: PerModel = 1.0, by: Literal["sum", "count"] = "sum"
) -> Stacked:
    r"""Which task vectors carry, entry by entry, the sign that the models elect.

    $\gamma = \mathrm{sgn}\sum_k w_k\delta_k$, and model k agrees where
    $\mathrm{sgn}(w_k\delta_k) = \gamma$.

    Args:
      deltas: `[k, *leaf]` task vectors.
      weights: what the votes are multiplied by: a scalar, `[k]`, or a tree of either by
        leaf. May be traced.
      by: "sum" weighs a vote by its magnitude, "count" counts signs.

    Returns:
      `[k, *leaf]` booleans.

    Raises:
      ValueError: an unknown `by`, a bad weight, or a leaf that is not floating-point.

    Degenerate inputs:
      A tie elects +, as mergekit and PEFT do. A vote of 0 never agrees.

    References:
      Yadav et al., 2023, "TIES-Merging", https://arxiv.org/abs/2306.01708, Algorithm 1,
      step 2. The authors' code resolves a tie by the majority over all entries instead.

    Example:
      >>> import jax.numpy as jnp
      >>> elect({"w": jnp.array([[4.0, -1.0], [-2.0, -3.0]])})["w"]
      Array([[ True,  True],
             [False,  True]], dtype=bool)
    """
    if by not in ("sum", "count"):
        raise ValueError(f"by must be 'sum' or 'count', got {by!r}")
    deltas = wide(deltas, name="deltas")
    weights = spread(weights, deltas, name="weights")
    plain = all_ones(weights)

    def leaf(x: Float[Array, "k ..."], w: Any) -> Bool[Array, "k ..."]:
        votes = x if plain else rounded(lift(w, x) * x)
        ballots = slices(votes if by == "sum" else jnp.sign(votes))
        positive = (total(ballots) >= 0)[None]
        return jnp.where(positive, votes > 0, votes < 0)

    return jax.tree.map(leaf, deltas, weights)


def fuse(
    deltas: Stacked,
    agree: Stacked | None = None,
    *,
    weights: PerModel = 1.0,
    scale: PerModel = 1.0,
    mean: Literal["count", "weight"] | None = None,
) -> Params:
    r"""The weighted sum, or mean, of the task vectors that agree.

    $\lambda \sum_{k \in A} w_k\delta_k / d$ with $d = 1$, $|A|$ or $\sum_{k\in A} w_k$.

    Args:
      deltas: `[k, *leaf]` task vectors $\delta_k$.
      agree: `[k, *leaf]` booleans that select $A$, entry by entry; None selects all.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.
      mean: divide by the "count" or the "weight" that agrees; None divides by nothing.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an unknown `mean`, trees that differ, or weights that sum to 0 with
        `mean="weight"` and no `agree`.

    Degenerate inputs:
      An entry where nothing agrees is 0; one whose agreeing weights sum to 0 is not
      divided, and neither are traced weights that sum to 0.

    References:
      Yadav et al., 2023, https://arxiv.org/abs/2306.01708, Algorithm 1, step 3.

    Example:
      >>> import jax.numpy as jnp
      >>> fuse({"w": jnp.array([[4.0, -1.0], [2.0, -3.0]])}, mean="count")
      {'w': Array([ 3., -2.], dtype=float32)}
    """
    if mean not in (None, "count", "weight"):
        raise ValueError(f"mean must be 'count', 'weight' or None, got {mean!r}")
    x = wide(deltas, name="deltas")
    w = spread(weights, x, name="weights")
    s = spread(scale, x, name="scale", per_model=False)
    if agree is not None:
        tree.check_like(agree, deltas, name="agree")
        leaf = lambda *args: _agreeing(*args, mean=mean)
        return narrow(jax.tree.map(leaf, x, w, s, agree), deltas)
    if mean == "weight":
        w = normalised(w, x)
    merged = jax.tree.map(lambda *args: _all(*args, count=mean == "count"), x, w, s)
    return narrow(merged, deltas)


def reach_consensus(
    deltas: Stacked, *, weights: PerModel, scale: PerModel, consensus: Consensus
) -> Params:
    """Elects a sign and fuses what agrees, by one of the four conventions."""
    if consensus == "mean":
        agree = elect(deltas)
    elif consensus == "majority":
        agree = elect(deltas, by="count")
    elif consensus in ("weighted_mean", "weighted_sum"):
        agree = elect(deltas, weights=weights)
    else:
        raise ValueError(
            f"consensus must be 'mean', 'majority', 'weighted_mean' or 'weighted_sum', "
            f"got {consensus!r}"
        )
    mean = {"weighted_mean": "weight", "weighted_sum": None}.get(consensus, "count")
    return fuse(deltas, agree, weights=weights, scale=scale, mean=mean)


def _all(x: Array, w: Any, s: Any, *, count: bool) -> Array:
    """The scaled weighted sum of one leaf, over k where asked."""
    terms = [c * v for c, v in zip(rows(w, x), slices(x), strict=True)]
    merged = total(terms)
    return s.astype(x.dtype) * (merged / len(terms) if count else merged)


def _agreeing(
    x: Array, w: Any, s: Any, agree: Array, *, mean: Literal["count", "weight"] | None
) -> Array:
    """The scaled weighted sum or mean of what agrees in one leaf."""
    factors, masks = rows(w, x), slices(agree)
    parts = zip(factors, slices(x), masks, strict=True)
    terms = [jnp.where(m, c * v, 0) for c, v, m in parts]
    merged = total(terms)
    if mean is not None:
        units = factors if mean == "weight" else [x.dtype.type(1)] * len(masks)
        zero = jnp.zeros_like(merged)
        pairs = zip(masks, units, strict=True)
        divisor = total([jnp.where(m, u, zero) for m, u in pairs])
        merged = merged / jnp.where(divisor == 0, jnp.ones_like(divisor), divisor)
    return s.astype(x.dtype) * merged
