"""A matrix product and its low-rank update, in one pass over the input.

Unmeasured: no GPU or TPU was at hand. The kernel is called by nothing and is not the
default; it stays pending a measurement, and is dropped unless it beats XLA. Wanted: at
most 1.10 of the time of `x @ w` at rank 16, bfloat16, 4096 x 4096, 8192 rows.

The floor, of t rows, is 2 t n m + 2 t r (n + m) operations, 1.008 of `x @ w` there, and
t n + n m + t m + r (n + m) entries, 1.002 of it. XLA's three products read x twice and
read and write one [t, m] more: 1.83 of the entries, which at 990 TFLOP/s and 3.35 TB/s
(an H100) are 0.09 ms beside the 0.28 ms of the product. The kernel of Triton forms
`x @ a` once per block of columns: 1 + r / 128 of the operations of the product, r at
least 16. That of Mosaic forms it once, as 128 columns: 1 + 128 / m.
"""

import functools as ft
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._blocks import dot, padded, power
from ._dispatch import Use, check_float, dispatch

_GPU_ROWS, _GPU_COLUMNS, _GPU_DEPTH = 128, 128, 32
_TPU_ROWS, _TPU_COLUMNS, _TPU_DEPTH = 256, 512, 512


def lowrank_matmul(
    x: Float[Array, "t n"],
    w: Float[Array, "n m"],
    a: Float[Array, "n r"],
    b: Float[Array, "r m"],
    *,
    scale: float = 1.0,
    use: Use = "reference",
) -> Float[Array, "t m"]:
    r"""$x W + s (x A) B$, fused.

    Sums in float32; `x A` is rounded to the dtype of x once. Reverse mode works for all
    four: the slope of x, $g W^\top + s (g B^\top) A^\top$, by the same kernel, those of
    A and B as products of r columns, that of W where it is asked for. Sides that no
    block divides are padded with zeros, which copies; on TPU, float16 takes the
    reference. Pallas does not partition a kernel: call it inside `jax.shard_map`.

    Args:
      x: the input, in float32, bfloat16 or float16.
      w: the weight, in the dtype of x.
      a: A, the factor of r columns, in the dtype of x.
      b: B, the factor of r rows, in the dtype of x.
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
      Hu et al., 2021, "LoRA", https://arxiv.org/abs/2106.09685, equation 3.

    Example:
      >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
      >>> lowrank_matmul(x, w, jnp.ones((3, 1)), jnp.ones((1, 4)), scale=2.0)[0]
      Array([9., 9., 9., 9.], dtype=float32)
    """
    _check(x, w, a, b)
    if use == "reference" or 0 in (*x.shape, *w.shape, a.shape[1]):
        return _reference(scale, False, x, w, a, b)
    return _fused(scale, use, x, w, a, b)


def _check(x: Array, w: Array, a: Array, b: Array) -> None:
    """Raises unless all is as the docstring says."""
    if any(v.ndim != 2 for v in (x, w, a, b)):
        raise ValueError("x, w, a and b must be matrices")
    (n, m), r, shapes = w.shape, a.shape[1], [v.shape for v in (x, w, a, b)]
    if shapes[2:] != [(n, r), (r, m)] or x.shape[1] != n:
        raise ValueError(f"x, w, a and b do not fit: {shapes}")
    for name, v in (("x", x), ("w", w), ("a", a), ("b", b)):
        check_float(name, v)
        if v.dtype != x.dtype:
            raise ValueError(f"{name} is {v.dtype.name}, but x is {x.dtype.name}")


def _reference(
    scale: float, flip: bool, x: Array, w: Array, first: Array, last: Array
) -> Array:
    """What the kernels compute, in plain JAX; `flip`: by the transposed matrices."""
    update = dot(dot(x, first, flip).astype(x.dtype), last, flip)
    return (dot(x, w, flip) + scale * update).astype(x.dtype)


def _dispatched(scale: float, use: Use, flip: bool, *args: Array) -> Array:
    reference, gpu, tpu = (ft.partial(f, scale, flip) for f in (_reference, _gpu, _tpu))
    return dispatch(use, *args, reference=reference, gpu=gpu, tpu=tpu)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(scale: float, use: Use, *args: Array) -> Array:
    return _dispatched(scale, use, False, *args)


def _forward(scale: float, use: Use, *args: Array) -> tuple[Array, Any]:
    """The residuals are the inputs: nothing else is written."""
    return _fused(scale, use, *args), args


def _backward(scale: float, use: Use, saved: Any, g: Array) -> tuple[Array, ...]:
    """The slope of x by the kernel; the small side of each product is transposed."""
    x, w, a, b = saved
    low, up = dot(x, a).astype(x.dtype), dot(g, b, flip=True).astype(x.dtype)
    return (
        _dispatched(scale, use, True, g, w, b, a),
        dot(x.T, g).astype(w.dtype),
        (scale * dot(up.T, x)).T.astype(a.dtype),
        (scale * dot(low.T, g)).astype(b.dtype),
    )


