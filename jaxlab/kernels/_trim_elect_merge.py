"""Trim, elect and merge k task vectors, in one pass over memory.

Unmeasured: no GPU or TPU was at hand. The kernels stay pending a measurement with
`experiments/bench/kernels.py`; one that is not 1.15 times as fast as XLA is dropped.

The floor is one read of the k vectors (and of the base) and one write of the result:
(k + 1) n entries, or (k + 2) n with a base; about 8 k operations per output entry.
"""

import functools as ft
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from ._agreement import TINY, Divide, Elect, How, agreement, chosen, merge_rows, total
from ._dispatch import Use, check_float, dispatch

_MANY = 64  # rows of more models than this do not fit the registers
_GPU_WARPS = 4
_TPU_ROWS, _TPU_LANES, _TPU_BYTES = 16, 256, 2**21


def trim_elect_merge(
    deltas: Float[Array, "k *leaf"],
    cutoffs: ArrayLike,
    weights: ArrayLike,
    *,
    base: Float[Array, "*leaf"] | None = None,
    elect: Elect = "weighted",
    divide: Divide = "weight",
    use: Use = "auto",
) -> Float[Array, "*leaf"]:
    r"""Merges task vectors by trimming, electing a sign and averaging, fused.

    With the entries $d_i$ of model i, zeroed where $|d_i| < c_i$, and the votes
    $v_i = w_i d_i$ (or $d_i$ with `elect="raw"`), the elected sign is that of
    $\sum_i v_i$, and plus where the sum is 0. Over the set A of models whose vote has
    it, the result is $\sum_A w_i d_i / \sum_A w_i$ (or $/|A|$, or undivided).

    Reads every entry once, computes in float32, rounds once. Reverse mode works for
    `deltas`, `weights` and `base`, with trim and election as constants; so does
    `jax.vmap`. On TPU a leaf of one axis is copied into tiles first, and float16, like
    more than 64 models or $2^{31}$ entries, takes the reference. Pallas does not
    partition a kernel: call it inside `jax.shard_map`, or take the reference.

    Args:
      deltas: `[k, *leaf]` task vectors in float32, bfloat16 or float16; or models,
        where `base` is given, whose differences to it are formed in registers.
      cutoffs: $c$, the least magnitude kept, as of `kth_magnitude`; a scalar or `[k]`.
      weights: $w$, a scalar or `[k]`; may be traced.
      base: `[*leaf]`, subtracted from every row and added to the result.
      elect: "weighted" elects after weighting, as mergekit does; "raw" before, as PEFT
        and the paper do.
      divide: "weight" divides by the sum of the agreeing weights, "count" by their
        number, "none" by nothing.
      use: "auto" takes the kernel on NVIDIA GPU and TPU and the reference elsewhere;
        "reference" always the reference, which any transform of JAX can see through;
        "pallas" always the kernel, interpreted (slowly) where there is neither.

    Returns:
      `[*leaf]` in the dtype of `deltas`: the merged task vector, or the merged model.

    Raises:
      ValueError: a dtype, shape or option other than these.

    Degenerate inputs:
      No survivor: 0 (or the base). Agreeing weights that sum to less than 1e-8 in
      magnitude divide by 1. NaN fails the trim's comparison and is dropped.

    References:
      Yadav et al., 2023, "TIES-Merging", Algorithm 1. A sum of 0 elects plus, as in
      mergekit and PEFT; the authors' code elects the majority of the whole vector.

    Example:
      >>> deltas = jnp.array([[4.0, -1.0, 0.1], [2.0, 3.0, -0.2]])
      >>> trim_elect_merge(deltas, 0.5, 1.0)
      Array([3., 3., 0.], dtype=float32)
    """
    _check(deltas, base, elect, divide)
    extra = () if base is None else (base,)
    k, size = deltas.shape[0], math.prod(deltas.shape[1:])
    per_model = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.float32), (k,))
    args = (deltas, per_model(cutoffs), per_model(weights), *extra)
    big = k > _MANY or size >= 2**31
    if use == "reference" or not size or (use == "auto" and big):
        return _reference(How(elect, divide), *args)
    return _fused(How(elect, divide), use, *args)


