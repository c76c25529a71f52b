"""HiRA: Huang et al., 2025."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._rank import check_rank, plus, wide


def hira(*, rank: int) -> Adapter:
    r"""Multiplies each weight by one plus a low rank: $W' = W \odot (1 + A B)$.

    The update $W \odot A B$ has a rank of up to r times that of W.

    Args:
      rank: r, from 1 to min(n, m).

    Returns:
      An adapter with state `a [n, r]` and `b [r, m]`. Its weight is merged in every
      call: the product with W has no cheaper form.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, B = 0: the layer is unchanged. A zero weight stays zero.

    References:
      Huang et al., 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for
      Large Language Models", https://openreview.net/forum?id=TwJrTz9cRS.

    Example:
      >>> s = {"a": jnp.ones((2, 1)), "b": jnp.array([[0.0, 2.0]])}
      >>> hira(rank=1).merge(jnp.array([[1.0, 1.0], [5.0, 0.0]]), s).tolist()
      [[1.0, 3.0], [5.0, 0.0]]
    """
    check_rank(rank)

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank, w)
        (n, m), dtype = w.shape, wide(w)
        a = jax.random.uniform(key, (n, rank), dtype, -(n**-0.5), n**-0.5)
        return {"a": a, "b": jnp.zeros((rank, m), dtype)}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        update = s["a"] @ s["b"]
        return plus(w, w.astype(update.dtype) * update)

    return Adapter(init, None, merge, config=("hira", ("rank", rank)))
