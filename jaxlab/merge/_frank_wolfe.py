"""Frank-Wolfe merging (Chen et al., 2025)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ..types import Params, Stacked
from ._coefficients import models as count, narrow, wide, wide_one
from ._learn import Learned, Loss
from ._loop import loop
from ._task_arithmetic import task_arithmetic


def frank_wolfe(
    models: Stacked,
    batches: Any,
    *,
    loss: Loss,
    base: Params | None = None,
    per: Literal["model", "leaf"] = "model",
    top: int = 1,
    scale: float = 1.0,
    epochs: int = 1,
) -> Learned:
    r"""Walks through the hull of the models to where a loss is least.

    $s_t = \arg\min_{\theta_k}\langle\nabla\ell(\theta_t), \theta_k\rangle$ and
    $\theta_{t+1} = \theta_t + \lambda\frac{2}{t+2}(s_t - \theta_t)$.

    Args:
      models: `[k, *leaf]` models $\theta_k$, the corners of the hull.
      batches: labelled batches, arrays `[t, ...]` or an iterator.
      loss: $\ell$: `loss(params, batch)`, a scalar.
      base: `[*leaf]` where to start; None is the mean of the models. With
        $\lambda = 1$ the first step forgets it.
      per: "model" picks one corner for all leaves, "leaf" one for each: the hull is
        then a product of hulls.
      top: how many corners, those of the least products, share a step equally: 1 is
        the hard variant, more the soft.
      scale: $\lambda$, in (0, 1].
      epochs: passes over stacked batches.

    Returns:
      `Learned(params, coefficients, losses)`: the model in the dtypes of `models`; its
      convex weights, `[k]` or a tree by leaf of `[k]`, of which the rest to 1 is the
      base's; the loss before each step.

    Raises:
      ValueError: an option out of range, trees that differ, or as `learn` does.

    Degenerate inputs:
      Equal products pick the first model. One model is reached in one step. Where the
      gradient is NaN the first corners are picked.

    References:
      Chen et al., 2025, "FW-Merging", https://arxiv.org/abs/2503.12649. The authors'
      code sums the cosines of leaves in place of the inner product, and tunes the
      shares of the soft variant by AdaMerging.

    Example:
      >>> import jax.numpy as jnp
      >>> got = frank_wolfe({"w": jnp.eye(3)}, jnp.ones((999, 1)),
      ...     loss=lambda p, x: jnp.sum((p["w"] - jnp.array([0.3, 0.7, 0])) ** 2 * x))
      >>> [round(float(c), 2) for c in got.coefficients]
      [0.3, 0.7, 0.0]
    """
    corners = wide(models, name="models")
    k = count(corners)
    if per not in ("model", "leaf"):
        raise ValueError(f"per must be 'model' or 'leaf', got {per!r}")
    if not (1 <= top <= k and 0 < scale <= 1):
        raise ValueError(
            f"top must be in 1 to {k} and scale in (0, 1], got {top} and {scale}"
        )
    fill = 1 / k if base is None else 0.0
    if base is None:
        origin = jax.tree.map(lambda x: jnp.zeros_like(x[0]), corners)
    else:
        origin = wide_one(base, name="base")
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), corners
        )
        tree.check_like(one, origin, name="models")
    start = jax.tree.map(lambda x: jnp.full(k, fill, x.dtype), corners)
    carry = start, jnp.zeros((), jnp.float32)
    options = loss, per, top, float(scale)
    data = corners, origin, jax.tree.map(lambda x: jnp.zeros((), x.dtype), models)
    (weights, _), losses = loop(_step, options, data, carry, batches, epochs=epochs)
    params = _at(weights, *data)
    if per == "model":
        weights = jax.tree.leaves(weights)[0]
    return Learned(params, weights, losses)


def _at(weights: Params, corners: Stacked, origin: Params, like: Params) -> Params:
    """The point of the hull: the rest of the weights is the origin's."""
    inner = task_arithmetic(corners, weights=weights)
    point = jax.tree.map(
        lambda p, w, b: p + (1 - jnp.sum(w)) * b, inner, weights, origin
    )
    return narrow(point, like)


def _step(
    data: tuple[Stacked, Params, Params],
    carry: tuple[Params, Array],
    batch: Any,
    loss: Loss,
    per: str,
    top: int,
    scale: float,
) -> tuple[tuple[Params, Array], Array]:
    """One step towards the corners of the least inner products."""
    weights, t = carry
    now, slope = jax.value_and_grad(loss)(_at(weights, *data), batch)

    def product(x: Float[Array, "k ..."], g: Array) -> Float[Array, " k"]:
        return jnp.sum(x * g.astype(x.dtype)[None], axis=tuple(range(1, x.ndim)))

    products = jax.tree.map(product, data[0], slope)
    if per == "model":
        whole = sum(x.astype(jnp.float32) for x in jax.tree.leaves(products))
        products = jax.tree.map(lambda _: whole, products)
    rate = scale * 2 / (t + 2)

    def move(w: Float[Array, " k"], p: Float[Array, " k"]) -> Float[Array, " k"]:
        best = jax.lax.top_k(-p, top)[1]
        corner = jnp.zeros_like(w).at[best].set(1 / top)
        return w + rate.astype(w.dtype) * (corner - w)

    return (jax.tree.map(move, weights, products), t + 1), now
