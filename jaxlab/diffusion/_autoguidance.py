"""Guidance against a weaker network: Karras et al., 2024."""

from typing import Any

from ..types import Denoiser, Guidance, Noise
from ._guidance import Guided, Scale, check_scale, weight
from ._predictions import lift
from ._tables import wide


def autoguidance(weak: Any, *, scale: Scale) -> Guidance:
    r"""Autoguidance: away from a bad version of the denoiser.

    $D = D_1 + (w - 1)(D_1 - D_0)$, with $D_0$ of another network.

    Args:
      weak: D_0, a denoiser or a function `(x, noise, cond) -> x0`: of a smaller
        network, one trained less, or one that is not told the condition.
      scale: w, as in `cfg`; 1 is the denoiser itself.

    Returns:
      A guidance of one call on each network; both count as evaluations.

    Raises:
      ValueError: a scale that is NaN.

    Degenerate inputs:
      The denoiser as its own guide: no guidance, at any scale.

    References:
      Karras et al., 2024, "Guiding a Diffusion Model with a Bad Version of Itself",
      https://arxiv.org/abs/2406.02507, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import diffusion
      >>> one, half = (diffusion.lift(lambda x, *_, a=a: x * a) for a in (1.0, 0.5))
      >>> float(autoguidance(half, scale=3.0)(one)(jnp.ones(1), Noise(0, 1, 1))[0])
      2.0
    """
    check_scale("scale", scale)
    guide = lift(weak)

    def decorate(denoise: Any) -> Denoiser:
        inner = lift(denoise)

        def init(x: Any, cond: Any) -> Guided:
            return Guided(inner.init(x, cond), guide.init(x, cond))

        def apply(x: Any, noise: Noise, cond: Any, state: Guided) -> Any:
            good, after = inner.apply(x, noise, cond, state.inner)
            bad, own = guide.apply(x, noise, cond, state.own)
            good, bad = good.astype(wide(x)), bad.astype(wide(x))
            value = good + (weight(scale, noise, x) - 1) * (good - bad)
            return value.astype(x.dtype), Guided(after, own)

        return Denoiser(init, apply)

    return decorate
