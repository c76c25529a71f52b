"""Arcee Fusion: only the updates that stand out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from .. import tree
from ..types import Params, Stacked
from ._coefficients import narrow, rounded, slices, wide


def arcee_fusion(models: Stacked) -> Params:
    r"""Takes from the second model the entries whose importance stands out.

    Importance is $|\theta_2 - \theta_1| \cdot \mathrm{KL}(p_2 \| p_1)$, with $p$ the
    softmax of a leaf's last axis; an entry is taken where it reaches
    $Q_2 + 1.5\,(Q_3 - Q_1)$ of its leaf's quartiles $Q$.

    Args:
      models: `[2, *leaf]` the base $\theta_1$ and the other model $\theta_2$.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once. Which entries are
      taken is a constant to a gradient.

    Raises:
      ValueError: there are not exactly two models.

    Degenerate inputs:
      Where all importances of a leaf are equal (a leaf of one entry per row, equal
      models) the threshold is that value, so the second model is taken whole.

    References:
      Arcee AI, 2025, https://arcee.ai; mergekit's `arcee_fusion`, which estimates the
      quartiles of leaves above a million entries from a random sample: here they are
      exact, the sorted entries number $\lfloor q(n-1)\rfloor$.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 2.0]])}
      >>> arcee_fusion(x)
      {'w': Array([0., 0., 0., 2.], dtype=float32)}
    """
    x = wide(models, name="models", k=2)

    def leaf(v: Float[Array, "2 ..."]) -> Float[Array, "..."]:
        base, other = slices(v)
        score = jax.lax.stop_gradient(_importance(base, other))
        taken = score >= _stands_out(score)
        return base + jnp.where(taken, other - base, 0)

    return narrow(jax.tree.map(leaf, x), models)


def _importance(base: Array, other: Array) -> Array:
    """How far each entry moved, times how far its row's softmax did.

    The divergence is summed as p h(q/p), h(x) = x - 1 - log x >= 0, which equals
    p log(p/q) in total and does not cancel for rows that hardly differ.
    """
    axis = -1 if base.ndim else None
    p, q = (jax.nn.softmax(x, axis) + 1e-8 for x in (other, base))
    ratio = (q - p) / p
    part = rounded(p * jnp.maximum(ratio - jnp.log1p(ratio), 0))
    return jnp.abs(other - base) * jnp.sum(part, axis, keepdims=True)


def _stands_out(score: Array) -> Array:
    """The outlier threshold of a leaf: the median plus 1.5 interquartile ranges."""
    n = score.size
    ranks = [np.int64(n - i * (n - 1) // 4) for i in (1, 2, 3)]
    one = lambda r: tree.kth_largest([score[None]], r, stacked=True)[0]
    low, median, high = (one(r) for r in ranks)
    return median + 1.5 * (high - low)
