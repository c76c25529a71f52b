"""Booleans as bits: 32 to a word, along the last axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, UInt

WORD = 32


def pack(x: Bool[Array, "... n"]) -> UInt[Array, "... words"]:
    """Entry i of the last axis becomes bit `i % 32` of word `i // 32`, others 0."""
    *lead, n = x.shape
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, -n % WORD)])
    bits = padded.reshape(*lead, -1, WORD).astype(jnp.uint32)
    return jnp.sum(bits << _places(bits.ndim), axis=-1, dtype=jnp.uint32)


def unpack(
    words: UInt[Array, "... words"], shape: tuple[int, ...]
) -> Bool[Array, "..."]:
    """The booleans of that shape, as `pack` took them."""
    bits = (words[..., None] >> _places(words.ndim + 1)) & jnp.uint32(1)
    n = shape[-1] if len(shape) >= words.ndim else 1
    flat = bits.reshape(*words.shape[:-1], -1)[..., :n]
    return (flat == 1).reshape(shape)


def words_like(x: Any) -> jax.ShapeDtypeStruct:
    """The words of a stacked leaf; a leaf of numbers has one for each model."""
    *lead, n = x.shape if len(x.shape) > 1 else (*x.shape, 1)
    return jax.ShapeDtypeStruct((*lead, -(-n // WORD)), jnp.uint32)


def planes(x: Bool[Array, "k ..."]) -> UInt[Array, "k ... words"]:
    """`pack` of a stacked leaf, of the shape that `words_like` says."""
    return pack(x[:, None] if x.ndim == 1 else x)


def count(words: UInt[Array, "..."]) -> Array:
    """How many bits are 1, in 64 bits."""
    ones = jax.lax.population_count(words).astype(jnp.int32)
    with jax.enable_x64(True):
        return jnp.sum(ones, dtype=jnp.int64)


def _places(ndim: int) -> UInt[Array, "... 32"]:
    """The place of each bit, to broadcast along the last of `ndim` axes."""
    return jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * (ndim - 1) + (WORD,))
