"""Training a leaf as it is: biases, norms, heads."""

from typing import Any

from jax import Array

from ..types import Adapter
from ._rank import wide


def full() -> Adapter:
    """The leaf itself, trained in float32 or wider: any leaf, of any shape.

    For biases (BitFit), norms (LN tuning), heads and whatever else is to be trained
    beside low-rank updates.

    Returns:
      An adapter with state `w`, of the leaf's shape.

    Raises:
      Nothing.

    Degenerate inputs:
      Fresh, the leaf is unchanged.

    References:
      Ben Zaken et al., 2021, "BitFit", https://arxiv.org/abs/2106.10199.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> adapter = full()
      >>> s = adapter.init(jax.random.key(0), jnp.ones(2))
      >>> adapter.merge(jnp.ones(2), s).tolist()
      [1.0, 1.0]
    """

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        return {"w": w.astype(wide(w))}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return s["w"].astype(w.dtype)

    return Adapter(init, None, merge, matrix=False, config=("full",))
