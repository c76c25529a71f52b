"""Delta-guided fusion: the CoDiEmb weighting of checkpoints (Zhang et al., 2025)."""

import functools as ft
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, Stacked
from ._coefficients import narrow, slices, total, wide


def delta_guided(
    deltas: Stacked,
    *,
    per: Literal["entry", "leaf"] = "entry",
    power: float = 1.0,
) -> Params:
    r"""Averages task vectors, weighing each by how far it has moved.

    $\tau = \sum_k w_k\tau_k$ with $w_k = d_k^p / \sum_j d_j^p$ and $d_k = |\tau_k|$,
    entry by entry, or the mean of $|\tau_k|$ over a leaf.

    Args:
      deltas: `[k, *leaf]` checkpoints minus their initialisation, $\tau_k$.
      per: "entry" weighs each entry by itself, "leaf" each leaf as a whole.
      power: $p \ge 0$; 0 is the plain mean, a large one takes the largest.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: an unknown `per`, or a negative power.

    Degenerate inputs:
      Where no checkpoint moved the result is 0. One checkpoint gives itself.

    References:
      Zhang et al., 2025, "CoDiEmb", https://arxiv.org/abs/2508.11442: merging weights
      of each checkpoint from each parameter's deviation from its initialisation. That
      they are proportional to its magnitude is this library's reading of the abstract:
      it has not been checked against the paper's equation, and the authors' code lacks
      the fusion. To fuse checkpoints within tasks first, call this twice.

    Example:
      >>> import jax.numpy as jnp
      >>> delta_guided({"w": jnp.array([[3.0, 0.0], [1.0, -2.0]])})
      {'w': Array([ 2.5, -2. ], dtype=float32)}
    """
    if per not in ("entry", "leaf"):
        raise ValueError(f"per must be 'entry' or 'leaf', got {per!r}")
    if not power >= 0:
        raise ValueError(f"power must be at least 0, got {power}")
    x = wide(deltas, name="deltas")

    def leaf(v: Float[Array, "k ..."]) -> Float[Array, "..."]:
        models = slices(v)
        size = [jnp.abs(m) for m in models]
        if per == "leaf":
            size = [jnp.mean(s) for s in size]
        if power != 1:  # of shares of the largest, so that no power overflows
            top = ft.reduce(jnp.maximum, size)
            safe = jnp.where(top > 0, jax.lax.stop_gradient(top), 1)
            size = [_power(s / safe, power) for s in size]
        whole = total(size)
        parts = [s * m for s, m in zip(size, models, strict=True)]
        return total(parts) / jnp.where(whole > 0, whole, 1)

    return narrow(jax.tree.map(leaf, x), deltas)


def _power(share: Array, power: float) -> Array:
    """A power of numbers in [0, 1], with gradient 0 where they are 0."""
    zero = share == 0
    safe = jnp.where(zero, 1, share)
    return jnp.where(zero, float(power == 0), safe**power)
