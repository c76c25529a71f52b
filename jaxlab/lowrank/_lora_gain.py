"""LoRA beside a gain of each output: what combinations of DoRA are."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._lora import lora
from ._operands import like
from ._rank import wide


def lora_gain(*, rank: int, bias: bool = False) -> Adapter:
    r"""Low rank plus a gain of each output: $y = (x W) (1 + g) + (x A) B$.

    DoRA is one of these for each base, and unlike DoRA they are closed under linear
    combinations: `from_factors` makes them.

    Args:
      rank: r, from 1 to min(n, m).
      bias: also train a bias, added to the layer's own.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, `gain [m]` and, with `bias`,
      `bias [m]`.

    Raises:
      ValueError: as `lora`.

    Degenerate inputs:
      Fresh, B = 0 and g = 0: the layer is unchanged. A gain of -1 leaves x A B alone.

    References:
      Liu et al., 2024, "DoRA", https://arxiv.org/abs/2402.09353, equation 5, whose
      $\mu / \|W + s A B\|_c$ is $1 + g$; Liu et al., 2022, "Few-Shot
      Parameter-Efficient Fine-Tuning" (IA3), https://arxiv.org/abs/2205.05638, whose
      $l$ is.

    Example:
      >>> adapter = lora_gain(rank=1)
      >>> s = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2)), "gain": jnp.ones(2)}
      >>> adapter.merge(jnp.eye(2), s).tolist()
      [[3.0, 1.0], [1.0, 3.0]]
    """
    plain = lora(rank=rank, bias=bias)

    def init(key: Array, w: Array) -> dict[str, Any]:
        s = plain.init(key, w)
        return s | {"gain": jnp.zeros(w.shape[1], s["a"].dtype)}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        y, update = x @ w, (x @ like(s["a"], x)) @ like(s["b"], x)
        dtype = wide(y, s["gain"])
        gain = jnp.broadcast_to(1 + s["gain"].astype(dtype), y.shape)
        return (y.astype(dtype) * gain + update.astype(dtype)).astype(y.dtype)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        dtype = wide(w, s["a"])
        scaled = w.astype(dtype) * (1 + s["gain"].astype(dtype))[None]
        return (scaled + (s["a"] @ s["b"]).astype(dtype)).astype(w.dtype)

    config = ("lora_gain", ("rank", rank), ("bias", bias))
    return Adapter(init, apply, merge, bias=plain.bias, config=config)
