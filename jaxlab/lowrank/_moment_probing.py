"""Moment Probing: Gao et al., 2023."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ._module import Module, linear, normalized, shifted

CONVOLUTION = ("NHWC", "HWIO", "NHWC")


def moment_probing(
    *, classes: int, dim: int = 512, heads: int = 4, depth: int = 2
) -> Module:
    r"""A head on the first and second moments of features, not on their mean alone.

    $\frac12 (C_1 \mu + C_2 \mathrm{vec}(\mathrm{MHC}^3(X)))$: tokens are projected to
    `dim`, split in h heads and normalised; each head and the next have the
    cross-covariance $\frac1s (H_i - \bar H_i)^\top (H_{i+1} - \bar H_{i+1})$, its
    columns of unit length; the h - 1 of them are the channels of `depth` 3 x 3
    convolutions of stride 2, with a GELU between.

    Args:
      classes: of the classifier.
      dim: of the projected tokens, a multiple of `heads`.
      heads: h, at least 2.
      depth: how many convolutions; with 0 the classifier sees all entries.

    Returns:
      `init(key, n)` for features of size n; `apply(params, tokens, first=None)` takes
      `tokens [..., s, n]` (no class token) and the first moment `[..., n]`, by default
      their mean, to logits `[..., classes]`.

    Raises:
      ValueError: fewer than two heads; heads that do not divide `dim`, or are too small
        for the convolutions.

    Degenerate inputs:
      Tokens that are all equal have a zero covariance up to the normalisation's ε.

    References:
      Gao et al., 2023, "Tuning Pre-trained Model via Moment Probing",
      https://arxiv.org/abs/2307.11342, equations 3 to 7. As in the authors' code, the
      mean that is taken off is that of all entries of a head.

    Example:
      >>> head = moment_probing(classes=3, dim=28)
      >>> params = head.init(jax.random.key(0), 5)
      >>> head.apply(params, jnp.ones((2, 6, 5))).shape
      (2, 3)
    """
    if heads < 2 or dim % heads:
        raise ValueError(f"heads must be at least 2 and divide dim {dim}, got {heads}")
    side = dim // heads
    for _ in range(depth):
        side = (side - 3) // 2 + 1
    if side < 1:
        raise ValueError(f"heads of {dim // heads} are too small for depth {depth}")
    size, channels = side * side * (heads - 1), heads - 1

    def init(key: Array, n: int) -> dict[str, Any]:
        keys = jax.random.split(key, 3 + depth)
        limit = 1 / math.sqrt(9 * channels)
        shape = (3, 3, channels, channels)
        draw = lambda k: jax.random.uniform(k, shape, minval=-limit, maxval=limit)
        return {
            "project": linear(keys[0], n, dim),
            "project_bias": jnp.zeros(dim),
            "norm_scale": jnp.ones(dim // heads),
            "norm_bias": jnp.zeros(dim // heads),
            "first": linear(keys[1], n, classes),
            "first_bias": jnp.zeros(classes),
            "second": linear(keys[2], size, classes),
            "second_bias": jnp.zeros(classes),
        } | {f"convolution_{i}": draw(k) for i, k in enumerate(keys[3:])}

    def apply(
        params: dict[str, Any], tokens: Array, first: Array | None = None
    ) -> Array:
        x = tokens.astype(params["project"].dtype)
        mean = x.mean(-2) if first is None else first.astype(x.dtype)
        x = shifted(x @ params["project"], params["project_bias"])
        x = x.reshape(*x.shape[:-1], heads, dim // heads)
        x = normalized(x, params["norm_scale"], params["norm_bias"], 1e-5)
        moments = _cross_covariances(x)
        front = moments.shape[:-3]
        moments = moments.reshape(-1, *moments.shape[-3:])
        for i in range(depth):
            moments = jax.nn.gelu(moments, approximate=False) if i else moments
            moments = jax.lax.conv_general_dilated(
                moments, params[f"convolution_{i}"], (2, 2), "VALID",
                dimension_numbers=CONVOLUTION,
            )  # fmt: skip
        moments = moments.reshape(*front, -1)
        second = shifted(moments @ params["second"], params["second_bias"])
        return (shifted(mean @ params["first"], params["first_bias"]) + second) / 2

    return Module(init, apply)


def psrp(*, rank: int = 16) -> Module:
    r"""Features recalibrated by a scale and a shift that share their first layer.

    $h \leftarrow (1 + r W_s) \odot h + r W_b$, $r = \mathrm{relu}(x W)$: x is the input
    of a block's feed-forward, before its norm, and h what it adds to the residual.

    Args:
      rank: r, of the shared layer, at least 1.

    Returns:
      `init(key, n)` gives `down [n, r]`, `scale [r, n]`, `shift [r, n]`;
      `apply(params, x, h)` gives `[..., n]`, in the dtype of h.

    Raises:
      ValueError: a rank below 1.

    Degenerate inputs:
      Fresh, both second layers are zero and h is unchanged.

    References:
      Gao et al., 2023, "Tuning Pre-trained Model via Moment Probing",
      https://arxiv.org/abs/2307.11342, section 3.3, PSRP; the authors' code draws the
      second layers too.

    Example:
      >>> params = psrp(rank=2).init(jax.random.key(0), 3)
      >>> psrp(rank=2).apply(params, jnp.ones(3), jnp.ones(3)).tolist()
      [1.0, 1.0, 1.0]
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")

    def init(key: Array, n: int) -> dict[str, Any]:
        zero = jnp.zeros((rank, n))
        return {"down": linear(key, n, rank), "scale": zero, "shift": zero}

    def apply(params: dict[str, Any], x: Array, h: Array) -> Array:
        r = jax.nn.relu(x.astype(params["down"].dtype) @ params["down"])
        wide = h.astype(r.dtype)
        return ((1 + r @ params["scale"]) * wide + r @ params["shift"]).astype(h.dtype)

    return Module(init, apply)


def _cross_covariances(x: Array) -> Array:
    """Those of neighbouring heads of `[..., s, h, d]`: `[..., d, d, h - 1]`."""
    x = x - x.mean((-3, -1), keepdims=True)
    one, two = x[..., :-1, :], x[..., 1:, :]
    moments = jnp.einsum("...shd,...she->...deh", one, two) / x.shape[-3]
    square = (moments * moments).sum(-3, keepdims=True)
    return moments / jnp.sqrt(jnp.maximum(square, 1e-24))
