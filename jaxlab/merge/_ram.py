"""Reinforced Agent Merging (Yuan et al., 2026)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, Stacked
from ._coefficients import narrow, slices, total, wide
from ._fuse import fuse


def ram(deltas: Stacked, *, threshold: float = 1e-5) -> Params:
    r"""Averages, entry by entry, over the models that changed the entry.

    Entries that one model alone changed keep their full update; shared ones are
    averaged: $\tau = \sum_{k\in A}\tau_k / |A|$, $A = \{k : |\tau_k| > \epsilon\}$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      threshold: $\epsilon$, above which a magnitude counts as a change; at least 0.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: a negative or NaN threshold.

    Degenerate inputs:
      An entry that no model changed is 0.

    References:
      Yuan et al., 2026, "Behavior Knowledge Merge in Reinforced Agentic Models",
      https://arxiv.org/abs/2601.13572. Equal to mergekit's `ram`, whose `epsilon` is
      the threshold.

    Example:
      >>> import jax.numpy as jnp
      >>> ram({"w": jnp.array([[4.0, 0.0, 0.0], [2.0, 3.0, 0.0]])})
      {'w': Array([3., 3., 0.], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    return narrow(fuse(x, _changed(x, threshold), mean="count"), deltas)


def ramplus_tl(
    deltas: Stacked, *, threshold: float = 1e-5, gain: float = 0.1, cap: float = 0.2
) -> Params:
    r"""`ram` with the unique updates of each model amplified, leaf by leaf.

    A model's unique updates are multiplied by $\lambda_k = 1 + r\,\min(\rho_k,
    \alpha)$, where $\rho_k$ is how many entries of the leaf it changed with others,
    over how many it changed alone.

    Args:
      deltas: `[k, *leaf]` task vectors.
      threshold: $\epsilon$, above which a magnitude counts as a change; at least 0.
      gain: $r$.
      cap: $\alpha$, the largest $\rho_k$ that counts.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: a negative or NaN threshold.

    Degenerate inputs:
      A model without unique entries in a leaf has none to amplify.

    References:
      Yuan et al., 2026, https://arxiv.org/abs/2601.13572, RAM+; per leaf
      ("tensor-local") as in mergekit's `ramplus_tl`, whose `epsilon`, `r`, `alpha` are
      the arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> ramplus_tl({"w": jnp.array([[4.0, 0.0], [2.0, 3.0]])}, gain=2.5, cap=2.0)
      {'w': Array([ 3. , 10.5], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    changed = _changed(x, threshold)

    def amplify(v: Float[Array, "k ..."], c: Array) -> Float[Array, "k ..."]:
        count = total([m.astype(jnp.int32) for m in slices(c)])
        axes = tuple(range(1, v.ndim))
        alone, shared = c & (count == 1)[None], c & (count > 1)[None]
        with jax.enable_x64(True):
            n_alone, n_shared = (
                jnp.sum(m, axes, dtype=jnp.int64, keepdims=True).astype(v.dtype)
                for m in (alone, shared)
            )
        rho = n_shared / jnp.maximum(n_alone, 1)
        factor = 1 + gain * jnp.clip(rho, 0, cap)
        return jnp.where(alone, factor * v, v)

    amplified = jax.tree.map(amplify, x, changed)
    return narrow(fuse(amplified, changed, mean="count"), deltas)


def _changed(x: Stacked, threshold: float) -> Stacked:
    """Which entries each model changed."""
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    return jax.tree.map(lambda v: jnp.abs(v) > threshold, x)
