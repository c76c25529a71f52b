"""DoRA: Liu et al., 2024."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._lora import lora
from ._operands import dense, like
from ._randomized import product
from ._rank import wide


def dora(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    detach: bool = True,
) -> Adapter:
    r"""A weight's columns as lengths and directions; directions change at low rank.

    $W' = \mu \odot \frac{W + s A B}{\|W + s A B\|_c}$, the norm over the n inputs of
    each output, $\mu$ trained from $\|W\|_c$, and $s = \alpha / r$. While training, no
    matrix of the size of W is formed:
    $\|W + s A B\|_c^2 = \|W\|_c^2 + \mathbf{1}^\top (B \odot (2 s A^\top W +
    s^2 A^\top A B))$, with the first term kept and the others of cost r n m.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r.
      detach: treat the norm as a constant in the gradient, as the paper does.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, `magnitude [m]`, and
      `squares [m]`, the squared norms of the base, fixed.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, the layer is unchanged. Where an output's W and s A B cancel, so that the
      norm is below about 0.001 of theirs (float32), it counts as that much; an output
      of norm 0 stays 0.

    References:
      Liu et al., 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation",
      https://arxiv.org/abs/2402.09353, equation 5 and section 4.3. With
      dropout A sees the dropped input, W the full one.

    Example:
      >>> w = jnp.array([[3.0, 0.0], [4.0, 2.0]])
      >>> adapter = dora(rank=1)
      >>> s = adapter.init(jax.random.key(0), w)
      >>> s["magnitude"].tolist()
      [5.0, 2.0]
    """
    plain = lora(rank=rank, alpha=alpha, rslora=rslora)
    scale = dict(plain.config[1:])["scale"]

    def init(key: Array, w: Array) -> dict[str, Any]:
        squares = jnp.sum(jnp.square(w.astype(wide(w))), 0)
        s = plain.init(key, w)
        return s | {"magnitude": jnp.sqrt(squares), "squares": squares}

    def factor(s: dict[str, Any], total: Array, update: Array) -> Array:
        """The lengths over the norms, whose squares are `total` up to rounding."""
        least = 16 * jnp.finfo(total.dtype).eps * (s["squares"] + update)
        square = jnp.maximum(total, least)
        norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 1)
        return s["magnitude"] / (jax.lax.stop_gradient(norm) if detach else norm)

    def own(s: dict[str, Any]) -> Array:
        """The squared norms of the update, by output."""
        return scale**2 * jnp.sum(s["b"] * product(s["a"].T, s["a"], s["b"]), 0)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        y = x @ w
        update = (x @ like(s["a"], x)) @ like(s["b"], x)
        cross = 2 * scale * product(s["a"].T, dense(w).astype(s["a"].dtype))
        squares = own(s)
        total = s["squares"] + jnp.sum(s["b"] * cross, 0) + squares
        lengths = jnp.broadcast_to(factor(s, total, squares), y.shape)
        dtype = wide(y, lengths)
        summed = y.astype(dtype) + scale * update.astype(dtype)
        return (summed * lengths.astype(dtype)).astype(y.dtype)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        dtype = wide(w, s["a"])
        summed = w.astype(dtype) + scale * product(s["a"], s["b"]).astype(dtype)
        lengths = factor(s, jnp.sum(jnp.square(summed), 0), own(s))
        return (summed * lengths[None]).astype(w.dtype)

    config = ("dora", *plain.config[1:4], ("detach", detach))
    return Adapter(init, apply, merge, fixed=("squares",), config=config)
