"""SCE: select, calculate, erase (Wan et al., 2024)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import all_ones, narrow, rounded, slices, spread, total, wide
from ._fuse import elect
from ._trim import check_density, floor_count


def sce(deltas: Stacked, *, density: PerModel = 1.0, eps: float = 0.0) -> Params:
    r"""Keeps where models differ most, weighs by energy, and erases minority signs.

    Select the entries of largest variance over models; weigh each leaf of model k by
    $w_k \propto \sum_i \tau_{k,i}^2$; average, by weight, the entries that carry the
    sign of $\sum_k \tau_k$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      density: the fraction selected of a leaf's entries of nonzero variance, in (0, 1]:
        a scalar, or a tree of scalars by leaf. May be traced. 1 selects all.
      eps: mergekit's guard: below it the mean squares of a leaf, summed over models,
        give equal weights, and the agreeing weight counts as at least `eps`.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: a density outside (0, 1] or NaN, or one per model; a negative `eps`.

    Degenerate inputs:
      A fraction that selects less than one entry selects none. A leaf of zeros gives 0;
      a tied election elects +; entries as variable as the last one selected stay too.

    References:
      Wan et al., 2024, "FuseChat", https://arxiv.org/abs/2408.07990, SCE. mergekit:
      `eps=1e-6` (its weights are then equal wherever task vectors are small).

    Example:
      >>> import jax.numpy as jnp
      >>> sce({"w": jnp.array([[3.0, 1.0], [1.0, -1.0]])})
      {'w': Array([2.6666667, 1.       ], dtype=float32)}
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    x = wide(deltas, name="deltas")
    check_density(density, x)
    fractions = spread(density, x, name="density", per_model=False)
    picked = jax.tree.map(_select, x, fractions)
    agree = elect(picked)
    leaf = lambda v, a: _erase(v, a, eps)
    return narrow(jax.tree.map(leaf, picked, agree), deltas)


def _select(x: Float[Array, "k ..."], fraction: Any) -> Float[Array, "k ..."]:
    """Zeroes all but the given fraction of the entries that vary over the models."""
    if all_ones(fraction):
        return x
    models = slices(jax.lax.stop_gradient(x))
    k = len(models)
    mean = total(models) / k
    squares = [rounded(jnp.square(m - mean)) for m in models]
    variance = total(squares) / k
    with jax.enable_x64(True):
        varying = jnp.sum(variance > 0, dtype=jnp.int64)
    rank = floor_count(fraction, varying)
    cut = tree.kth_largest([variance[None]], rank, stacked=True)[0]
    whole = jnp.asarray(fraction >= 1)
    return jnp.where((whole | (variance >= cut))[None], x, 0)


def _erase(x: Float[Array, "k ..."], agree: Array, eps: float) -> Float[Array, "..."]:
    """The mean of what agrees, weighted by the energy of each model in this leaf."""
    models, masks = slices(x), slices(agree)
    energy = [jnp.mean(jnp.square(m)) for m in models]
    whole = total(energy)
    small = (whole < eps) | (whole == 0)
    safe = jnp.where(small, 1, whole)
    share = [jnp.where(small, 1 / len(models), e / safe) for e in energy]
    zero = jnp.zeros_like(models[0])
    held = [jnp.where(a, s, zero) for a, s in zip(masks, share, strict=True)]
    weight = total(held)
    least = jnp.maximum(weight, jnp.asarray(eps, weight.dtype))
    products = [h * m for h, m in zip(held, models, strict=True)]
    return total(products) / jnp.where(least > 0, least, 1)
