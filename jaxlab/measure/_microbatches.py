"""Data a few examples at a time, so that memory stays bounded."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..types import Params


def microbatches(
    step: Callable[..., Any], total: Params, args: Any, b: int, size: int | None
) -> Params:
    """Folds microbatches, each of every (b // size)-th example.

    An axis that is sharded over devices stays so.
    """
    if size is not None and size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    size = min(b, size or b)
    times = b // size if size else 0
    if times > 1:
        split = lambda v: v[: times * size].reshape(size, times, *v.shape[1:])
        turn = lambda v: jnp.swapaxes(split(v), 0, 1)
        total, _ = jax.lax.scan(step, total, jax.tree.map(turn, args))
        args = jax.tree.map(lambda v: v[times * size :], args)
    if times == 1 or (size and b % size):
        total, _ = step(total, args)
    return total


def length(args: Any) -> int:
    """b, the length that axis 0 of all arguments shares."""
    shapes = {v.shape[:1] for v in map(jnp.asarray, jax.tree.leaves(args))}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            f"inputs and labels must share the length of axis 0, got {sorted(shapes)}"
        )
    return shapes.pop()[0]
