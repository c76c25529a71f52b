"""What stands beside a model: a part with parameters of its own."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from ._operands import like


class Module(NamedTuple):
    """A part beside the model: a head, a prompt, a layer between two of its own."""

    init: Callable[..., dict[str, Any]]
    """`(key, sizes...) -> params`, a dict of arrays."""
    apply: Callable[..., Any]
    """`(params, inputs...) -> output`."""


def linear(key: Array, n: int, m: int, dtype: Any = jnp.float32) -> Array:
    """A matrix `[n, m]`, uniform within one over the root of n."""
    limit = 1 / math.sqrt(n)
    return jax.random.uniform(key, (n, m), dtype, -limit, limit)


def shifted(z: Any, bias: Array | None) -> Any:
    """`z [..., r]` plus a bias `[r]`, in the dtype of z."""
    if bias is None:
        return z
    return z + like(bias, z).reshape((1,) * (z.ndim - 1) + bias.shape)


def normalized(z: Array, scale: Array, bias: Array, epsilon: float = 1e-6) -> Array:
    """Layer normalisation of the last axis."""
    centred = z - z.mean(-1, keepdims=True)
    variance = (centred * centred).mean(-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(variance + epsilon)
    return shifted(unit * scale.reshape((1,) * (z.ndim - 1) + scale.shape), bias)
