"""What low-rank adapters share: ranks, scales, and the dtype of their state."""

import math
from typing import Any

from jax import Array
import jax.numpy as jnp


def check_least(name: str, value: int) -> None:
    """Raises unless an option is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_rank(rank: int, w: Array | None = None) -> None:
    """Raises unless 1 <= rank, and rank <= min(n, m) where the weight is given."""
    check_least("rank", rank)
    if w is not None and rank > min(w.shape):
        n, m = w.shape
        raise ValueError(f"rank {rank} is above min(n, m) of a weight [{n}, {m}]")


def scaling(rank: int, alpha: float | None, *, rslora: bool = False) -> float:
    """The scale of an update: alpha / r, or alpha / sqrt(r); 1 without alpha."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)


def wide(*arrays: Array) -> Any:
    """The widest dtype of the arrays, float32 or wider: that of states and sums."""
    dtypes = [x.dtype for x in arrays if jnp.finfo(x.dtype).bits >= 32]
    return max(dtypes, key=lambda d: jnp.finfo(d).bits, default=jnp.float32)


def plus(w: Array, update: Array) -> Array:
    """A weight or an output and its update, summed wide, in the dtype of `w`."""
    dtype = wide(w, update)
    return (w.astype(dtype) + update.astype(dtype)).astype(w.dtype)
