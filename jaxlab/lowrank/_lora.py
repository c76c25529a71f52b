"""LoRA: Hu et al., 2021."""

import math
from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._randomized import product
from ._rank import check_rank, plus, scaling, wide

Start = Literal["uniform", "gaussian", "orthogonal"]


def lora(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    bias: bool = False,
    frozen_a: bool = False,
    start: Start = "uniform",
) -> Adapter:
    r"""A low-rank update beside each weight: $y = x W + \frac{\alpha}{r} (x A) B$.

    A is drawn and B is zero; or both are drawn with $A B = 0$.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r (rank-stabilised LoRA).
      bias: also train a bias; times the scale, it is added to the layer's own.
      frozen_a: train B alone (LoRA-FA), which also keeps no full activations for the
        backward pass.
      start: how A is drawn: "uniform" from $\pm 1/\sqrt{n}$; "gaussian", of standard
        deviation 1 / r; "orthogonal": $A = G_1 Q_1 / 10$, $B = Q_2^\top G_2 / 10$
        with normal $G_1, G_2$ and $Q_1, Q_2$ the odd and the even rows of one random
        orthogonal matrix, so that A and B both have slopes from the first step.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]` and, with `bias`, `bias [m]`.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m); an odd rank or
        `frozen_a` with "orthogonal"; an unknown `start`; `bias` on a layer that has
        none to fold it into.

    Degenerate inputs:
      Fresh, A B = 0: the layer is unchanged, for "orthogonal" to rounding.

    References:
      Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
      https://arxiv.org/abs/2106.09685, equation 3. Kalajdzievski, 2023, "A Rank
      Stabilization Scaling Factor for Fine-Tuning with LoRA",
      https://arxiv.org/abs/2312.03732. Zhang et al., 2023, "LoRA-FA",
      https://arxiv.org/abs/2308.03303. Datta, 2024, "Rethinking LoRA initialisation",
      https://datta0.github.io/posts/rethink-lora-init, for "orthogonal".

    Example:
      >>> adapter = lora(rank=2, alpha=4)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["a"].shape, s["b"].shape
      ((4, 2), (2, 3))
    """
    check_rank(rank)
    _check_start(start, rank, frozen_a)
    scale = scaling(rank, alpha, rslora=rslora)

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank, w)
        a, b = _drawn(key, w, rank, start)
        return {"a": a, "b": b} | ({"bias": jnp.zeros_like(b[0])} if bias else {})

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = like(s["a"], x), like(s["b"], x)
        return plus(x @ w, (scale * (x @ a)) @ b)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, scale * product(s["a"], s["b"]))

    def added(b: Array | None, s: dict[str, Any]) -> Array:
        if b is None:
            raise ValueError("lora(bias=True) needs a layer with a bias")
        return plus(b, scale * s["bias"])

    config = (("rank", rank), ("scale", scale), ("rslora", rslora), ("bias", bias))
    config += (("frozen_a", frozen_a), ("start", start))
    return Adapter(
        init,
        apply,
        merge,
        fixed=("a",) if frozen_a else (),
        bias=added if bias else None,
        config=("lora", *config),
    )


def _check_start(start: str, rank: int, frozen_a: bool) -> None:
    if start not in ("uniform", "gaussian", "orthogonal"):
        raise ValueError(
            f"start must be 'uniform', 'gaussian' or 'orthogonal', got {start!r}"
        )
    if start == "orthogonal" and (rank % 2 or frozen_a):
        raise ValueError(
            f"start='orthogonal' needs an even rank and a trained A, got rank={rank}, "
            f"frozen_a={frozen_a}"
        )


def _drawn(key: Array, w: Array, rank: int, start: Start) -> tuple[Array, Array]:
    """The factors of a fresh update, whose product is zero."""
    (n, m), dtype = w.shape, wide(w)
    if start == "orthogonal":
        mixed, left, right = jax.random.split(key, 3)
        q = jnp.linalg.qr(jax.random.normal(mixed, (rank, rank), dtype))[0] / 10
        a = product(jax.random.normal(left, (n, rank // 2), dtype), q[::2])
        return a, product(q[1::2].T, jax.random.normal(right, (rank // 2, m), dtype))
    if start == "gaussian":
        a = jax.random.normal(key, (n, rank), dtype) / rank
    else:
        limit = 1 / math.sqrt(n)
        a = jax.random.uniform(key, (n, rank), dtype, -limit, limit)
    return a, jnp.zeros((rank, m), dtype)
