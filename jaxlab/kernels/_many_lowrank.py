"""A matrix product in which every row has its own low-rank update.

Unmeasured: no GPU or TPU was at hand. The kernel is called by nothing and is not the
default; it stays pending a measurement, and is dropped unless it beats XLA. Wanted: at
most 1.25 of the time of `x @ w` at rank 16, bfloat16, 4096 x 4096, 8192 rows.

The floor, of t rows and j adapters among them, is 2 t n m + 2 t r (n + m) operations
and t n + n m + t m + j r (n + m) entries. Rows are sorted by adapter; a block of them
multiplies by each adapter in it, at most j - 1 times more than once each. `x @ w` is
XLA's: the update is one more array, 2 t m entries, 0.04 ms beside the 0.28 ms of the
product there (at 990 TFLOP/s and 3.35 TB/s, an H100), and the sorting 2 t (n + m) more.
"""

import functools as ft
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._blocks import dot
from ._dispatch import Use, check_float, dispatch
from ._grouped_matmul import by_gpu, by_tpu, grouped


def many_lowrank_matmul(
    x: Float[Array, "t n"],
    w: Float[Array, "n m"],
    a: Float[Array, "k n r"],
    b: Float[Array, "k r m"],
    ids: Int[Array, " t"],
    *,
    scale: float = 1.0,
    use: Use = "reference",
) -> Float[Array, "t m"]:
    r"""$y_i = x_i W + s (x_i A_{j_i}) B_{j_i}$: row i by adapter $j_i$ of k.

    Sums in float32; `x A` is rounded to the dtype of x once. Reverse mode works for x,
    w, a and b, the slope of x by the same kernel. Sides that no block divides are
    padded with zeros, which copies; on TPU, float16 takes the reference. Pallas does
    not partition a kernel: call it inside `jax.shard_map`.

    Args:
      x: the input, in float32, bfloat16 or float16.
      w: the weight, in the dtype of x.
      a: the factors of r columns, in the dtype of x.
      b: the factors of r rows, in the dtype of x.
      ids: j, integers from 0 to k - 1 in any order; beyond, the nearest.
      scale: s.
      use: "reference" plain JAX, which any transform sees through; "auto" the kernel
        on NVIDIA GPU and TPU and the reference elsewhere; "pallas" always the kernel,
        interpreted (slowly) where there is neither.

    Returns:
      `[t, m]` in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, other dtypes, an unknown `use`.

    Degenerate inputs:
      No rows, no columns or r = 0: the reference.

    References:
      Chen et al., 2023, "Punica: Multi-Tenant LoRA Serving",
      https://arxiv.org/abs/2310.18547, section 4 (there without sorting).

    Example:
      >>> x, w, a = jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((5, 3, 1))
      >>> b = jnp.broadcast_to(jnp.arange(5.0)[:, None, None], (5, 1, 4))
      >>> many_lowrank_matmul(x, w, a, b, jnp.array([4, 0]))[:, 0]
      Array([15.,  3.], dtype=float32)
    """
    _check(x, w, a, b, ids)
    update: Any
    if use == "reference" or 0 in (*x.shape, *w.shape, a.shape[2]):
        update = _twice(grouped, x, a, b, ids)
    else:
        update = _update(use, x, a, b, ids)
    return (dot(x, w) + scale * update.astype(jnp.float32)).astype(x.dtype)


def _check(x: Array, w: Array, a: Array, b: Array, ids: Array) -> None:
    """Raises unless all is as the docstring says."""
    shapes = [v.shape for v in (x, w, a, b, ids)]
    if [len(s) for s in shapes] != [2, 2, 3, 3, 1]:
        raise ValueError(f"x, w, a, b and ids have shapes {shapes}")
    (t, n), m, (k, _, r) = x.shape, w.shape[1], a.shape
    if shapes[1:] != [(n, m), (k, n, r), (k, r, m), (t,)] or not k:
        raise ValueError(f"x, w, a, b and ids do not fit: {shapes}")
    for name, v in (("x", x), ("w", w), ("a", a), ("b", b)):
        check_float(name, v)
        if v.dtype != x.dtype:
            raise ValueError(f"{name} is {v.dtype.name}, but x is {x.dtype.name}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"ids must be integers, got {ids.dtype.name}")


def _sorted_ids(ids: Array, count: int) -> tuple[Array, Array]:
    """The order that sorts the rows by adapter, and the adapters in it."""
    ids = jnp.clip(ids, 0, count - 1).astype(jnp.int32)
    order = jnp.argsort(ids)
    return order, ids[order]


def _twice(product: Any, x: Array, a: Array, b: Array, ids: Array) -> Array:
    """`(x a) b` by two grouped products of sorted rows."""
    order, ids = _sorted_ids(ids, len(a))
    out = product(product(x[order], a, ids), b, ids)
    return jnp.zeros_like(out).at[order].set(out, unique_indices=True)


def _dispatched(use: Use, *args: Array) -> Array:
    def run(product: Any) -> Any:
        return lambda *args, **how: _twice(ft.partial(product, **how), *args)

    gpu, tpu = run(by_gpu), run(by_tpu)
    return dispatch(use, *args, reference=run(grouped), gpu=gpu, tpu=tpu)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _update(use: Use, *args: Array) -> Array:
    """The dispatched update alone."""
    return _dispatched(use, *args)


def _forward(use: Use, *args: Array) -> tuple[Array, Any]:
    return _update(use, *args), args


def _backward(use: Use, saved: Any, g: Array) -> tuple[Array | None, ...]:
    """The slope of x by the kernel, those of the factors by XLA's ragged products."""
    x, a, b, ids = saved
    order, ranked = _sorted_ids(ids, len(a))
    sizes = jnp.bincount(ranked, length=len(a)).astype(jnp.int32)
    rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    summed = lambda x, y: lax.ragged_dot_general(
        x, y, sizes, rows, preferred_element_type=jnp.float32
    )
    xs, gs = x[order], g[order]
    da = summed(xs, grouped(gs, b.mT, ranked)).astype(a.dtype)
    db = summed(grouped(xs, a, ranked), gs).astype(b.dtype)
    return _dispatched(use, g, b.mT, a.mT, ids), da, db, None


_update.defvjp(_forward, _backward)
