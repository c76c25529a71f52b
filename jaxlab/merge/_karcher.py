"""The Karcher mean of directions (Karcher, 1977)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import mix, narrow, normalised, rows, spread, wide
from ._gram import angle_over_sine, gram, root


def karcher(
    models: Stacked,
    *,
    weights: PerModel = 1.0,
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Params:
    r"""The point of the sphere nearest to all directions, at the mean length.

    Minimises $\sum_k w_k\,\angle(m, \theta_k)^2$ over unit $m$ by the fixed point
    $m \leftarrow \exp_m\!\big(\sum_k w_k \log_m u_k\big)$, leaf by leaf; the result is
    $(\sum_k w_k\|\theta_k\|)\,m$.

    Args:
      models: `[k, *leaf]` models $\theta_k$, $u_k = \theta_k/\|\theta_k\|$.
      weights: $w_k$, divided by their sum: a scalar, `[k]`, or a tree of either by
        leaf. May be traced.
      max_iter: the most steps taken; at least 0. Static.
      tol: a step shorter than this ends the iteration.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once. The iteration runs
      on k coefficients in the span of the models, so a leaf is read twice whatever
      `max_iter` is.

    Raises:
      ValueError: weights that sum to 0, NaN, or of another shape; a bad `max_iter`,
        `tol`.

    Degenerate inputs:
      A leaf of norm at most `tol` has no direction: it counts in the mean length only.
      If none has one the result is 0. Where the directions cancel, the iteration starts
      at the first of them; an opposite direction pulls to no side. One model gives
      itself.

    References:
      Karcher, 1977, "Riemannian center of mass and mollifier smoothing";
      https://arxiv.org/abs/2603.04972 for its use in merging. Equal to mergekit's
      `karcher` with equal weights.

    Example:
      >>> import jax.numpy as jnp
      >>> karcher({"w": jnp.array([[1.0, 0.0], [0.0, 3.0]])})
      {'w': Array([1.4142135, 1.4142135], dtype=float32)}
    """
    if max_iter < 0 or not tol > 0:
        raise ValueError(
            f"max_iter must be at least 0 and tol positive, got {max_iter} and {tol}"
        )
    x = wide(models, name="models")
    w = normalised(spread(weights, x, name="weights"), x)

    def leaf(v: Float[Array, "k ..."], c: Any) -> Float[Array, "..."]:
        if v.shape[0] == 1:
            return v[0]
        out = _coefficients(gram(v), jnp.stack(rows(c, v)), max_iter, tol)
        return mix([out[i] for i in range(v.shape[0])], v)

    return narrow(jax.tree.map(leaf, x, w), models)


def _coefficients(
    products: Float[Array, "k k"],
    weights: Float[Array, " k"],
    max_iter: int,
    tol: float,
) -> Float[Array, " k"]:
    """What each model is multiplied by."""
    norms = root(jnp.diagonal(products))
    valid = norms > tol
    safe = jnp.where(valid, norms, 1)
    both = valid[:, None] & valid[None]
    cosines = jnp.where(both, products / safe[:, None] / safe[None], 0)
    held = jnp.where(valid, weights, 0)
    total = jnp.sum(held)
    held = held / jnp.where(total == 0, 1, total)
    mean = _start(cosines, held, valid, tol)

    def step(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        mean, done = state
        moved, length = _step(cosines, held, mean, tol)
        done = done | (length < tol)
        return jnp.where(done, mean, moved), done

    mean, _ = jax.lax.fori_loop(0, max_iter, step, (mean, jnp.asarray(False)))
    return jnp.where(valid, jnp.sum(weights * norms) * mean / safe, 0)


def _start(cosines: Array, weights: Array, valid: Array, tol: float) -> Array:
    """The mean direction; the first one where they cancel. As coefficients."""
    square = weights @ cosines @ weights
    cancel = square < tol**2
    length = root(jnp.where(cancel, 1, square))
    first = jnp.zeros_like(weights).at[jnp.argmax(valid)].set(1)
    return jnp.where(cancel, first, weights / length)


def _step(
    cosines: Array, weights: Array, mean: Array, tol: float
) -> tuple[Array, Array]:
    """One fixed-point step from the unit `mean`; also how long it is."""
    along = jnp.clip(cosines @ mean, -1, 1)
    pull = weights * angle_over_sine(along)
    tangent = pull - jnp.sum(pull * along) * mean
    square = tangent @ cosines @ tangent
    still = square < tol**2
    length = root(jnp.where(still, 1, square))
    moved = jnp.cos(length) * mean + jnp.sin(length) / length * tangent
    size = root(moved @ cosines @ moved)
    unit = moved / jnp.where(size > tol, size, 1)
    return jnp.where(still, mean, unit), jnp.where(still, 0, length)
