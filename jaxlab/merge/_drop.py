"""Dropping entries of task vectors at random."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np

from .. import tree
from ..types import PerModel, Stacked
from ._coefficients import all_ones, lift, narrow, spread, wide
from ._trim import check_density

Rescale = Literal["density", "l1"] | None
"""What makes up for lost entries: 1 / the chance to stay, the L1 norm, nothing."""


def drop(
    deltas: Stacked,
    *,
    density: PerModel,
    rescale: Rescale = "density",
    key: PRNGKeyArray,
) -> Stacked:
    r"""Drops entries of each task vector at random and rescales the rest.

    $\hat\delta = m \odot \delta / d$ with $m \sim \mathrm{Bernoulli}(d)$.

    Args:
      deltas: `[k, *leaf]` task vectors.
      density: $d$, the chance that an entry stays, in (0, 1]: a scalar, `[k]`, or a
        tree of either by leaf. May be traced; the masks are constants to a gradient.
      rescale: "density" divides by $d$ (the paper, PEFT), "l1" restores the L1 norm of
        each leaf of each model (mergekit), None does neither.
      key: consumed. The draw of a leaf depends on its path and shape alone.

    Returns:
      `[k, *leaf]` sparse task vectors, in the dtypes of `deltas`.

    Raises:
      ValueError: a density outside (0, 1] or NaN; an unknown `rescale`.

    Degenerate inputs:
      With "l1", a leaf whose L1 norm before or after is below 1e-7 is not rescaled.

    References:
      Yu et al., 2023, "Language Models are Super Mario" (DARE),
      https://arxiv.org/abs/2311.03099, Section 3. The paper's drop rate is $1 - d$.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = drop({"w": jnp.ones((1, 99))}, density=0.5, key=jax.random.key(0))
      >>> sorted(set(x["w"].ravel().tolist()))
      [0.0, 2.0]
    """
    x = wide(deltas, name="deltas")
    _check_rescale(rescale)
    chances = check_density(density, x)
    if all_ones(chances):
        return narrow(x, deltas)
    chances = jax.tree.map(lift, chances, x)
    return narrow(_sample(x, chances, rescale, key), deltas)


def drop_by_rank(
    deltas: Stacked,
    *,
    density: PerModel,
    epsilon: PerModel = 0.15,
    rescale: Rescale = "density",
    key: PRNGKeyArray,
) -> Stacked:
    r"""Drops entries at random, the small ones more often than the large ones.

    An entry whose magnitude has rank $r \in \{0, \dots, n-1\}$ in its row stays with
    the chance $p = d - \epsilon + 2\epsilon r / (n - 1)$.

    Args:
      deltas: `[k, *leaf]` task vectors. A row runs along axis 1 of a leaf of two axes
        or more; a vector is one row.
      density: $d$, the mean chance to stay, in (0, 1]: a scalar, `[k]`, or a tree of
        either by leaf. May be traced; masks and ranks are constants to a gradient.
      epsilon: $\epsilon$, half the range of the chances, likewise; where $d < 1$,
        $d \pm \epsilon$ must lie in (0, 1].
      rescale: "density" divides each entry by its own $p$ (the paper), "l1" restores
        the L1 norm of each leaf of each model (mergekit), None does neither.
      key: consumed. The draw of a leaf depends on its path and shape alone.

    Returns:
      `[k, *leaf]` sparse task vectors, in the dtypes of `deltas`.

    Raises:
      ValueError: $d$ or $d \pm \epsilon$ out of range or NaN; an unknown `rescale`.

    Degenerate inputs:
      Equal magnitudes share their mean rank; a row of one entry stays with the chance
      $d$; $d = 1$ keeps everything. Ranks are those of the magnitudes in float32.

    References:
      Deep et al., 2024, "DELLA-Merging", https://arxiv.org/abs/2406.11617, Section 3
      (MAGPRUNE). The paper's $\epsilon$, the whole range of the chances, is twice ours;
      ours is mergekit's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x, key = {"w": jnp.arange(1000.0)[None]}, jax.random.key(0)
      >>> kept = drop_by_rank(x, density=0.5, epsilon=0.4, key=key)["w"] > 0
      >>> bool(kept[0, :500].sum() < 180 and kept[0, 500:].sum() > 320)
      True
    """
    x = wide(deltas, name="deltas")
    density = check_density(density, x)
    epsilon = spread(
        epsilon, x, name="epsilon", valid=lambda e: e >= 0, expected="at least 0"
    )
    _check_rescale(rescale)
    tree.path_map(_check_range, density, epsilon)
    if all_ones(density):
        return narrow(x, deltas)

    def chance(v: Float[Array, "k ..."], d: Any, e: Any) -> Float[Array, "k ..."]:
        d, e = lift(d, v), lift(e, v)
        p = d - e + 2 * e * _rank(v).astype(v.dtype)
        return jnp.where(d >= 1, jnp.ones_like(p), p)

    chances = jax.tree.map(chance, x, density, epsilon)
    return narrow(_sample(x, chances, rescale, key), deltas)


def _sample(
    x: Stacked, chances: Stacked, rescale: Rescale, key: PRNGKeyArray
) -> Stacked:
    """Keeps each entry with its chance, by uniforms of the stacked leaf's shape."""

    def leaf(path: str, v: Array, p: Any, k: PRNGKeyArray) -> Array:
        kept = _uniform(path, k, v.shape) < jnp.asarray(p, jnp.float32)
        thin = jnp.where(kept, v, 0)
        if rescale == "density":
            return thin / jnp.where(p > 0, p, jnp.ones_like(p))
        return thin * _same_l1(v, thin) if rescale == "l1" else thin

    return tree.path_map(leaf, x, chances, tree.keys_like(key, x))


