"""BOFT: Liu et al., 2024."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, like, rows
from ._rank import wide
from ._structured import block_sides, cayley, check_blocks, is_plain, turned


def boft(
    *,
    block_size: int | None = None,
    blocks: int | None = None,
    factors: int = 1,
) -> Adapter:
    r"""A rotation of a layer's inputs by butterfly factors: $y = (x R W) \odot s$.

    $R = B_{f-1} \cdots B_0$, $B_i = P_i \, \mathrm{diag}(R_{i,1}, \dots) P_i^T$: each
    factor rotates blocks of b inputs, $P_i$ brings together halves of blocks that are
    $2^i$ apart, so f factors mix $2^{f-1} b$ inputs with $f n b$ numbers. The blocks
    are Cayley transforms, $(I - Q)(I + Q)^{-1}$ of $Q = (A - A^T) / 2$. As in `oft`,
    the input of a dense layer is rotated, and otherwise the weight.

    Args:
      block_size: b; divides n; even where there are several factors.
      blocks: their number, in its place.
      factors: f, at least 1; n is a multiple of $2^{f-1} b$.

    Returns:
      An adapter with state `a [f, n / b, b, b]` and `scale [m]`.

    Raises:
      ValueError: not exactly one of block_size and blocks, factors below 1; from
        `init`: the blocks do not divide n, are odd, or are too few for the factors.

    Degenerate inputs:
      Fresh, A = 0 and s = 1: the layer is unchanged. Dropout in `attach` acts on all
      of the input, as nothing is added to the layer.

    References:
      Liu et al., 2024, "Parameter-Efficient Orthogonal Finetuning via Butterfly
      Factorization", https://arxiv.org/abs/2311.06243, section 4; the scale of the
      outputs is their code's.

    Example:
      >>> import jax
      >>> adapter = boft(block_size=2, factors=2)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> s["a"].shape, s["scale"].shape
      ((2, 4, 2, 2), (3,))
    """
    check_blocks(block_size, blocks)
    if factors < 1:
        raise ValueError(f"factors must be at least 1, got {factors}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        (n, m), dtype = w.shape, wide(w)
        number, size = block_sides(n, block_size, blocks)
        if factors > 1 and (size % 2 or number % 2 ** (factors - 1)):
            raise ValueError(
                f"factors={factors} needs even blocks, and a multiple of "
                f"{2 ** (factors - 1)} of them: {n} inputs have {number} of {size}"
            )
        a = jnp.zeros((factors, number, size, size), dtype)
        return {"a": a, "scale": jnp.ones(m, dtype)}

    def rotations(s: dict[str, Any]) -> Array:
        return cayley((s["a"] - jnp.swapaxes(s["a"], -1, -2)) / 2)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        if not is_plain(x):
            return x @ like(merge(dense(w), s), x)
        x, r = rows(x), rotations(s)
        for i in reversed(range(factors)):
            x = _factor(x, like(r[i], x), i)
        y = x @ like(dense(w), x)
        return y * jnp.broadcast_to(like(s["scale"], x), y.shape)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        r = jnp.swapaxes(rotations(s), -1, -2)
        out = w.T.astype(r.dtype)
        for i in range(factors):
            out = _factor(out, r[i], i)
        return (out.T * s["scale"][None]).astype(w.dtype)

    options = (("block_size", block_size), ("blocks", blocks), ("factors", factors))
    return Adapter(init, apply, merge, config=("boft", *options))


def _factor(x: Array, blocks: Array, i: int) -> Array:
    """`x [..., n]` times $B_i$: halves of blocks $2^i$ apart, side by side, turned."""
    lead, half = x.shape[:-1], blocks.shape[-1] // 2
    if i == 0:
        return turned(x, blocks)
    apart = x.reshape(*lead, -1, 2, 2**i, half)
    near = jnp.swapaxes(apart, -3, -2)
    out = turned(near.reshape(*lead, -1), blocks).reshape(near.shape)
    return jnp.swapaxes(out, -3, -2).reshape(x.shape)
