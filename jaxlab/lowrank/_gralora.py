"""GraLoRA: Jung et al., 2025."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._direct import check_divides, direct, parts
from ._operands import like, rows
from ._rank import check_rank, plus, wide


def gralora(
    *, rank: int, blocks: int = 2, hybrid: int = 0, alpha: float | None = None
) -> Adapter:
    r"""Low rank in each of k by k blocks: as many numbers as LoRA, k times its rank.

    $\Delta W_{io} = \frac{\alpha}{r + r_h} A_{io} B_{io}$ with $A_{io}\,[n/k, r/k]$ and
    $B_{io}\,[r/k, m/k]$, for input block i and output block o; and, with `hybrid`, a
    LoRA of rank $r_h$ over the whole weight.

    Args:
      rank: r, a multiple of k, at most min(n, m).
      blocks: k, a divisor of n and m.
      hybrid: $r_h$; 0 for none.
      alpha: the scale's numerator; $r + r_h$ by default, a scale of 1.

    Returns:
      An adapter with state `a [k, n / k, r]`: $A_{io}$ are the o-th r / k columns of
      `a[i]`; `b [k, r, m / k]`: $B_{io}$ are the i-th r / k rows of `b[o]`; and, with
      `hybrid`, `a_whole [n, r_h]` and `b_whole [r_h, m]`.

    Raises:
      ValueError: a rank that is no multiple of k; (from `init`) one above min(n, m), or
        sides that are no multiples of k.

    Degenerate inputs:
      Fresh, B = 0: the layer is unchanged. One block: LoRA.

    References:
      Jung et al., 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient
      Fine-Tuning", https://arxiv.org/abs/2505.20355.

    Example:
      >>> s = gralora(rank=2).init(jax.random.key(0), jnp.ones((4, 6)))
      >>> s["a"].shape, s["b"].shape
      ((2, 2, 2), (2, 2, 3))
    """
    check_rank(rank)
    if blocks < 1 or rank % blocks:
        raise ValueError(f"rank {rank} is no multiple of the {blocks} blocks")
    if hybrid < 0:
        raise ValueError(f"hybrid must be at least 0, got {hybrid}")
    k, scale = blocks, 1.0 if alpha is None else alpha / (rank + hybrid)

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank + hybrid, w)
        check_divides(k, w, "blocks")
        (n, m), dtype = w.shape, wide(w)
        first, second = jax.random.split(key)
        draw = lambda key, shape: jax.random.uniform(
            key, shape, dtype, -(shape[-2] ** -0.5), shape[-2] ** -0.5
        )
        s = {"a": draw(first, (k, n // k, rank))}
        s["b"] = jnp.zeros((k, rank, m // k), dtype)
        if hybrid:
            s["a_whole"] = draw(second, (n, hybrid))
            s["b_whole"] = jnp.zeros((hybrid, m), dtype)
        return s

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = like(s["a"], x), like(s["b"], x)
        if direct(x):
            h = jnp.einsum("...ia,iar->...ir", parts(rows(x), k), a)
        else:
            apart = jnp.einsum("iar,ij->iajr", a, jnp.eye(k, dtype=a.dtype))
            h = parts(x @ apart.reshape(-1, k * rank), k)
        h = parts(h, k).swapaxes(-2, -3)
        y = jnp.einsum("...oiq,oiqc->...oc", h, b.reshape(k, k, rank // k, -1))
        y = y.reshape(*y.shape[:-2], -1)
        if hybrid:
            y = plus(y, (x @ like(s["a_whole"], x)) @ like(s["b_whole"], x))
        return plus(x @ w, scale * y)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        a, b = parts(s["a"], k), s["b"].reshape(k, k, rank // k, -1)
        update = jnp.einsum("iaoq,oiqc->iaoc", a, b).reshape(w.shape)
        if hybrid:
            update = plus(update, s["a_whole"] @ s["b_whole"])
        return plus(w, scale * update)

    config = (("rank", rank), ("blocks", blocks), ("hybrid", hybrid), ("scale", scale))
    return Adapter(init, apply, merge, config=("gralora", *config))
