"""The exact k-th largest magnitude of each row, by a radix histogram.

Unmeasured: no GPU or TPU was at hand. The kernels stay pending a measurement with
`experiments/bench/kernels.py`; one that is not 1.15 times as fast as XLA is dropped.

Neither Mosaic nor Triton in Pallas has a histogram or a scatter in registers: counting
is compare-and-add, and its cost grows with the bins. A digit of 4 bits, 16 bins of one
byte in 4 words, costs about 19 integer operations per entry and pass; one of 8 bits
would halve the passes at 200 operations, which by count take 7 (TPU v5e) to 14 (H200)
times as long as reading a float32. Bytes read: 8 x 4 n of float32, 4 x 2 n of 16 bits;
the reference, a bisection, reads 31 x 4 n and 15 x 2 n.
"""

from collections.abc import Callable
import functools as ft
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ._dispatch import Use, check_float, dispatch

_DIGIT, _BINS = 4, 16
# A byte counts to 255: no lane may take more steps than that in one chunk.
_GPU_LANES, _GPU_STEPS, _GPU_WARPS = 1024, 64, 4
_TPU_TILE, _TPU_STEPS = 32, 128


def kth_magnitude(
    x: Float[Array, "m n"], k: ArrayLike, *, use: Use = "auto"
) -> Float[Array, " m"]:
    r"""The exact k-th largest $|x|$ of each row, without a sort.

    A nonnegative float orders as its bit pattern does. Each pass counts, among the
    entries whose leading bits are those found so far, the 16 values of the next 4 bits,
    and the rank chooses one: 8 passes over float32, 4 over 16-bit floats.

    Counts are int32 within a chunk of at most $2^{19}$ entries and int64 across chunks:
    exact beyond $2^{31}$. A row that long takes the reference, for its 64-bit indices
    (the kernel's are 32-bit). On TPU the kernel reads `[m, n/128, 128]`: 2
    more passes unless m is 1, and 2 more unless n is a multiple of 4096. Pallas does
    not partition a kernel: call it inside `jax.shard_map`, or take the reference.

    Args:
      x: rows of float32, bfloat16 or float16.
      k: the rank, 1 for the maximum; a scalar or one per row. May be traced.
      use: "auto" takes the kernel on NVIDIA GPU and TPU and the reference elsewhere;
        "reference" always the reference; "pallas" always the kernel, interpreted
        (slowly) where there is neither.

    Returns:
      `[m]` values $v$ with $|\{|x| > v\}| < k \le |\{|x| \ge v\}|$, in float32. Their
      gradient is that of a constant.

    Raises:
      ValueError: `x` is not two-dimensional or of another type; an unknown `use`.

    Degenerate inputs:
      As `jaxlab.tree.kth_largest`: `|x| >= v` selects every entry equal to the k-th; a
      rank of 0 gives infinity, one beyond n gives 0; NaN ranks above infinity.

    References:
      Alabi, Blanchard, Gordon and Steinbach, 2012, "Fast k-selection algorithms for
      graphics processing units" (radix selection; here with 16 bins, without scatter).

    Example:
      >>> x = jnp.array([[3.0, -5.0, 1.0]])
      >>> kth_magnitude(x, 2)
      Array([3.], dtype=float32)
    """
    if x.ndim != 2:
        raise ValueError(f"x must be [m, n], got shape {x.shape}")
    check_float("x", x)
    if use == "auto" and not 0 < x.shape[1] < 2**31:
        use = "reference"
    with jax.enable_x64(True):
        rank = jnp.broadcast_to(jnp.asarray(k, jnp.int64), x.shape[:1])
    x = lax.stop_gradient(x)
    key = dispatch(use, x, rank, reference=_reference, gpu=_gpu, tpu=_tpu)
    value = lax.bitcast_convert_type(key.astype(_word(x)), x.dtype)
    with jax.enable_x64(True):
        return jnp.where(rank > 0, value.astype(jnp.float32), jnp.float32(jnp.inf))


