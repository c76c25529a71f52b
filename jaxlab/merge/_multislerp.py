"""Multi-SLERP: the weighted mean direction, at the weighted mean length."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import mix, narrow, normalised, rows, spread, wide
from ._gram import gram, root


def multislerp(
    models: Stacked,
    *,
    weights: PerModel = 1.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Params:
    r"""Averages directions on the sphere and lengths on the line, leaf by leaf.

    With $u_k = \theta_k / (\|\theta_k\| + \epsilon)$ and $m = \sum_k w_k u_k$, the
    result is $(\sum_k w_k\|\theta_k\|)\, m / \|m\|$.

    Args:
      models: `[k, *leaf]` models. Run it through `on_base` to move on the sphere around
        a base.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      normalize: divide the weights by their sum.
      eps: $\epsilon$, added to norms.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: weights that sum to 0 with `normalize`, NaN, or of another shape.

    Degenerate inputs:
      Directions that cancel (to about float precision) leave no mean direction: the
      result is the weighted sum $\sum_k w_k\theta_k$. One model gives itself.

    References:
      Goddard, 2025, "Multi-SLERP",
      https://goddard.blog/posts/multislerp-wow-what-a-cool-idea; equal to mergekit's.
      The post projects the directions to the tangent space at $m$, sums them there, and
      maps the sum back; as $\sum_k w_k(u_k - \langle u_k, \hat m\rangle \hat m) = m -
      \|m\| \hat m = 0$, that step vanishes and is left out here.

    Example:
      >>> import jax.numpy as jnp
      >>> multislerp({"w": jnp.array([[1.0, 0.0], [0.0, 3.0]])})
      {'w': Array([1.4142135, 1.4142135], dtype=float32)}
    """
    x = wide(models, name="models")
    w = spread(weights, x, name="weights")
    if normalize:
        w = normalised(w, x)

    def leaf(v: Float[Array, "k ..."], c: Any) -> Float[Array, "..."]:
        if v.shape[0] == 1:
            return v[0]
        return mix(_coefficients(gram(v), jnp.stack(rows(c, v)), eps), v)

    return narrow(jax.tree.map(leaf, x, w), models)


def _coefficients(
    products: Float[Array, "k k"], weights: Float[Array, " k"], eps: float
) -> list[Array]:
    """What each model is multiplied by."""
    norms = root(jnp.diagonal(products))
    shares = weights / (norms + jnp.asarray(eps, norms.dtype))
    square = shares @ products @ shares
    noise = 16 * jnp.finfo(norms.dtype).eps * jnp.sum(jnp.abs(weights)) ** 2
    none = square <= jnp.maximum(noise, jnp.asarray(eps**2, norms.dtype))
    length = root(jnp.where(none, jnp.ones_like(square), square))
    out = jnp.where(none, weights, shares * jnp.sum(weights * norms) / length)
    return [out[i] for i in range(out.shape[0])]
