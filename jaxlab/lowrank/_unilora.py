"""Uni-LoRA: Li et al., 2025."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._rank import check_rank, plus


def unilora(*, rank: int = 4, size: int = 256, bound: float = 0.02) -> Adapter:
    r"""One trained vector for all LoRA factors of a model: $\theta_D = P\,\theta_d$.

    $\theta_D$ are the entries of all $A\,[n, r]$ and $B\,[r, m]$; each is one entry of
    $\theta_d$, chosen at random, over the root of how often that entry is chosen: P has
    orthonormal columns. $y = x W + (x A) B$.

    Args:
      rank: r, from 1 to min(n, m).
      size: d, the length of the vector.
      bound: its entries start uniformly within it. At zero they would have no gradient.

    Returns:
      An adapter with state `theta [d]` that all leaves share, and fixed: `index_a`,
      `scale_a` [n, r], `index_b`, `scale_b` [r, m] and the shared `norm []`. An entry
      of A is `theta[index_a] * scale_a * norm`.

    Raises:
      ValueError: a size below 1; a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, the layer is changed a little: by products of entries within the bound.

    References:
      Li et al., 2025, "Uni-LoRA: One Vector is All You Need",
      https://arxiv.org/abs/2506.00799. Fresh, within every leaf each
      entry is chosen equally often, up to one: the scales are 1, `norm` is
      $\sqrt{d / D}$.

    Example:
      >>> adapter = unilora(rank=1, size=4)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((3, 2)))
      >>> s["index_a"].shape, s["index_b"].shape
      ((3, 1), (1, 2))
    """
    check_rank(rank)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank, w)
        n, m = w.shape
        first, order = jax.random.split(key)
        start = jax.random.randint(first, (), 0, size)
        index = (start + jnp.arange(rank * (n + m))) % size
        index = jax.random.permutation(order, index)
        a, b = index[: n * rank].reshape(n, rank), index[n * rank :].reshape(rank, m)
        one = {"scale_a": jnp.ones(a.shape), "scale_b": jnp.ones(b.shape)}
        return one | {"index_a": a, "index_b": b}

    def shared(key: Array, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        count = max(1.0, rank * sum(n + m for n, m in sizes) / size)
        theta = jax.random.uniform(key, (size,), jnp.float32, -bound, bound)
        return {"theta": theta, "norm": jnp.asarray(1 / math.sqrt(count))}

    def factors(s: dict[str, Any]) -> tuple[Array, Array]:
        theta = s["theta"] * s["norm"]
        return theta[s["index_a"]] * s["scale_a"], theta[s["index_b"]] * s["scale_b"]

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = (like(v, x) for v in factors(s))
        return plus(x @ w, (x @ a) @ b)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        a, b = factors(s)
        return plus(w, a @ b)

    return Adapter(
        init,
        apply,
        merge,
        fixed=("index_a", "index_b", "scale_a", "scale_b", "norm"),
        shared=shared,
        config=("unilora", ("rank", rank), ("size", size), ("bound", bound)),
    )