def _reference(x: Float[Array, "m n"], rank: Int[Array, " m"]) -> Int[Array, " m"]:
    """The key of that rank, by bisection of its bits: XLA's best on CPU."""
    width = 8 * x.dtype.itemsize
    bits = lax.bitcast_convert_type(x, _word(x))
    keys = bits & jnp.array(2 ** (width - 1) - 1, bits.dtype)

    def one(i: Array, low: Array) -> Array:
        level = low | (jnp.array(1 << (width - 2), bits.dtype) >> i.astype(bits.dtype))
        hit = keys >= level[:, None]
        with jax.enable_x64(True):
            exact = jnp.int32 if x.shape[1] < 2**31 else jnp.int64
            enough = jnp.sum(hit, axis=1, dtype=exact).astype(jnp.int64) >= rank
        return jnp.where(enough, level, low)

    start = jnp.zeros_like(bits, shape=x.shape[:1])
    return lax.fori_loop(0, width - 1, one, start).astype(jnp.int32)


def _gpu(x: Array, rank: Array, *, interpret: Any = False) -> Int[Array, " m"]:
    """The key of that rank, with Triton's histogram."""
    return _select(x, rank, ft.partial(_histogram_gpu, interpret))


def _tpu(x: Array, rank: Array, *, interpret: Any = False) -> Int[Array, " m"]:
    """The key of that rank, with Mosaic's histogram."""
    m, n = x.shape
    if x.dtype == jnp.float16:  # Mosaic loads no float16
        x = lax.bitcast_convert_type(x, jnp.int16)
    # Zeros added at the bottom change no rank within n, and 0 is the answer beyond.
    whole = jnp.pad(x, ((0, 0), (0, -n % (128 * _TPU_TILE))))
    return _select(
        whole.reshape(m, -1, 128), rank, ft.partial(_histogram_tpu, interpret)
    )