def _check_rescale(rescale: Rescale) -> None:
    """Raises where the option is unknown."""
    if rescale not in ("density", "l1", None):
        raise ValueError(f"rescale must be 'density', 'l1' or None, got {rescale!r}")


def _uniform(path: str, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """The draw behind a leaf's mask: float32 in every dtype, so all keep the same."""
    del path
    return jax.random.uniform(key, shape, jnp.float32)


def _same_l1(before: Array, after: Array) -> Array:
    """The factor, per model, that gives `after` the L1 norm of `before`."""
    axes = tuple(range(1, before.ndim))
    old = jnp.sum(jnp.abs(before), axes, keepdims=True)
    new = jnp.sum(jnp.abs(after), axes, keepdims=True)
    fine = (old >= 1e-7) & (new >= 1e-7)
    return jnp.where(fine, old / jnp.where(fine, new, 1), 1)


def _rank(x: Float[Array, "k ..."]) -> Float[Array, "k ..."]:
    """The rank of each magnitude in its row, in [0, 1]; ties share their mean rank.

    Sorts (magnitude, place) packed in one integer, which is several times faster on CPU
    than sorting floats with an operand, then sorts the ranks back to their places.
    """
    axis = min(2, x.ndim - 1)
    n = x.shape[axis] if x.ndim > 1 else 1
    if n <= 1:
        return jnp.full(x.shape, 0.5, jnp.float32)
    size = jnp.abs(jax.lax.stop_gradient(x)).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(size, jnp.uint32)
    with jax.enable_x64(True):
        place = jax.lax.broadcasted_iota(jnp.uint64, x.shape, axis)
        half = np.uint64(32)
        packed = jnp.sort((bits.astype(jnp.uint64) << half) | place, axis=axis)
        where = packed & np.uint64(2**32 - 1)
        twice = _twice_mean_rank((packed >> half).astype(jnp.uint32), axis)
        back = jnp.sort((where << half) | twice.astype(jnp.uint64), axis=axis)
        ranks = (back & np.uint64(2**32 - 1)).astype(jnp.float32)
    return ranks / np.float32(2 * (n - 1))


def _twice_mean_rank(ordered: Array, axis: int) -> Array:
    """For sorted values, the first plus the last place of the run each belongs to."""
    n = ordered.shape[axis]
    place = jax.lax.broadcasted_iota(jnp.uint32, ordered.shape, axis)
    cut = lambda lo, hi: jax.lax.slice_in_dim(ordered, lo, hi, axis=axis)
    new = cut(1, n) != cut(0, n - 1)
    edge = jnp.ones_like(jax.lax.slice_in_dim(new, 0, 1, axis=axis))
    starts = jnp.concatenate([edge, new], axis)
    ends = jnp.concatenate([new, edge], axis)
    first = jax.lax.cummax(jnp.where(starts, place, np.uint32(0)), axis)
    last = jax.lax.cummin(jnp.where(ends, place, np.uint32(n)), axis, reverse=True)
    return first + last


def _check_range(path: str, density: Any, epsilon: Any) -> None:
    """Raises where a concrete density below 1 leaves (0, 1] within epsilon."""
    if not isinstance(density, np.ndarray) or not isinstance(epsilon, np.ndarray):
        return
    low, high = density - epsilon, density + epsilon
    if np.any((density < 1) & ((low <= 0) | (high > 1))):
        raise ValueError(
            f"density - epsilon and density + epsilon must lie in (0, 1]; at leaf "
            f"{path!r} they are {low.tolist()} and {high.tolist()}"
        )
