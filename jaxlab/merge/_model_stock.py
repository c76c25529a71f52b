"""Model Stock (Jang et al., 2024)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, Stacked
from ._coefficients import mix, narrow, slices, total, wide
from ._gram import root


def model_stock(
    deltas: Stacked,
    *,
    filter_wise: bool = False,
    eps: float = 0.0,
    mean: Literal["cosine", "angle"] = "cosine",
) -> Params:
    r"""Shrinks the mean task vector by how much the models agree on a direction.

    $\tau = t\,\frac1k\sum_k\tau_k$ with $t = \frac{k\cos\theta}{1 + (k-1)\cos\theta}$
    and $\cos\theta$ the mean cosine over the pairs of models, leaf by leaf. Two models
    have one angle, and $t = 2\cos\theta/(1 + \cos\theta)$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      filter_wise: take the angle of each vector along the last axis alone.
      eps: the least that counts as the product of two norms.
      mean: what is averaged over more than one pair: the "cosine" (mergekit), or the
        "angle" $\theta$ (FusionBench).

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once.

    Raises:
      ValueError: a negative `eps`, or an unknown `mean`.

    Degenerate inputs:
      A pair with a zero norm has the cosine 0. At the pole $1 + (k-1)\cos\theta = 0$
      the result is 0. One model gives itself.

    References:
      Jang et al., 2024, "Model Stock", https://arxiv.org/abs/2403.19522, Section 4. The
      paper takes $\theta$ as a common angle of all pairs, so both means are its own
      where that holds; `eps=1e-6` is mergekit's.

    Example:
      >>> import jax.numpy as jnp
      >>> model_stock({"w": jnp.array([[1.0, 1.0], [1.0, 1.0]])})
      {'w': Array([1., 1.], dtype=float32)}
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if mean not in ("cosine", "angle"):
        raise ValueError(f"mean must be 'cosine' or 'angle', got {mean!r}")
    x = wide(deltas, name="deltas")

    def leaf(v: Float[Array, "k ..."]) -> Float[Array, "..."]:
        k = v.shape[0]
        center = mix([v.dtype.type(1 / k)] * k, v)
        if k == 1:
            return center
        return _ratio(slices(v), filter_wise, eps, mean) * center

    return narrow(jax.tree.map(leaf, x), deltas)


def _ratio(models: list[Array], filter_wise: bool, eps: float, mean: str) -> Array:
    """The interpolation ratio t of one leaf, or of each of its filters."""
    axes = -1 if filter_wise and models[0].ndim else None
    dot = lambda a, b: jnp.sum(a * b, axes, keepdims=True)
    norms = [root(dot(a, a)) for a in models]
    cosines = []
    for i, a in enumerate(models):
        for j in range(i):
            size = norms[i] * norms[j]
            size = jnp.maximum(size, jnp.asarray(eps, size.dtype))
            safe = jnp.where(size > 0, size, 1)
            cosines.append(jnp.clip(dot(a, models[j]) / safe, -1, 1))
    k = len(models)
    if mean == "angle" and k > 2:
        cos = jnp.cos(total([_angle(c) for c in cosines]) / len(cosines))
    else:
        cos = total(cosines) / len(cosines)
    below = 1 + (k - 1) * cos
    pole = jnp.abs(below) < 1e-6
    return jnp.where(pole, 0, k * cos / jnp.where(pole, 1, below))


def _angle(cos: Array) -> Array:
    """The angle of a cosine, with gradient 0 where it is 0 or 180 degrees."""
    straight = jnp.abs(cos) >= 1
    bent = jnp.arccos(jnp.where(straight, 0, cos))
    return jnp.where(straight, jnp.where(cos > 0, 0, jnp.pi), bent)