def _select(x: Array, rank: Array, histogram: Callable[..., Array]) -> Int[Array, " m"]:
    """Fixes the key of that rank digit by digit, the highest first."""
    width = 8 * x.dtype.itemsize

    def one(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        prefix, left = state
        shift = (width - _DIGIT - _DIGIT * i).astype(jnp.int32)
        counts = histogram(x, prefix << _DIGIT, shift[None])
        return _descend(counts, prefix, left)

    start = jnp.zeros(x.shape[:1], jnp.int32), rank
    return lax.fori_loop(0, width // _DIGIT, one, start)[0]


def _descend(
    counts: Int[Array, "m c 16"], prefix: Int[Array, " m"], rank: Int[Array, " m"]
) -> tuple[Int[Array, " m"], Int[Array, " m"]]:
    """Appends the digit that holds the rank; what is left of the rank inside it."""
    with jax.enable_x64(True):
        each = jnp.sum(counts, axis=1, dtype=jnp.int64)
        upto = jnp.cumsum(each[:, ::-1], axis=1)[:, ::-1]
        hits = jnp.sum(upto >= rank[:, None], axis=1, dtype=jnp.int32)
        digit = jnp.maximum(hits - jnp.int32(1), jnp.int32(0))
        above = jnp.take_along_axis(upto - each, digit[:, None], axis=1)[:, 0]
        return (prefix << jnp.int32(_DIGIT)) | digit, rank - above


def _histogram_gpu(
    interpret: Any, x: Array, base: Int[Array, " m"], shift: Int[Array, " 1"]
) -> Int[Array, "m c 16"]:
    """Counts the next digit of each chunk: one program per chunk of 64 x 1024."""
    from jax.experimental.pallas import triton

    m, n = x.shape
    chunk = _GPU_LANES * _GPU_STEPS
    chunks = pl.cdiv(n, chunk)

    def kernel(base_ref: Any, shift_ref: Any, x_ref: Any, o_ref: Any) -> None:
        size = jnp.minimum(chunk, n - pl.program_id(1) * chunk)
        low, shift = base_ref[0], shift_ref[0]

        def step(i: Array, acc: tuple[Array, ...]) -> tuple[Array, ...]:
            at = pl.ds(i * _GPU_LANES, _GPU_LANES)
            mask = jnp.arange(_GPU_LANES, dtype=jnp.int32) < size - i * _GPU_LANES
            key = _key(triton.load(x_ref.at[at], mask=mask, other=0.0))
            return _tally(acc, (key >> shift) - low)

        steps = lax.div(size + (_GPU_LANES - 1), _GPU_LANES)
        acc = lax.fori_loop(0, steps, step, (jnp.zeros(_GPU_LANES, jnp.int32),) * 4)
        for j, lanes in enumerate(_unpack(acc)):
            o_ref[0, 0, j] = jnp.sum(lanes)

    return pl.pallas_call(
        kernel,
        grid=(m, chunks),
        in_specs=[
            pl.BlockSpec((1,), lambda r, _: (r,)),
            pl.BlockSpec((1,), lambda *_: (0,)),
            pl.BlockSpec((None, chunk), lambda r, c: (r, c)),
        ],
        out_specs=pl.BlockSpec((1, 1, _BINS), lambda r, c: (r, c, 0)),
        out_shape=jax.ShapeDtypeStruct((m, chunks, _BINS), jnp.int32),
        compiler_params=triton.CompilerParams(num_warps=_GPU_WARPS, num_stages=1),
        interpret=interpret,
        name="kth_magnitude_histogram",
    )(base, shift, x)


def _histogram_tpu(
    interpret: Any, x: Array, base: Int[Array, " m"], shift: Int[Array, " 1"]
) -> Int[Array, "m c 16"]:
    """Counts the next digit of each chunk: one grid step per chunk of 4096 x 128."""
    from jax.experimental.pallas import tpu

    m, rows, lanes = x.shape
    block = min(rows, _TPU_TILE * _TPU_STEPS)
    chunks = pl.cdiv(rows, block)

    def kernel(base_ref: Any, shift_ref: Any, x_ref: Any, o_ref: Any) -> None:
        size = jnp.minimum(block, rows - pl.program_id(1) * block)
        low, shift = base_ref[pl.program_id(0)], shift_ref[0]

        def step(i: Array, acc: tuple[Array, ...]) -> tuple[Array, ...]:
            at = pl.ds(pl.multiple_of(i * _TPU_TILE, _TPU_TILE), _TPU_TILE)
            return _tally(acc, (_key(x_ref[0, at, :]) >> shift) - low)

        start = (jnp.zeros((_TPU_TILE, lanes), jnp.int32),) * 4
        acc = lax.fori_loop(0, lax.div(size, _TPU_TILE), step, start)
        for j, tile in enumerate(_unpack(acc)):
            o_ref[0, 0, j, :] = jnp.sum(tile, axis=0)

    smem = pl.BlockSpec(memory_space=tpu.SMEM)
    counts = pl.pallas_call(
        kernel,
        grid=(m, chunks),
        in_specs=[smem, smem, pl.BlockSpec((1, block, lanes), lambda r, c: (r, c, 0))],
        out_specs=pl.BlockSpec((1, 1, _BINS, lanes), lambda r, c: (r, c, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((m, chunks, _BINS, lanes), jnp.int32),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        interpret=interpret,
        name="kth_magnitude_histogram",
    )(base, shift, x)
    return jnp.sum(counts, axis=-1, dtype=jnp.int32)


def _word(x: Array) -> Any:
    """The integer type as wide as the floats of `x`."""
    return jnp.int32 if x.dtype.itemsize == 4 else jnp.int16


def _key(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The bit pattern of the magnitude, in 32 bits."""
    bits = lax.bitcast_convert_type(x, _word(x)).astype(jnp.int32)
    return bits & (2 ** (8 * x.dtype.itemsize - 1) - 1)


def _tally(
    acc: tuple[Int[Array, "*s"], ...], digit: Int[Array, "*s"]
) -> tuple[Int[Array, "*s"], ...]:
    """Counts a digit d per lane, in byte d % 4 of word d // 4; none outside 0..15."""
    unit = jnp.left_shift(jnp.ones_like(digit), (digit & 3) << 3)
    word = digit >> 2
    return tuple(a + jnp.where(word == w, unit, 0) for w, a in enumerate(acc))


def _unpack(acc: tuple[Int[Array, "*s"], ...]) -> list[Int[Array, "*s"]]:
    """The counts of the 16 digits per lane."""
    return [(acc[j // 4] >> (8 * (j % 4))) & 255 for j in range(_BINS)]
