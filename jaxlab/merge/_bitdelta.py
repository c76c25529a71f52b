"""BitDelta: a fine-tune as one bit per weight (Liu et al., 2024)."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import tree
from ..types import Stacked
from . import _bits
from ._coefficients import wide


class BitDelta(NamedTuple):
    """Task vectors as signs and scales.

    Attributes:
      bits: `[k, *lead, words]` uint32: 32 signs to a word along the last axis of each
        leaf, 1 for + or 0.
      scales: what multiplies the signs, one per matrix: `[k]`, or `[k, *lead]`. These
        are what distillation trains.
    """

    bits: Stacked
    scales: Stacked


def bitdelta(deltas: Stacked, *, per: Literal["leaf", "matrix"] = "leaf") -> BitDelta:
    r"""The signs of task vectors, 32 to a word, with one scale for each matrix.

    $\hat\Delta = \alpha\,\mathrm{Sign}(\Delta)$ with $\alpha = \mathrm{mean}|\Delta|$,
    which is the scale nearest to $\Delta$ in the Frobenius norm.

    Args:
      deltas: `[k, *leaf]` task vectors $\Delta$ of weight matrices; biases and norms
        are better left as they are (`tree.partition`).
      per: "leaf" gives each leaf one scale; "matrix" each matrix of its last two axes,
        as layers or experts are stacked.

    Returns:
      `(bits, scales)`: uint32 words, and scales in at least float32. The scales are
      differentiable through `bitdelta_restore`: train them by any optimiser against the
      outputs of the fine-tuned model, with the bits held fixed.

    Raises:
      ValueError: an unknown `per`, or a leaf that is not floating-point.

    Degenerate inputs:
      The sign of 0 is +. A leaf of zeros has the scale 0, and comes back as zeros.

    References:
      Liu et al., 2024, "BitDelta: Your Fine-Tune May Only Be Worth One Bit",
      https://arxiv.org/abs/2402.10193, Section 3.1. The second step, scale
      distillation, is the loss $\|Z_{fine} - Z_{bin}(\alpha)\|^2$ of the logits.

    Example:
      >>> import jax.numpy as jnp
      >>> small = bitdelta({"w": jnp.array([[[3.0, -1.0], [0.0, -4.0]]])})
      >>> small.bits["w"], small.scales["w"]
      (Array([[[1],
              [1]]], dtype=uint32), Array([2.], dtype=float32))
    """
    if per not in ("leaf", "matrix"):
        raise ValueError(f"per must be 'leaf' or 'matrix', got {per!r}")
    x = wide(deltas, name="deltas")

    def scale(v: Array) -> Array:
        first = 1 if per == "leaf" else max(1, v.ndim - 2)
        return jnp.mean(jnp.abs(v), axis=tuple(range(first, v.ndim)))

    bits = jax.tree.map(lambda v: _bits.planes(v >= 0), x)
    return BitDelta(bits, jax.tree.map(scale, x))


def bitdelta_restore(small: BitDelta, like: Stacked) -> Stacked:
    r"""The task vectors $\alpha\,\mathrm{Sign}(\Delta)$ of their signs and scales.

    Args:
      small: what `bitdelta` gave, with these scales or trained ones.
      like: `[k, *leaf]` arrays, or `jax.ShapeDtypeStruct`s, of the shapes and dtypes
        wanted.

    Returns:
      `[k, *leaf]` task vectors in the dtypes of `like`; differentiable in the scales.

    Raises:
      ValueError: `like` is not what the signs were taken from; names the leaf.

    Degenerate inputs:
      A scale of 0 gives zeros.

    References:
      Liu et al., 2024, https://arxiv.org/abs/2402.10193, Equation 2.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[[3.0, -1.0], [0.0, -4.0]]])}
      >>> bitdelta_restore(bitdelta(x), x)["w"]
      Array([[[ 2., -2.],
              [ 2., -2.]]], dtype=float32)
    """
    words = jax.tree.map(_bits.words_like, like)
    tree.check_like(small.bits, words, name="small.bits")

    def leaf(x: Array, bits: Array, scale: Array) -> Array:
        positive = _bits.unpack(bits, x.shape)
        factor = scale.reshape(scale.shape + (1,) * (len(x.shape) - scale.ndim))
        return jnp.where(positive, factor, -factor).astype(x.dtype)

    return jax.tree.map(leaf, like, small.bits, small.scales)
