"""DeLoRA: Bini et al., 2025."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._rank import check_rank, plus, wide


def delora(*, rank: int, bound: float = 15.0) -> Adapter:
    r"""A low-rank update whose size is one trained number, apart from its direction.

    $$\Delta W = \mathrm{diag}(\|W_{i\cdot}\|)\, A\, \Xi\, B, \quad
    \Xi = \frac{\lambda}{r}\,\mathrm{diag}\Big(\frac{1}{\|a_i\| \|b_i\|}\Big)$$
    with $a_i$ a column of A and $b_i$ a row of B: r directions, each of norm
    $\lambda / r$ before the weight's row norms, so that
    $\|\mathrm{diag}(\|W_{i\cdot}\|)^{-1} \Delta W\|_F \le \lambda$.

    Args:
      rank: r, from 1 to min(n, m).
      bound: the first value of lambda.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, `bound []`, and the fixed
      `norms [n]`, those of the base's rows.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, B = 0: the layer is unchanged. Norms count as at least 1e-4.

    References:
      Bini et al., 2025, "Decoupling Angles and Strength in Low-rank Adaptation",
      https://arxiv.org/abs/2503.18225. There the update is scaled by
      $\|W\|_F$; the norm of each input's weights, and B = 0 at the start in place of a
      second fixed copy, are those of the authors' implementation in PEFT.

    Example:
      >>> s = delora(rank=2).init(jax.random.key(0), jnp.ones((4, 3)))
      >>> float(s["bound"]), s["norms"].shape
      (15.0, (4,))
    """
    check_rank(rank)

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank, w)
        (n, m), dtype = w.shape, wide(w)
        limit = n**-0.5
        return {
            "a": jax.random.uniform(key, (n, rank), dtype, -limit, limit),
            "b": jnp.zeros((rank, m), dtype),
            "bound": jnp.asarray(bound, dtype),
            "norms": jnp.linalg.norm(w.astype(dtype), axis=1),
        }

    def left(s: dict[str, Any]) -> Array:
        size = s["bound"] / rank / (_norms(s["a"], 0) * _norms(s["b"], 1))
        return s["norms"][:, None] * s["a"] * size[None]

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        return plus(x @ w, (x @ like(left(s), x)) @ like(s["b"], x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, left(s) @ s["b"])

    config = ("delora", ("rank", rank), ("bound", bound))
    return Adapter(init, apply, merge, fixed=("norms",), config=config)


def _norms(v: Array, axis: int) -> Array:
    """Norms of at least 1e-4, with a finite slope at zero."""
    return jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis), 1e-8))
