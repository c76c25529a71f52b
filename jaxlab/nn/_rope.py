"""Rotary position embeddings (Su et al., 2021), scaled as configs say."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from ._config import Config, refused

_LLAMA3 = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def frequencies(config: Config, fields: dict[str, Any], d: int) -> np.ndarray:
    """The angle per position of each of the d/2 planes, in float64.

    `rope_scaling` of older configs, `rope_parameters` of newer ones; the types
    "default", "linear" and "llama3".
    """
    name = "rope_parameters" if fields["rope_parameters"] else "rope_scaling"
    said = dict(fields[name] or {})
    theta = said.pop("rope_theta", fields["rope_theta"])
    kind = said.pop("rope_type", None) or said.pop("type", None) or "default"
    said.pop("type", None)
    due = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}.get(kind)
    if due is None or said.keys() != set(due) or d % 2:
        raise refused(config, name) if d % 2 == 0 else refused(config, "head_dim")
    angles = float(theta) ** (-np.arange(0, d, 2, dtype=np.float64) / d)
    if kind == "linear":
        return angles / said["factor"]
    if kind == "llama3":
        factor, low, high, length = (float(said[n]) for n in _LLAMA3)
        turns = length * angles / (2 * np.pi)
        fast = np.clip((turns - low) / (high - low), 0, 1)
        return fast * angles + (1 - fast) * angles / factor
    return angles


def tables(angles: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The cosines and sines of every position and plane, in float64."""
    at = np.arange(length)[:, None] * angles
    return np.cos(at), np.sin(at)


def rotate(
    x: Float[Array, "b s *h d"], cos: np.ndarray, sin: np.ndarray
) -> Float[Array, "b s *h d"]:
    """Turns plane i, which coordinates i and i + d/2 span, by its position's angle."""
    shape = (1, cos.shape[0], *(1 for _ in x.shape[2:-1]), cos.shape[1])
    c, s = (np.asarray(t, x.dtype).reshape(shape) for t in (cos, sin))
    one, two = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([one * c - two * s, two * c + one * s], -1)
