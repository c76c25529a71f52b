"""LoRA: Hu et al., 2021."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._rank import check_rank, plus, scaling, wide


def lora(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    bias: bool = False,
    frozen_a: bool = False,
) -> Adapter:
    r"""A low-rank update beside each weight: $y = x W + \frac{\alpha}{r} (x A) B$.

    A is drawn uniformly from $\pm 1/\sqrt{n}$ and B is zero.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r (rank-stabilised LoRA).
      bias: also train a bias, added to the layer's own.
      frozen_a: train B alone (LoRA-FA), which also keeps no full activations for the
        backward pass.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]` and, with `bias`, `bias [m]`.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m); `bias` on a layer
        that has none to fold it into.

    Degenerate inputs:
      Fresh, B = 0: the layer is unchanged.

    References:
      Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
      https://arxiv.org/abs/2106.09685, equation 3. Kalajdzievski, 2023, "A Rank
      Stabilization Scaling Factor for Fine-Tuning with LoRA",
      https://arxiv.org/abs/2312.03732. Zhang et al., 2023, "LoRA-FA",
      https://arxiv.org/abs/2308.03303.

    Example:
      >>> adapter = lora(rank=2, alpha=4)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["a"].shape, s["b"].shape
      ((4, 2), (2, 3))
    """
    check_rank(rank)
    scale = scaling(rank, alpha, rslora=rslora)

    def init(key: Array, w: Array) -> dict[str, Any]:
        (n, m), dtype = w.shape, wide(w)
        check_rank(rank, w)
        limit = 1 / math.sqrt(n)
        a = jax.random.uniform(key, (n, rank), dtype, -limit, limit)
        s = {"a": a, "b": jnp.zeros((rank, m), dtype)}
        return s | ({"bias": jnp.zeros(m, dtype)} if bias else {})

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = like(s["a"], x), like(s["b"], x)
        return plus(x @ w, scale * ((x @ a) @ b))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, scale * (s["a"] @ s["b"]))

    def added(b: Array | None, s: dict[str, Any]) -> Array:
        if b is None:
            raise ValueError("lora(bias=True) needs a layer with a bias")
        return plus(b, scale * s["bias"])

    config = (("rank", rank), ("scale", scale), ("bias", bias), ("frozen_a", frozen_a))
    return Adapter(
        init,
        apply,
        merge,
        fixed=("a",) if frozen_a else (),
        bias=added if bias else None,
        config=("lora", *config),
    )
