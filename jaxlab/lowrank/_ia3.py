"""IA3: Liu et al., 2022."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._direct import direct, scaled
from ._operands import dense, like, rows
from ._rank import wide


def ia3(*, feedforward: bool = False) -> Adapter:
    r"""Scales what goes out of a layer, or what goes in: $y = l \odot (x W + b)$.

    With `feedforward`, $y = (l \odot x) W + b$: for the second layer of an MLP, whose
    input are the activations that the paper rescales.

    Args:
      feedforward: scale the input in place of the output.

    Returns:
      An adapter with state `scale`: $l\,[m]$, or $[n]$ with `feedforward`.

    Raises:
      Nothing.

    Degenerate inputs:
      Fresh, l = 1: the layer is unchanged.

    References:
      Liu et al., 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper
      than In-Context Learning", https://arxiv.org/abs/2205.05638. There the
      keys and values of attention are scaled; any layer's output is here, with its
      bias.

    Example:
      >>> s = {"scale": jnp.array([1.0, 3.0])}
      >>> ia3().apply(jnp.ones((1, 1)), jnp.array([[2.0, 2.0]]), s).tolist()
      [[2.0, 6.0]]
    """

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        return {"scale": jnp.ones(w.shape[0 if feedforward else 1], wide(w))}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        if not feedforward:
            return scaled(x @ w, s["scale"])
        if direct(x):
            return scaled(rows(x), s["scale"]) @ like(dense(w), x)
        return x @ like(merge(dense(w), s), x)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return scaled(w.T, s["scale"]).T if feedforward else scaled(w, s["scale"])

    def bias(b: Array | None, s: dict[str, Any]) -> Array | None:
        return None if b is None else scaled(b, s["scale"])

    return Adapter(
        init,
        apply,
        merge,
        bias=None if feedforward else bias,
        config=("ia3", ("feedforward", feedforward)),
    )
