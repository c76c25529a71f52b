"""Guidance by two predictions, with the condition and without, from one call."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from ..types import Denoiser, Guidance, Noise
from ._checks import check_prediction
from ._predictions import Prediction, along, convert, lift
from ._tables import wide

Scale = float | Array | Callable[[Noise], Any]


class Guided(NamedTuple):
    """The state of a guided denoiser."""

    inner: Any
    """The denoiser's, of the doubled batch"""
    own: Any
    """The guidance's"""


def cfg(
    *, scale: Scale, null: Any, rescale: float = 0.0, space: Prediction = "x0"
) -> Guidance:
    r"""Classifier-free guidance: $D = D_c + (w - 1)(D_c - D_\varnothing)$.

    With a rescale $\phi$, $D \leftarrow \phi \frac{\mathrm{std}(D_c)}{\mathrm{std}(D)}
    D + (1 - \phi) D$.

    Args:
      scale: w: a number, one per sample `[b]`, or a function of the `Noise`; 1 is the
        conditional prediction, 0 the unconditional. May be traced.
      null: the condition of no condition, a tree like `cond`, each leaf of which
        broadcasts against cond's: `[1, ...]`, or `[b, ...]` for negative prompts.
      rescale: phi, in [0, 1]; the deviations are over each sample.
      space: what is combined; it matters to `rescale` alone, which the paper computes
        on what its network predicts ("v").

    Returns:
      A guidance of one call on `2 b` rows: sample j's are 2j, conditional, and 2j + 1,
      so that a sharded batch stays where it is.

    Raises:
      ValueError: a scale that is NaN; one of another length than the batch; a `null`
        whose tree, a leaf's shape or dtype does not fit cond's; no cond.

    Degenerate inputs:
      A combination without deviation is not rescaled.

    References:
      Ho and Salimans, 2022, "Classifier-Free Diffusion Guidance",
      https://arxiv.org/abs/2207.12598, equation 6 (whose w is ours less 1); Lin et al.,
      2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
      https://arxiv.org/abs/2305.08891, equations 15 and 16.

    Example:
      >>> told = lambda x, noise, cond: 0 * x + cond
      >>> denoise = cfg(scale=3.0, null=jnp.zeros(1))(lift(told))
      >>> denoise(jnp.zeros(2), Noise(0, 1, 1), jnp.ones(2))
      Array([3., 3.], dtype=float32)
    """
    check_scale("scale", scale)
    check_scale("rescale", rescale)

    def combine(c: Any, u: Any, x: Any, noise: Noise, own: Any) -> tuple[Any, Any]:
        value = c + (weight(scale, noise, x) - 1) * (c - u)
        if isinstance(rescale, jax.Array) or rescale:
            now = deviation(value)
            safe = jnp.where(now > 0, now, 1)
            ratio = jnp.where(now > 0, deviation(c) / safe, 1)
            phi = weight(rescale, noise, x)
            value = value * (phi * ratio + 1 - phi)
        return value, own

    return guided(combine, null=null, space=space)


def guided(
    combine: Callable[..., tuple[Any, Any]],
    *,
    null: Any,
    init: Callable[[Any], Any] = lambda _: (),
    space: Prediction = "x0",
) -> Guidance:
    """A guidance from how it combines two predictions of one sample.

    Args:
      combine: `(c, u, x, noise, own) -> (value, own)`: the conditional and the
        unconditional prediction, `[b, ...]` in float32 or wider, to the guided one.
      null: see `cfg`.
      init: `x -> own`, the guidance's own state.
      space: what `combine` is given and gives.

    Returns:
      A guidance.
    """

    def decorate(denoise: Any) -> Denoiser:
        inner = lift(denoise)

        def start(x: Any, cond: Any) -> Guided:
            return Guided(inner.init(twice(x), versus(cond, null)), init(x))

        def apply(x: Any, noise: Noise, cond: Any, state: Guided) -> Any:
            c, u, after = pair(inner, x, noise, cond, null, state.inner)
            given = x.astype(wide(x)), noise
            c, u = (convert(v, *given, source="x0", target=space) for v in (c, u))
            value, own = combine(c, u, *given, state.own)
            x0 = convert(value, *given, source=space, target="x0")
            return x0.astype(x.dtype), Guided(after, own)

        return Denoiser(start, apply)

    return decorate


def pair(
    inner: Denoiser, x: Any, noise: Noise, cond: Any, null: Any, state: Any
) -> tuple[Any, Any, Any]:
    """Predictions with the condition and without, of x0, and the state after."""
    levels = Noise(*(twice(v) if jnp.ndim(v) else v for v in noise))
    rows = twice(x)
    value, state = inner.apply(rows, levels, versus(cond, null), state)
    check_prediction(value, rows)
    value = jnp.reshape(value.astype(wide(x)), (len(x), 2, *x.shape[1:]))
    return value[:, 0], value[:, 1], state


def twice(v: Any) -> Any:
    """Every row, and again."""
    return jnp.repeat(v, 2, axis=0)


def versus(cond: Any, null: Any) -> Any:
    """Every row of a condition, each followed by its row of the null condition."""
    if not jax.tree.leaves(cond):
        raise ValueError("guidance against a null condition needs cond")
    if jax.tree.structure(cond) != jax.tree.structure(null):
        raise ValueError(
            f"null must be a tree like cond: {jax.tree.structure(null)} is not "
            f"{jax.tree.structure(cond)}"
        )

    def join(path: Any, c: Any, n: Any) -> Any:
        name = f"null{jax.tree_util.keystr(path)}"
        c = jnp.asarray(c)
        n = jnp.asarray(n) if hasattr(n, "dtype") else jnp.asarray(n, c.dtype)
        if n.dtype != c.dtype:
            raise ValueError(f"{name} is {n.dtype}, where cond is {c.dtype}")
        try:
            n = jnp.broadcast_to(n, c.shape)
        except ValueError as error:
            raise ValueError(
                f"{name} of shape {n.shape} does not broadcast to cond's {c.shape}"
            ) from error
        return jnp.reshape(jnp.stack([c, n], 1), (-1, *c.shape[1:]))

    return jax.tree_util.tree_map_with_path(join, cond, null)


def weight(scale: Scale, noise: Noise, x: Any) -> Any:
    """A scale at a noise level, ready to multiply samples."""
    value = jnp.asarray(scale(noise) if callable(scale) else scale, wide(x))
    if value.ndim and value.shape != x.shape[:1]:
        raise ValueError(f"a scale of shape {value.shape} for {len(x)} samples")
    return along(value, x)


def check_scale(name: str, scale: Scale) -> None:
    """No number may be NaN."""
    if callable(scale) or isinstance(scale, jax.Array):
        return
    if np.isnan(scale).any():
        raise ValueError(f"{name} must be a number, got {scale}")


def dot(a: Any, b: Any) -> Any:
    """Each sample's inner product, `[b, 1, ...]`."""
    return jnp.sum(a * b, range(1, a.ndim), keepdims=True)


def norm(v: Any) -> Any:
    """Each sample's norm, `[b, 1, ...]`."""
    return root(dot(v, v))


def deviation(v: Any) -> Any:
    """Each sample's standard deviation, `[b, 1, ...]`."""
    return root(jnp.var(v, range(1, v.ndim), keepdims=True))


def root(v: Any) -> Any:
    """The square root, with derivative 0 at 0."""
    return jnp.where(v > 0, jnp.sqrt(jnp.where(v > 0, v, 1)), 0)
