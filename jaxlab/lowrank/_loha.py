"""LoHa: Hyeon-Woo, Ye-Bin and Oh, 2022."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, like
from ._rank import check_rank, plus, scaling, wide


def loha(*, rank: int, alpha: float | None = None) -> Adapter:
    r"""The elementwise product of two low-rank updates: a rank of up to $r^2$.

    $W' = W + \frac{\alpha}{r} (A_1 B_1) \odot (A_2 B_2)$. The product of two matrices
    of rank r has factors of rank $r^2$, the products of their columns: where those are
    cheaper than the update, $r^2 (n + m) < n m$, it is never formed.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator; `rank` by default, a scale of 1.

    Returns:
      An adapter with state `a1, a2 [n, r]` and `b1, b2 [r, m]`.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, $A_2 = 0$: the layer is unchanged.

    References:
      Hyeon-Woo, Ye-Bin and Oh, 2022, "FedPara: Low-Rank Hadamard Product for
      Communication-Efficient Federated Learning", https://arxiv.org/abs/2108.06098,
      proposition 1. Yeh et al., 2023, "Navigating Text-To-Image Customization: From
      LyCORIS Fine-Tuning to Model Evaluation", https://arxiv.org/abs/2309.14859, which
      adds it to a frozen weight. A convolution is the matrix of its use; FedPara's
      tensor form of proposition 3 is not here.

    Example:
      >>> adapter = loha(rank=2)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> {name: v.shape for name, v in s.items()}
      {'a1': (4, 2), 'b1': (2, 3), 'a2': (4, 2), 'b2': (2, 3)}
    """
    check_rank(rank)
    scale = scaling(rank, alpha)

    def init(key: Array, w: Array) -> dict[str, Any]:
        (n, m), dtype = w.shape, wide(w)
        check_rank(rank, w)
        keys = jax.random.split(key, 3)
        near, far = 1 / math.sqrt(rank), 1 / math.sqrt(n)
        drawn = lambda i, shape, limit: jax.random.uniform(
            keys[i], shape, dtype, -limit, limit
        )
        return {
            "a1": drawn(0, (n, rank), far),
            "b1": drawn(1, (rank, m), near),
            "a2": jnp.zeros((n, rank), dtype),
            "b2": drawn(2, (rank, m), near),
        }

    def update(s: dict[str, Any]) -> Array:
        return scale * ((s["a1"] @ s["b1"]) * (s["a2"] @ s["b2"]))

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        n, m = dense(w).shape
        if rank**2 * (n + m) >= n * m:
            return plus(x @ w, x @ like(update(s), x))
        a = (s["a1"][:, :, None] * s["a2"][:, None]).reshape(n, -1)
        b = (s["b1"][:, None] * s["b2"][None]).reshape(-1, m)
        return plus(x @ w, scale * ((x @ like(a, x)) @ like(b, x)))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, update(s))

    config = ("loha", ("rank", rank), ("scale", scale))
    return Adapter(init, apply, merge, config=config)
