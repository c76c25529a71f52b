"""VeRA: Kopiczko, Blankevoort and Asano, 2024."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, like
from ._rank import check_rank, plus, wide
from ._torch_random import torch_random


def vera(*, rank: int, d_initial: float = 0.1, seed: int = 0) -> Adapter:
    r"""Two random matrices for all layers, and two vectors for each.

    $y = x W + ((x A) \odot d) B \odot b$. A and B are drawn once, of the largest sides
    among the layers; each uses their first rows and columns.

    Args:
      rank: r, at least 1; the authors take up to 1024.
      d_initial: what d starts as.
      seed: of A and B, which are those that PEFT draws with this
        `projection_prng_key`.

    Returns:
      An adapter with state `d [r]` and `b [m]`, and fixed for all layers `proj_a
      [max n, r]`, `proj_b [r, max m]`.

    Raises:
      ValueError: a rank below 1.

    Degenerate inputs:
      Fresh, b = 0: the layer is unchanged.

    References:
      Kopiczko, Blankevoort and Asano, 2024, "VeRA: Vector-based Random Matrix
      Adaptation", https://arxiv.org/abs/2310.11454, equation 2.

    Example:
      >>> import jax
      >>> s = vera(rank=5).init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["d"].shape, s["b"].shape
      ((5,), (3,))
    """
    check_rank(rank)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        d = jnp.full(rank, d_initial, wide(w))
        return {"d": d, "b": jnp.zeros(w.shape[1], wide(w))}

    def shared(key: Array, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        del key
        n, m = (max(side) for side in zip(*sizes, strict=True))
        draw = torch_random(seed).kaiming_uniform
        a, b = draw((rank, n)), draw((m, rank))
        return {"proj_a": jnp.asarray(a.T), "proj_b": jnp.asarray(b.T)}

    def factors(n: int, s: dict[str, Any]) -> tuple[Array, Array]:
        dtype = s["b"].dtype
        a, b = s["proj_a"].astype(dtype), s["proj_b"].astype(dtype)
        return a[:n] * s["d"][None], b[:, : s["b"].shape[0]] * s["b"][None]

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = factors(dense(w).shape[0], s)
        return plus(x @ w, (x @ like(a, x)) @ like(b, x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        a, b = factors(w.shape[0], s)
        return plus(w, a @ b)

    config = ("vera", ("rank", rank), ("d_initial", d_initial), ("seed", seed))
    fixed = ("proj_a", "proj_b")
    return Adapter(init, apply, merge, fixed=fixed, shared=shared, config=config)