def _check(deltas: Array, base: Array | None, elect: str, divide: str) -> None:
    """Raises unless all is as the docstring says."""
    if deltas.ndim < 2 or not deltas.shape[0]:
        raise ValueError(f"deltas must be [k, *leaf], k >= 1, got {deltas.shape}")
    check_float("deltas", deltas)
    if base is not None:
        check_float("base", base)
        if base.shape != deltas.shape[1:]:
            raise ValueError(f"base is {base.shape}, expected {deltas.shape[1:]}")
    if elect not in ("weighted", "raw"):
        raise ValueError(f"elect must be 'weighted' or 'raw', got {elect!r}")
    if divide not in ("weight", "count", "none"):
        raise ValueError(f"divide must be 'weight', 'count' or 'none', got {divide!r}")


def _reference(
    how: How, deltas: Array, cutoffs: Array, weights: Array, *base: Array
) -> Array:
    """What the kernels compute, in plain JAX."""
    return merge_rows(how, list(deltas), cutoffs, weights, *base).astype(deltas.dtype)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(how: How, use: Use, *args: Array) -> Array:
    """The dispatched forward pass; a `pallas_call` has no reverse mode of its own."""
    reference, gpu, tpu = (ft.partial(f, how) for f in (_reference, _gpu, _tpu))
    return dispatch(use, *args, reference=reference, gpu=gpu, tpu=tpu)


def _forward(how: How, use: Use, *args: Array) -> tuple[Array, tuple[Array, ...]]:
    """The residuals are the inputs: nothing else is written."""
    return _fused(how, use, *args), args


def _backward(how: How, use: Use, saved: tuple[Any, ...], g: Array) -> tuple[Any, ...]:
    """The closed form, elementwise but for the weights; XLA fuses it."""
    del use
    deltas, cutoffs, weights, *base = saved
    kept, agree, below = agreement(how, list(deltas), cutoffs, weights, *base)
    slope = g.astype(jnp.float32)
    share, mean = slope / below, jnp.zeros_like(slope)
    if how.divide == "weight":
        sums = chosen(agree, [weights[i] + mean for i in range(len(kept))])
        top = chosen(agree, [weights[i] * d for i, d in enumerate(kept)])
        mean = jnp.where(jnp.abs(sums) < TINY, mean, top / below)
    each = [jnp.where(a, weights[i] * share, 0) for i, a in enumerate(agree)]
    pull = [chosen([a], [share * (d - mean)]) for a, d in zip(agree, kept, strict=True)]
    return (
        jnp.stack([e.astype(deltas.dtype) for e in each]),
        jnp.zeros_like(cutoffs),
        jnp.stack([jnp.sum(p) for p in pull]),
        *[(slope - total(each)).astype(b.dtype) for b in base],
    )


_fused.defvjp(_forward, _backward)


