"""Hydra: Kim et al., 2023."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._rank import check_least, check_rank, plus, wide


def hydra(
    *, rank: int, sequential_rank: int | None = None, scale: float = 1.0
) -> Adapter:
    r"""A parallel low-rank branch on the input, a sequential one on the output.

    $y = f + \sigma (x A_p) B_p + \sigma (f A_s) B_s$ with $f = x W + b$ the layer's
    own output, so exactly $W' = W + \sigma A_p B_p + \sigma W A_s B_s$ and
    $b' = b + \sigma b A_s B_s$.

    Args:
      rank: r of the parallel branch, from 1 to min(n, m).
      sequential_rank: r of the sequential branch, from 1 to m; `rank` by default.
      scale: $\sigma$, of both branches.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]` (parallel) and `a_out [m, r]`,
      `b_out [r, m]` (sequential).

    Raises:
      ValueError: a rank below 1, or (from `init`) above what the weight allows.

    Degenerate inputs:
      Fresh, both B = 0: the layer is unchanged. A layer without a bias needs none.

    References:
      Kim et al., 2023, "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient
      Fine-tuning", https://arxiv.org/abs/2309.06922, section 3; the branches have no
      biases and A is drawn from $\pm 1/\sqrt{\mathrm{fan\,in}}$, as in the authors'
      code for language.

    Example:
      >>> adapter = hydra(rank=2, sequential_rank=1)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["a"].shape, s["a_out"].shape
      ((4, 2), (3, 1))
    """
    second = rank if sequential_rank is None else sequential_rank
    check_rank(rank)
    check_least("sequential_rank", second)

    def init(key: Array, w: Array) -> dict[str, Any]:
        (n, m), dtype = w.shape, wide(w)
        check_rank(rank, w)
        if second > m:
            raise ValueError(f"sequential_rank {second} is above the {m} outputs")
        keys = jax.random.split(key)
        return {
            "a": _uniform(keys[0], (n, rank), dtype),
            "b": jnp.zeros((rank, m), dtype),
            "a_out": _uniform(keys[1], (m, second), dtype),
            "b_out": jnp.zeros((second, m), dtype),
        }

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b, a_out, b_out = (like(s[n], x) for n in ("a", "b", "a_out", "b_out"))
        f = x @ w
        after = (f.astype(a_out.dtype) @ a_out) @ b_out
        return plus(f, scale * ((x @ a) @ b + after))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        after = (w.astype(wide(w, s["a_out"])) @ s["a_out"]) @ s["b_out"]
        return plus(w, scale * (s["a"] @ s["b"] + after))

    def moved(b: Array | None, s: dict[str, Any]) -> Array | None:
        if b is None:
            return None
        after = (b.astype(wide(b, s["a_out"])) @ s["a_out"]) @ s["b_out"]
        return plus(b, scale * after)

    config = ("hydra", ("rank", rank), ("sequential_rank", second), ("scale", scale))
    return Adapter(init, apply, merge, bias=moved, config=config)


def _uniform(key: Array, shape: tuple[int, int], dtype: Any) -> Array:
    limit = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -limit, limit)
