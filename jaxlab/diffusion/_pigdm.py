"""Guidance by linear observations with Gaussian noise: Song et al., 2023."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ..types import Denoiser, Guidance, Noise
from ._classifier import score_to_x0
from ._guidance import dot
from ._predictions import along, lift
from ._tables import wide


def pigdm(
    operator: Callable[[Any], Any],
    *,
    observed: Callable[[Any], Any] = lambda cond: cond,
    deviation: float = 0.0,
    variance: float = 1.0,
    covariance: Literal["isotropic", "tweedie"] = "isotropic",
    iterations: int = 10,
) -> Guidance:
    r"""Pseudoinverse guidance by $y = H x_0 + \sigma_y z$.

    The score gets $J^\top H^\top (H V H^\top + \sigma_y^2 I)^{-1} (y - H \hat x_0)$, $J
    = \partial \hat x_0 / \partial x$, where V stands for the covariance of $x_0$ given
    $x$: $r^2 I$ with $r^2 = \sigma^2 v / (\sigma^2 + \alpha^2 v)$, or Tweedie's
    $\frac{\sigma^2}{\alpha} J^\top$.

    Args:
      operator: H, `[b, ...] -> [b, ...]`, linear, each sample's of its own.
      observed: `cond -> y [b, ...]`.
      deviation: sigma_y, of the observation's noise.
      variance: v, of the data; "isotropic" alone.
      covariance: V: "isotropic" (PiGDM) or "tweedie" (MMPS), of which each iteration
        differentiates the denoiser once more, without evaluating it.
      iterations: of conjugate gradients; as many as y has entries are exact, and one
        where H has orthonormal rows and V is isotropic.

    Returns:
      A guidance of one evaluation: the exact posterior mean where the data is Gaussian,
      of variance v in every direction; or of any covariance with "tweedie".

    Raises:
      ValueError: a negative deviation, a variance not above 0, fewer than 1 iteration,
        an unknown covariance; an observation of another shape than the operator gives.

    Degenerate inputs:
      Where alpha is 0 there is no guidance. Without noise, entries of y that no sample
      can have move nothing.

    References:
      Song et al., 2023, "Pseudoinverse-Guided Diffusion Models for Inverse Problems",
      https://openreview.net/forum?id=9_gsMA8MRKQ, equation 7 (their steps weigh it by
      r^2 besides); Rozet et al., 2024, "Learning Diffusion Priors from Observations by
      Expectation Maximization", https://arxiv.org/abs/2405.13712, equation 17.

    Example:
      >>> from jaxlab import diffusion
      >>> unit = diffusion.lift(lambda x, noise, cond: x / 2)  # of N(0, 1) at noise 1
      >>> half = pigdm(lambda x: x, deviation=1.0)(unit)
      >>> half(jnp.zeros((1, 2)), Noise(1, 1.0, 1.0), jnp.ones((1, 2))).round(3)
      Array([[0.333, 0.333]], dtype=float32)
    """
    if not deviation >= 0 or not variance > 0 or iterations < 1:
        raise ValueError(
            f"want deviation >= 0, variance > 0 and iterations >= 1, got {deviation}, "
            f"{variance} and {iterations}"
        )
    if covariance not in ("isotropic", "tweedie"):
        raise ValueError(
            f"covariance must be 'isotropic' or 'tweedie', got {covariance!r}"
        )

    def decorate(denoise: Any) -> Denoiser:
        inner = lift(denoise)

        def apply(x: Any, noise: Noise, cond: Any, state: Any) -> tuple[Any, Any]:
            predict = lambda v: inner.apply(v, noise, cond, state)
            x0, back, after = jax.vjp(predict, x, has_aux=True)
            dtype, reach = wide(x), score_to_x0(noise, x)
            y, seen = observed(cond), operator(x0)
            if jnp.shape(y) != seen.shape:
                raise ValueError(
                    f"observed is {jnp.shape(y)}, where the operator gives {seen.shape}"
                )
            transpose = jax.linear_transpose(operator, x0)
            spread = lambda v: transpose(v.astype(seen.dtype))[0]
            through = lambda v: back(spread(v).astype(x0.dtype))[0].astype(dtype)

            def system(v: Any) -> Any:
                if covariance == "isotropic":
                    moved = _shrunk(noise, variance, x) * spread(v).astype(dtype)
                else:
                    moved = reach * through(v)
                near = operator(moved.astype(x0.dtype)).astype(dtype)
                return near + deviation**2 * v

            left = y.astype(dtype) - seen.astype(dtype)
            moved = reach * through(_solve(system, left, iterations))
            return (x0.astype(dtype) + moved).astype(x.dtype), after

        return Denoiser(inner.init, apply)

    return decorate


def _shrunk(noise: Noise, variance: float, x: Any) -> Any:
    """What is left of the data's variance, r^2."""
    alpha, sigma = (jnp.asarray(v, wide(x)) ** 2 for v in (noise.alpha, noise.sigma))
    return along(sigma * variance / (sigma + alpha * variance), x)


def _solve(system: Callable[[Any], Any], right: Any, iterations: int) -> Any:
    """Conjugate gradients, of each sample alone, from 0."""

    def one(carry: Any, _: None) -> tuple[Any, None]:
        found, left, way, size = carry
        image = system(way)
        curve = dot(way, image)
        step = jnp.where(curve > 0, size / jnp.where(curve > 0, curve, 1), 0)
        found, left = found + step * way, left - step * image
        now = dot(left, left)
        way = left + jnp.where(size > 0, now / jnp.where(size > 0, size, 1), 0) * way
        return (found, left, way, now), None

    carry = jnp.zeros_like(right), right, right, dot(right, right)
    return jax.lax.scan(one, carry, None, length=iterations)[0][0]
