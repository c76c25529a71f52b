"""What adapters that take an input apart share."""

from typing import Any

from jax import Array

from ._operands import Input
from ._rank import wide


def direct(x: Any) -> bool:
    """Whether the rows of an input are at hand: no patches, no one-hot rows to form."""
    return not isinstance(x, Input) or x.op.use.primitive == "dot_general"


def scaled(y: Array, v: Array) -> Array:
    """`y [..., m]` times `v [m]`, multiplied wide, in the dtype of `y`."""
    dtype = wide(y, v)
    v = v.astype(dtype).reshape((1,) * (y.ndim - 1) + v.shape)
    return (y.astype(dtype) * v).astype(y.dtype)


def parts(x: Array, count: int) -> Array:
    """`[..., n]` as `[..., count, n / count]`."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def check_divides(size: int, w: Array, what: str) -> None:
    """Raises unless both sides of a weight are multiples of `size`."""
    if size < 1 or any(side % size for side in w.shape):
        n, m = w.shape
        raise ValueError(f"{what} {size} does not divide a weight [{n}, {m}]")