_fused.defvjp(_forward, _backward)


def _turned(flip: bool, *pair: Any) -> tuple[Any, ...]:
    """Sizes or places of a matrix, of its transpose with `flip`."""
    return pair[::-1] if flip else pair


def _gpu(scale: float, flip: bool, *args: Array, interpret: Any = False) -> Array:
    """One Triton program per block of rows and columns, in steps along n."""
    from jax.experimental.pallas import triton

    x, w, first, last = args
    back = ft.partial(_turned, flip)
    (t, n), (_, m), (_, r) = x.shape, back(*w.shape), back(*first.shape)
    rows, columns = power(t, _GPU_ROWS), power(m, _GPU_COLUMNS)
    depth, rank = power(n, _GPU_DEPTH), max(16, pl.next_power_of_2(r))
    x, w = padded(x, rows, depth), padded(w, *back(depth, columns))
    first, last = padded(first, *back(depth, rank)), padded(last, *back(rank, columns))
    wide, out = x.shape[1], (x.shape[0], back(*w.shape)[1])

    def kernel(x_ref: Any, w_ref: Any, first_ref: Any, last_ref: Any, o: Any) -> None:
        def step(c: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            at = pl.ds(c * depth, depth)
            mine = triton.load(x_ref.at[:, at])
            cut = lambda ref: triton.load(ref.at[back(at, slice(None))])
            pair = dot(mine, cut(w_ref), flip), dot(mine, cut(first_ref), flip)
            return sums[0] + pair[0], sums[1] + pair[1]

        start = [jnp.zeros((rows, k), jnp.float32) for k in (columns, rank)]
        y, low = lax.fori_loop(0, wide // depth, step, tuple(start))
        update = dot(low.astype(x.dtype), last_ref[...], flip)
        o[...] = (y + scale * update).astype(x.dtype)

    spec = lambda sizes, place: pl.BlockSpec(
        back(*sizes), lambda _, j: back(0, place * j)
    )
    return pl.pallas_call(
        kernel,
        grid=(out[0] // rows, out[1] // columns),
        in_specs=[
            pl.BlockSpec((rows, wide), lambda i, _: (i, 0)),
            spec((wide, columns), 1),
            spec((wide, rank), 0),
            spec((rank, columns), 1),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct(out, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="lowrank_matmul",
    )(x, w, first, last)[:t, :m]


def _tpu(scale: float, flip: bool, *args: Array, interpret: Any = False) -> Array:
    """One grid step per block of rows, columns and n; `x @ a` at the first columns."""
    from jax.experimental.pallas import tpu

    x, w, first, last = args
    if x.dtype == jnp.float16:  # Mosaic loads none
        return _reference(scale, flip, *args)
    back = ft.partial(_turned, flip)
    (t, n), (_, m), (_, r) = x.shape, back(*w.shape), back(*first.shape)
    rows, columns, depth = min(_TPU_ROWS, t), min(_TPU_COLUMNS, m), min(_TPU_DEPTH, n)
    x, w = padded(x, rows, depth), padded(w, *back(depth, columns))
    first, last = padded(first, *back(depth, r)), padded(last, *back(r, columns))
    out = x.shape[0], back(*w.shape)[1]
    return pl.pallas_call(
        ft.partial(_tpu_step, scale, flip),
        grid=(out[0] // rows, out[1] // columns, x.shape[1] // depth),
        in_specs=[
            pl.BlockSpec((rows, depth), lambda i, _, c: (i, c)),
            pl.BlockSpec(back(depth, columns), lambda _, j, c: back(c, j)),
            pl.BlockSpec(back(depth, r), lambda _i, _j, c: back(c, 0)),
            pl.BlockSpec(back(r, columns), lambda _, j, _c: back(0, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, _: (i, j)),
        out_shape=jax.ShapeDtypeStruct(out, x.dtype),
        scratch_shapes=[tpu.VMEM((rows, k), jnp.float32) for k in (columns, r)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="lowrank_matmul",
    )(x, w, first, last)[:t, :m]


def _tpu_step(scale: float, flip: bool, *refs: Any) -> None:
    """Adds one step along n to the sums of a block; the last writes them."""
    x, w, first, last, out, y, low = refs
    j, c = pl.program_id(1), pl.program_id(2)

    def add(total: Any, ref: Any, when: Any) -> None:
        @pl.when(when & (c == 0))
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        @pl.when(when)
        def _() -> None:
            total[...] += dot(x[...], ref[...], flip)

    add(y, w, j >= 0)
    add(low, first, j == 0)

    @pl.when(c == pl.num_programs(2) - 1)
    def _() -> None:
        update = dot(low[...].astype(x.dtype), last[...], flip)
        out[...] = (y[...] + scale * update).astype(x.dtype)