def _gpu(
    how: How,
    deltas: Float[Array, "k *leaf"],
    cutoffs: Float[Array, " k"],
    weights: Float[Array, " k"],
    *base: Float[Array, "*leaf"],
    interpret: Any = False,
) -> Float[Array, "*leaf"]:
    """One Triton program per block of entries; the k rows of it stay in registers."""
    from jax.experimental.pallas import triton

    k, n = deltas.shape[0], math.prod(deltas.shape[1:])
    # At most 32 entries of all models a thread, and 2 to 8 of each.
    block = max(256, min(1024, pl.next_power_of_2(4096 // k + 1) // 2))

    def kernel(c_ref: Any, w_ref: Any, *refs: Any) -> None:
        mask = jnp.arange(block, dtype=jnp.int32) < n - pl.program_id(0) * block
        *rows, out_ref = [ref.at[pl.ds(0, block)] for ref in refs]
        rows = [triton.load(ref, mask=mask) for ref in rows]
        out = merge_rows(how, rows[:k], _scalars(c_ref), _scalars(w_ref), *rows[k:])
        triton.store(out_ref, out.astype(deltas.dtype), mask=mask)

    whole = pl.BlockSpec((k,), lambda _: (0,))
    row = pl.BlockSpec((block,), lambda b: (b,))
    # One buffer under k specs: a masked load takes no static index.
    models = [pl.BlockSpec((None, block), lambda b, i=i: (i, b)) for i in range(k)]
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(n, block),),
        in_specs=[whole, whole, *models] + [row] * len(base),
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((n,), deltas.dtype),
        compiler_params=triton.CompilerParams(num_warps=_GPU_WARPS, num_stages=1),
        interpret=interpret,
        name="trim_elect_merge",
    )(cutoffs, weights, *[deltas.reshape(k, n)] * k, *[b.reshape(n) for b in base])
    return out.reshape(deltas.shape[1:])


def _scalars(ref: Any) -> list[Any]:
    """The numbers in a reference, one by one."""
    return [ref[i] for i in range(ref.shape[0])]


def _tpu(
    how: How,
    deltas: Float[Array, "k *leaf"],
    cutoffs: Float[Array, " k"],
    weights: Float[Array, " k"],
    *base: Float[Array, "*leaf"],
    interpret: Any = False,
) -> Float[Array, "*leaf"]:
    """One grid step per block of rows and lanes, 16 rows at a time in registers."""
    from jax.experimental.pallas import tpu

    if jnp.float16 in [x.dtype for x in (deltas, *base)]:  # Mosaic loads none
        return _reference(how, deltas, cutoffs, weights, *base)
    tiles = _tiles(deltas, 1)
    k, rows, lanes = tiles.shape
    width = min(lanes, _TPU_LANES)
    fit = _TPU_BYTES // (4 * width * k * _TPU_ROWS) * _TPU_ROWS
    few = min(rows, _TPU_ROWS)
    block = max(few, min(fit, rows // few * few))

    def kernel(c_ref: Any, w_ref: Any, d_ref: Any, *refs: Any) -> None:
        def step(i: Array, carry: None) -> None:
            at = pl.ds(pl.multiple_of(i * few, few), few)
            models, origin = [d_ref[j, at, :] for j in range(k)], refs[:-1]
            c, w = _scalars(c_ref), _scalars(w_ref)
            out = merge_rows(how, models, c, w, *[ref[at, :] for ref in origin])
            refs[-1][at, :] = out.astype(deltas.dtype)
            return carry

        jax.lax.fori_loop(0, block // few, step, None)

    smem = pl.BlockSpec(memory_space=tpu.SMEM)
    row = pl.BlockSpec((block, width), lambda r, c: (r, c))
    models = pl.BlockSpec((k, block, width), lambda r, c: (0, r, c))
    out = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(rows, block), pl.cdiv(lanes, width)),
        in_specs=[smem, smem, models] + [row] * len(base),
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct((rows, lanes), deltas.dtype),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        interpret=interpret,
        name="trim_elect_merge",
    )(cutoffs, weights, tiles, *[_tiles(b, 0) for b in base])
    return out.reshape(-1)[: math.prod(deltas.shape[1:])].reshape(deltas.shape[1:])


def _tiles(x: Shaped[Array, "..."], lead: int) -> Shaped[Array, "... rows lanes"]:
    """Rows and lanes after `lead` axes: free where the leaf has two axes or more."""
    head, leaf = x.shape[:lead], x.shape[lead:]
    if len(leaf) > 1:
        return x.reshape(*head, -1, leaf[-1])
    short = -x.shape[-1] % (128 * _TPU_ROWS)
    return jnp.pad(x, [(0, 0)] * lead + [(0, short)]).reshape(*head, -1, 128)
