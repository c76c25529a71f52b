"""Adaptive projected guidance: Sadat et al., 2024."""

from typing import Any

import jax
import jax.numpy as jnp

from ..types import Guidance, Noise
from ._guidance import Scale, check_scale, dot, guided, norm, weight
from ._predictions import Prediction
from ._tables import wide


def apg(
    *,
    scale: Scale,
    null: Any,
    eta: float = 0.0,
    norm_limit: float = 0.0,
    momentum: float = 0.0,
    space: Prediction = "x0",
) -> Guidance:
    r"""APG: guidance without what only saturates, along the conditional prediction.

    $D = D_c + (w - 1)(\Delta_\perp + \eta \Delta_\parallel)$, where $\Delta \leftarrow
    \Delta \min(1, r / \|\Delta\|)$ of the running $\Delta_t = D_c - D_\varnothing +
    \beta \Delta_{t-1}$ is parted along and across $D_c$.

    Args:
      scale: w, as in `cfg`.
      null: see `cfg`.
      eta: how much is kept of the part along $D_c$; at 1, without limit and momentum,
        this is `cfg`.
      norm_limit: r, the most that a sample's update may measure; 0 is no limit.
      momentum: beta, below 0 in the paper; 0 keeps no past, and no memory of it.
      space: where it is done; the paper, and what users found, ask for x0.

    Returns:
      A guidance. The past is that of evaluations: a solver of two a step makes two.

    Raises:
      ValueError: a scale, eta or momentum that is NaN; a `norm_limit` below 0; `null`
        as in `cfg`.

    Degenerate inputs:
      A conditional prediction of 0 has nothing along it: all of the update is kept.

    References:
      Sadat et al., 2024, "Eliminating Oversaturation and Artifacts of High Guidance
      Scales in Diffusion Models", https://arxiv.org/abs/2410.02416, Algorithm 1.
      (diffusers starts from the unconditional prediction instead, $D_\varnothing + w
      (\Delta_\perp + \eta \Delta_\parallel)$: another method where eta is not 1.)

    Example:
      >>> from jaxlab import diffusion
      >>> tall = lambda x, noise, cond: x * 0 + jnp.stack([cond, cond * 0 + 1], 1)
      >>> denoise = apg(scale=3.0, null=jnp.ones(1))(diffusion.lift(tall))
      >>> denoise(jnp.zeros((1, 2)), Noise(0, 1, 1), jnp.full(1, 2.0)).round(3)
      Array([[2.4, 0.2]], dtype=float32)
    """
    for name, value in (("scale", scale), ("eta", eta), ("momentum", momentum)):
        check_scale(name, value)
    if not norm_limit >= 0:
        raise ValueError(f"norm_limit must be at least 0, got {norm_limit}")

    def combine(c: Any, u: Any, x: Any, noise: Noise, own: Any) -> tuple[Any, Any]:
        update = c - u
        if own is not None:
            own = update = update + momentum * own
        if norm_limit:
            size = norm(update)
            safe = jnp.where(size > 0, size, 1)
            update = update * jnp.where(size > 0, jnp.minimum(1, norm_limit / safe), 1)
        size = dot(c, c)
        along = dot(update, c) / jnp.where(size > 0, size, 1) * c
        kept = update - (1 - eta) * along
        return c + (weight(scale, noise, x) - 1) * kept, own

    past = isinstance(momentum, jax.Array) or momentum != 0

    def init(x: Any) -> Any:
        return jnp.zeros_like(x, wide(x)) if past else None

    return guided(combine, null=null, init=init, space=space)
