"""Products by the chosen ones of many matrices, without copies of them."""

import functools as ft
from typing import Any

import jax
from jax import Array, lax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp


@custom_vmap
def picked(x: Array, stack: Array, i: Array) -> Array:
    """`x [t, n] @ stack[i]` of `stack [k, n, m]`, in the dtype of x."""
    return x @ _one(stack, i, x)


@picked.def_vmap
def _batched(
    size: int, batched: Any, x: Array, stack: Array, i: Array
) -> tuple[Array, bool]:
    assert not batched[1], "the matrices are of the whole batch"
    x = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
    i = i if batched[2] else jnp.broadcast_to(i, (size,))
    return _picked(x, stack, i), True


@jax.custom_vjp
def _picked(x: Array, stack: Array, index: Array) -> Array:
    """`x[b] @ stack[index[b]]` for every b."""
    return _by_place(_looped, _gathered, x, stack, index)


def _forward(x: Array, stack: Array, index: Array) -> tuple[Array, Any]:
    return _picked(x, stack, index), (x, stack, index)


def _backward(saved: Any, g: Array) -> tuple[Array, Array, None]:
    """Sums per matrix; a scan's own transpose adds k whole matrices for each b."""
    x, stack, index = saved
    flip = ft.partial(_looped, flip=True), ft.partial(_gathered, flip=True)
    dx = _by_place(*flip, g, stack, index)
    total = _by_place(_summed, _scattered, x, g, stack, index)
    return dx, total, None


_picked.defvjp(_forward, _backward)


def _by_place(loop: Any, gather: Any, *args: Array) -> Array:
    """A loop on a CPU, whose caches it stays in; one batched product elsewhere."""
    return lax.platform_dependent(*args, cpu=loop, default=gather)


def _one(stack: Array, i: Array, x: Array) -> Array:
    return lax.dynamic_index_in_dim(stack, i, 0, False).astype(x.dtype)


def _looped(x: Array, stack: Array, index: Array, flip: bool = False) -> Array:
    """One b after the other: reads each matrix once, and writes only the result.

    All rows are one array, which the layer's own product has too.
    """
    size, rows = x.shape[:2]
    flat = x.reshape(size * rows, -1)

    def step(_: None, one: tuple[Array, Array]) -> tuple[None, Array]:
        w = _one(stack, one[1], x)
        mine = lax.dynamic_slice_in_dim(flat, one[0], rows)
        return None, mine @ (w.mT if flip else w)

    starts = rows * jnp.arange(size, dtype=jnp.int32)
    return lax.scan(step, None, (starts, index))[1]


def _gathered(x: Array, stack: Array, index: Array, flip: bool = False) -> Array:
    w = jnp.take(stack, index, axis=0, mode="clip").astype(x.dtype)
    return x @ (w.mT if flip else w)


def _summed(x: Array, g: Array, stack: Array, index: Array) -> Array:
    """The slope of the matrices, each updated in place."""

    def step(total: Array, one: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, g, i = one
        slope = (x.mT @ g).astype(total.dtype)
        old = lax.dynamic_index_in_dim(total, i, 0, False)
        return lax.dynamic_update_index_in_dim(total, old + slope, i, 0), None

    return lax.scan(step, jnp.zeros_like(stack), (x, g, index))[0]


def _scattered(x: Array, g: Array, stack: Array, index: Array) -> Array:
    slopes = (x.mT @ g).astype(stack.dtype)
    return jnp.zeros_like(stack).at[jnp.clip(index, 0, len(stack) - 1)].add(slopes)
