"""HRA: Yuan, Liu and Xu, 2024."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, like
from ._rank import check_rank, plus, wide


def hra(*, rank: int, orthogonal: bool = False) -> Adapter:
    r"""A chain of reflections of a layer's inputs: $y = x H_{r-1} \cdots H_0 W$.

    $H_i = I - 2 u_i u_i^T$ with unit $u_i$. The product of reflections is of low rank
    beside the identity, $I - U K U^T$ with a triangular K [r, r], so the layer costs
    $x W - ((x U) K) (U^T W)$: neither the rotation nor a second weight is formed.

    Args:
      rank: r, the number of reflections, from 1 to n.
      orthogonal: make the u orthogonal first (Gram-Schmidt, the paper's
        $\lambda = \infty$): $I - 2 U (U^T U)^{-1} U^T$.

    Returns:
      An adapter with state `u [n, r]`; its columns count by direction.

    Raises:
      ValueError: a rank below 1, or (from `init`) above n.

    Degenerate inputs:
      Fresh, each u comes twice and the layer is unchanged; not for odd r, nor with
      `orthogonal`, where the u are drawn apart: no such product is the identity. A
      column of zeros reflects nothing.

    References:
      Yuan, Liu and Xu, 2024, "Bridging The Gap between Low-rank and Orthogonal
      Adaptation via Householder Reflection Adaptation",
      https://arxiv.org/abs/2405.17484, equations 4 and 5. Schreiber and Van Loan,
      1989, "A Storage-Efficient WY Representation for Products of Householder
      Transformations", for K. PEFT pairs the u for Gram-Schmidt too, which divides
      zero by zero.

    Example:
      >>> adapter, w = hra(rank=2), jnp.ones((4, 3))
      >>> s = adapter.init(jax.random.key(0), w)
      >>> bool(jnp.allclose(adapter.merge(w, s), w, atol=1e-5))
      True
    """
    check_rank(rank)

    def init(key: Array, w: Array) -> dict[str, Any]:
        n = w.shape[0]
        if rank > n:
            raise ValueError(f"rank {rank} is above n of a weight {list(w.shape)}")
        paired = rank % 2 == 0 and not orthogonal
        count = rank // 2 if paired else rank
        limit = 1 / math.sqrt(count)
        u = jax.random.uniform(key, (n, count), wide(w), -limit, limit)
        return {"u": jnp.repeat(u, 2, axis=1) if paired else u}

    def factors(s: dict[str, Any]) -> tuple[Array, Array]:
        """U of unit columns, and K."""
        size = jnp.sum(s["u"] ** 2, 0, keepdims=True)
        u = s["u"] / jnp.sqrt(jnp.where(size > 0, size, 1))
        gram, one = u.T @ u, jnp.eye(rank, dtype=u.dtype)
        if orthogonal:
            gram = gram + jnp.diag((size[0] == 0).astype(u.dtype))
            return u, 2 * jnp.linalg.solve(gram, one)
        chain = jnp.tril(gram, -1) + one / 2
        return u, jax.scipy.linalg.solve_triangular(chain, one, lower=True)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        u, k = factors(s)
        change = like(k, x) @ (like(u.T, x) @ like(dense(w), x))
        return plus(x @ w, -((x @ like(u, x)) @ change))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        u, k = factors(s)
        return plus(w, -(u @ (k @ (u.T @ w.astype(u.dtype)))))

    config = ("hra", ("rank", rank), ("orthogonal", orthogonal))
    return Adapter(init, apply, merge, config=config)
