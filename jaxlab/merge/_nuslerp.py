"""Normalised-weight spherical interpolation: whole leaves, rows or columns."""

from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, normalised, slices, spread, wide
from ._gram import arc, cosine


def nuslerp(
    models: Stacked,
    *,
    weights: PerModel = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
) -> Params:
    r"""Interpolates two models along arcs, at $t = w_2 / (w_1 + w_2)$.

    Args:
      models: `[2, *leaf]` models $\theta_1, \theta_2$. Run it through `on_base` to move
        on the sphere around a base.
      weights: $w$: a scalar, `[2]`, or a tree of either by leaf. May be traced.
      flatten: a whole leaf is one vector; else each vector along one axis is.
      row_wise: without `flatten`, that axis is axis 0 of the leaf; else it is the last.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: there are not exactly two models, or the weights sum to 0.

    Degenerate inputs:
      Parallel and opposite vectors are interpolated linearly; one of norm below 1e-7
      counts as nearly orthogonal. Traced weights that sum to 0 give $t = 1/2$.

    References:
      Shoemake, 1985, "Animating Rotation with Quaternion Curves", Section 3.3;
      mergekit's `nuslerp` (`nuslerp_flatten`, `nuslerp_row_wise`), which also gives $t
      = 1/2$ where the weights sum to 0.

    Example:
      >>> import jax.numpy as jnp
      >>> nuslerp({"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])})
      {'w': Array([0.70710677, 0.70710677], dtype=float32)}
    """
    x = wide(models, name="models", k=2)
    shares = normalised(spread(weights, x, name="weights"), x)

    def leaf(v: Float[Array, "2 ..."], w: Any) -> Float[Array, "..."]:
        a, b = slices(v)
        axes = None if flatten or not a.ndim else 0 if row_wise else -1
        dot = lambda y, z: jnp.sum(y * z, axes, keepdims=True)
        cos = cosine(dot(a, b), dot(a, a), dot(b, b), floor=1e-7)
        linear = 1 - cos**2 <= 1e-16
        first, second = arc(cos, _second(w, v), linear=linear)
        return first * a + second * b

    return narrow(jax.tree.map(leaf, x, shares), models)


def _second(w: Any, like: Array) -> Any:
    """The share of the second model; 1/2 where traced weights sum to 0."""
    if not isinstance(w, Tracer):
        return np.asarray(w[1], like.dtype)
    first, second = (jax.lax.index_in_dim(w, i, keepdims=False) for i in (0, 1))
    none = first + second == 0
    return jnp.where(none, jnp.full_like(second, 0.5), second).astype(like.dtype)
