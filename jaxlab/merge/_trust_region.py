"""Task arithmetic in the trust region, TATR (Sun et al., 2025)."""

from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import lift, narrow, slices, spread, total, wide
from ._trim import floor_count


def trust_region(
    deltas: Stacked,
    sensitivity: Stacked | None = None,
    *,
    quantile: float = 0.99,
    scale: PerModel = 1.0,
) -> Params:
    r"""Adds task vectors where no task's loss is sensitive to another's change.

    $\Omega = \sum_{i \ne j} |g_i| \odot |\tau_j|$, and $\tau = \lambda\sum_k\tau_k
    \odot [\,\Omega < \Omega_q\,]$ with the threshold $\Omega_q$ at the quantile q of
    all entries of the tree.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      sensitivity: `[k, *leaf]` $|g_k|$, the mean over examples of task k of the
        magnitude of the gradient at the base; None for $|\tau_k|$, which needs no data.
      quantile: $q$ in [0, 1], the fraction in the trust region. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. The mask is
      a constant to a gradient.

    Raises:
      ValueError: a quantile out of range, or trees that differ.

    Degenerate inputs:
      An entry with $\Omega = 0$ is always in the region: one model gives itself. Other
      entries that tie with the threshold are outside.

    References:
      Sun et al., 2025, "Task Arithmetic in Trust Region", ICLR,
      https://openreview.net/forum?id=q3ztjJRQuJ, Equations 8 to 10. FusionBench leaves
      entries without conflict out where there are more of them than the quantile asks.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[4.0, 0.0, 3.0], [0.0, 2.0, 3.0]])}
      >>> trust_region(x, quantile=0.9)["w"].tolist()
      [4.0, 2.0, 0.0]
    """
    if not isinstance(quantile, Tracer) and not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    x = wide(deltas, name="deltas")
    factors = spread(scale, x, name="scale", per_model=False)
    if sensitivity is None:
        sizes = x
    else:
        tree.check_like(sensitivity, x, name="sensitivity")
        sizes = wide(sensitivity, name="sensitivity")
    conflict = jax.lax.stop_gradient(jax.tree.map(_conflict, x, sizes))
    entries = sum(v.size for v in jax.tree.leaves(conflict))
    with jax.enable_x64(True):
        below = jnp.asarray(floor_count(quantile, entries), jnp.int64)
        rank = entries - jnp.minimum(below, np.int64(entries - 1))
    cut = tree.kth_largest(conflict, rank)

    def leaf(v: Array, o: Array, c: Any) -> Array:
        inside = (o.astype(cut.dtype) < cut) | (o == 0)
        return lift(c, v[:1]) * jnp.where(inside, total(slices(v)), 0)

    return narrow(jax.tree.map(leaf, x, conflict, factors), deltas)


def _conflict(deltas: Array, sensitivity: Array) -> Array:
    """How much each entry of one task's change matters to another task."""
    moved = slices(jnp.abs(deltas))
    felt = slices(jnp.abs(sensitivity).astype(deltas.dtype))
    pairs = [f * m for i, f in enumerate(felt) for j, m in enumerate(moved) if i != j]
    return total(pairs) if pairs else jnp.zeros_like(moved[0])
