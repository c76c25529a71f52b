"""Spherical linear interpolation (Shoemake, 1985)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import mix, narrow, slices, spread, wide
from ._gram import arc, cosine


def slerp(models: Stacked, *, t: PerModel, threshold: float = 0.9995) -> Params:
    r"""Interpolates two models along the arc between their directions, leaf by leaf.

    $\theta = \frac{\sin((1-t)\Omega)}{\sin\Omega}\theta_1 +
    \frac{\sin(t\Omega)}{\sin\Omega}\theta_2$, with $\Omega$ the angle between the two.

    Args:
      models: `[2, *leaf]` models; the first is at $t = 0$.
      t: a scalar, or a tree of scalars by leaf. May be traced; outside [0, 1] it
        extrapolates along the same arc.
      threshold: where $|\cos\Omega|$ is above it, interpolates linearly, in (0, 1].

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: there are not exactly two models, or an option is out of range.

    Degenerate inputs:
      Parallel and opposite leaves are interpolated linearly. A leaf of norm below 1e-8
      has no direction and counts as orthogonal.

    References:
      Shoemake, 1985, "Animating Rotation with Quaternion Curves", Section 3.3. The
      threshold, and the defaults, are those of mergekit's `slerp`; 1 gives the formula.

    Example:
      >>> import jax.numpy as jnp
      >>> slerp({"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}, t=0.5)
      {'w': Array([0.70710677, 0.70710677], dtype=float32)}
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    x = wide(models, name="models", k=2)
    fractions = spread(t, x, name="t", per_model=False)

    def leaf(v: Float[Array, "2 ..."], f: Any) -> Float[Array, "..."]:
        a, b = slices(v)
        aa, bb = jnp.sum(a * a), jnp.sum(b * b)
        cos = cosine(jnp.sum(a * b), aa, bb, floor=1e-8)
        linear = (jnp.abs(cos) > threshold) | (jnp.abs(cos) >= 1)
        return mix(list(arc(cos, jnp.asarray(f, v.dtype), linear=linear)), v)

    return narrow(jax.tree.map(leaf, x, fractions), models)
