"""Products and whole blocks, for the kernels of matrix products."""

from jax import Array, lax
from jax.experimental import pallas as pl
import jax.numpy as jnp


def dot(x: Array, w: Array, flip: bool = False) -> Array:
    """`x @ w`, or `x @ w.T`, summed in float32."""
    sums = ((1,), (1 if flip else 0,)), ((), ())
    return lax.dot_general(x, w, sums, preferred_element_type=jnp.float32)


def padded(x: Array, *multiples: int) -> Array:
    """With zeros behind, up to a multiple of a size per axis."""
    short = [-n % k for n, k in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, [(0, s) for s in short]) if any(short) else x


def power(size: int, most: int) -> int:
    """A power of two from 16, that Triton multiplies, to `most`."""
    return min(most, max(16, pl.next_power_of_2(size)))
