"""Linear connectivity: the loss along the straight line between two models."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from .. import tree
from ..types import Params


class Connectivity(NamedTuple):
    """The loss between two models.

    Attributes:
      t: `[points]` from 0 at the first model to 1 at the second.
      loss: `[points]` the loss there.
      barrier: how far the loss rises above the line between the losses at the ends
        (Entezari et al.).
      instability: how far it rises above their mean (Frankle et al.).
    """

    t: Float[Array, " points"]
    loss: Float[Array, " points"]
    barrier: Float[Array, ""]
    instability: Float[Array, ""]


def linear_connectivity(
    loss: Callable[[Params], Array], a: Params, b: Params, *, points: int = 11
) -> Connectivity:
    r"""The loss on the line between two models, and how high its barrier is.

    $\ell(t) = L((1-t)\theta_a + t\theta_b)$; the barrier is $\max_t\,[\ell(t) -
    (1-t)\ell(0) - t\ell(1)]$, the instability $\max_t \ell(t) - (\ell(0)+\ell(1))/2$.

    Args:
      loss: the loss $L$ of parameters, data bound; a scalar JAX can trace. For a number
        where more is better, such as an accuracy, give its negative.
      a: `[*leaf]` the model at $t = 0$.
      b: `[*leaf]` the model at $t = 1$, of the same structure.
      points: how many equally spaced $t$, both ends included.

    Returns:
      `(t, loss, barrier, instability)`: `[points]`, `[points]` and two scalars, none
      below 0 for the barrier. One model is held at a time.

    Raises:
      ValueError: fewer than 2 points, trees that differ, or a leaf that is not
        floating-point; names the leaf.

    Degenerate inputs:
      Equal models, and a loss that is convex on the line, have the barrier 0. A loss of
      NaN anywhere makes it NaN.

    References:
      Frankle et al., 2020, "Linear Mode Connectivity and the Lottery Ticket
      Hypothesis", https://arxiv.org/abs/1912.05671, Section 2. Entezari et al., 2022,
      "The Role of Permutation Invariance in Linear Mode Connectivity of Neural
      Networks", https://arxiv.org/abs/2110.06296, Definition 1.

    Example:
      >>> hill = lambda params: 1 - params["w"] ** 2
      >>> ends = {"w": jnp.float32(-1)}, {"w": jnp.float32(1)}
      >>> float(linear_connectivity(hill, *ends, points=5).barrier)
      1.0
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    tree.check_like(b, a, name="b")
    for name, model in (("a", a), ("b", b)):
        for path, x in zip(tree.paths(model), jax.tree.leaves(model), strict=True):
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                raise ValueError(
                    f"{name} has the leaf {path!r} of dtype {jnp.result_type(x)}; only "
                    f"floating-point ones can be interpolated: bind the others in loss"
                )
    t = jnp.linspace(0, 1, points, dtype=jnp.float32)
    losses = jax.lax.map(lambda s: _scalar(loss(_between(a, b, s))), t)
    ends = losses[0], losses[-1]
    share = t.astype(losses.dtype)
    line = ends[0] + share * (ends[1] - ends[0])
    height = jnp.max(losses - line)
    return Connectivity(
        t,
        losses,
        jnp.maximum(height, 0),  # the line itself is rounded at t = 1
        jnp.max(losses) - (ends[0] + ends[1]) / 2,
    )


def barrier(
    loss: Callable[[Params], Array], a: Params, b: Params, *, points: int = 11
) -> Float[Array, ""]:
    r"""The height of the loss barrier between two models.

    Args:
      loss: as in `linear_connectivity`.
      a: `[*leaf]` one model.
      b: `[*leaf]` another of the same structure.
      points: how many points of the line, both ends included.

    Returns:
      A scalar, at least 0: `linear_connectivity(...).barrier`.

    Raises:
      ValueError: as `linear_connectivity`.

    Degenerate inputs:
      As `linear_connectivity`.

    References:
      Entezari et al., 2022, https://arxiv.org/abs/2110.06296, Definition 1.

    Example:
      >>> bowl = lambda params: params["w"] ** 2
      >>> float(barrier(bowl, {"w": jnp.float32(-1)}, {"w": jnp.float32(1)}))
      0.0
    """
    return linear_connectivity(loss, a, b, points=points).barrier


def _between(a: Params, b: Params, t: Float[Array, ""]) -> Params:
    """The model at t, in the dtypes of `a`; exact at the ends and for equal models."""

    def leaf(x: Any, y: Any) -> Array:
        x, y = jnp.asarray(x), jnp.asarray(y)
        wide = np.promote_types(tree.widen(x).dtype, tree.widen(y).dtype)
        s, low, high = t.astype(wide), x.astype(wide), y.astype(wide)
        step = high - low
        near = jnp.where(s < 0.5, low + s * step, high - (1 - s) * step)
        return near.astype(x.dtype)

    return jax.tree.map(leaf, a, b)


def _scalar(loss: Any) -> Array:
    """A loss in at least float32, checked to be one number."""
    loss = tree.widen(jnp.asarray(loss))
    if loss.ndim:
        raise ValueError(f"loss must return a scalar, got shape {loss.shape}")
    return loss
