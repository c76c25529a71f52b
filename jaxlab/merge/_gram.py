"""Inner products of the models of one leaf, and what angles they make.

Spherical merges lie in the span of the models, so k x k numbers decide them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._coefficients import slices


def gram(x: Float[Array, "k ..."]) -> Float[Array, "k k"]:
    """All inner products of the k models of a leaf.

    Each is its own sum: on CPU that reads bfloat16 three times faster than one matrix
    product at k = 8, and it leaves a sharded leaf where it is.
    """
    models = slices(x)
    k = len(models)
    upper = {
        (i, j): jnp.sum(models[i] * models[j]) for i in range(k) for j in range(i, k)
    }
    flat = [upper[min(i, j), max(i, j)] for i in range(k) for j in range(k)]
    return jnp.stack(flat).reshape(k, k)


def root(square: Array) -> Array:
    """The square root, with gradient 0 where it is 0 (or rounded below)."""
    positive = square > 0
    safe = jnp.where(positive, square, jnp.ones_like(square))
    return jnp.where(positive, jnp.sqrt(safe), jnp.zeros_like(square))


def cosine(ab: Array, aa: Array, bb: Array, *, floor: float) -> Array:
    """The cosine of two vectors from inner products; norms count as >= `floor`."""
    least = jnp.asarray(floor**2, aa.dtype)
    norm = lambda square: jnp.sqrt(jnp.maximum(square, least))
    return jnp.clip(ab / norm(aa) / norm(bb), -1, 1)


def arc(cos: Array, t: Array, *, linear: Array) -> tuple[Array, Array]:
    r"""The coefficients $\sin((1-t)\theta)/\sin\theta$ and $\sin(t\theta)/\sin\theta$.

    Where `linear` holds they are 1 - t and t; the other branch stays finite there.
    """
    theta = jnp.arccos(jnp.where(linear, jnp.zeros_like(cos), cos))
    sine = jnp.sin(theta)
    first = jnp.where(linear, 1 - t, jnp.sin((1 - t) * theta) / sine)
    second = jnp.where(linear, t, jnp.sin(t * theta) / sine)
    return first, second


def angle_over_sine(cos: Array) -> Array:
    r"""$\theta/\sin\theta$ of $\cos\theta$: 1 at $\theta = 0$, and 0 at $\theta = \pi$.

    Near 1 both vanish, so it is summed as $\sum_n n!/(2n+1)!!\,(1-\cos\theta)^n$.
    """
    rest = 1 - cos
    near, opposite = rest < 1e-2, cos <= -1
    series = jnp.ones_like(cos)
    for n in range(9, 0, -1):
        series = 1 + series * jnp.where(near, rest, 0) * (n / (2 * n + 1))
    inside = jnp.where(near | opposite, jnp.zeros_like(cos), cos)
    exact = jnp.arccos(inside) / jnp.sqrt(1 - inside**2)
    return jnp.where(near, series, jnp.where(opposite, 0, exact))
