"""Robust Weight Signatures in a few bits per entry (Cai et al., 2023)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import tree
from ..types import Params, Stacked
from . import _bits
from ._coefficients import wide
from ._rws import beside


class Quantised(NamedTuple):
    """Signatures of a few bits per entry.

    Attributes:
      planes: `[bits, k, words]` uint32: bit b of 32 entries to a word.
      low: `[k]` for each leaf: what the code 0 stands for.
      step: `[k]` for each leaf: what a code adds.
    """

    planes: Stacked
    low: Stacked
    step: Stacked


def rws_quantize(signatures: Stacked, *, bits: int = 4) -> Quantised:
    r"""Stores signatures with a few bits per entry.

    $q = \mathrm{round}((R - l) / s)$ with $l = \min R$ and $s = (\max R - l) / (2^b -
    1)$, for each leaf of each signature.

    Args:
      signatures: `[k, *leaf]` from `rws`.
      bits: $b$, from 1 to 16.

    Returns:
      A `Quantised`: `bits` bits per entry and two numbers per leaf.

    Raises:
      ValueError: `bits` out of range.

    Degenerate inputs:
      A leaf of equal entries is stored exactly.

    References:
      Cai et al., 2023, https://arxiv.org/abs/2302.12480, Section 4. The authors' code
      takes the range over all signatures; here each has its own, so adding one changes
      no other. Its logarithmic and tanh codes are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> small = rws_quantize({"w": jnp.ones((1, 64))}, bits=2)
      >>> small.planes["w"].shape
      (2, 1, 2)
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be from 1 to 16, got {bits}")
    x = wide(signatures, name="signatures")
    flat = jax.tree.map(lambda v: v.reshape(len(v), -1), x)
    low = jax.tree.map(lambda v: jnp.min(v, 1), flat)
    top = 2**bits - 1
    step = jax.tree.map(lambda v, l: (jnp.max(v, 1) - l) / top, flat, low)

    def leaf(v: Array, l: Array, s: Array) -> Array:
        code = (v - l[:, None]) / jnp.where(s > 0, s, 1)[:, None]
        code = jnp.clip(jnp.round(code), 0, top).astype(jnp.uint32)
        return jnp.stack([_bits.pack((code >> b) % 2 == 1) for b in range(bits)])

    return Quantised(jax.tree.map(leaf, flat, low, step), low, step)


def rws_dequantize(small: Quantised, like: Params) -> Stacked:
    r"""The signatures that a `Quantised` stands for: $l + s\,q$.

    Args:
      small: from `rws_quantize`.
      like: `[*leaf]` a model, arrays or shapes: the shapes and dtypes of the leaves.

    Returns:
      `[k, *leaf]` signatures, each entry within half a step of what was stored.

    Raises:
      ValueError: a signed leaf is not in `like`, or is too large for what was stored.

    Degenerate inputs:
      As in `rws_quantize`.

    References:
      Cai et al., 2023, https://arxiv.org/abs/2302.12480, Section 4.

    Example:
      >>> import jax.numpy as jnp
      >>> small = rws_quantize({"w": jnp.array([[0.0, 0.4, 1.0]])}, bits=1)
      >>> rws_dequantize(small, {"w": jnp.zeros(3)})["w"].tolist()
      [[0.0, 0.0, 1.0]]
    """

    def leaf(path: str, planes: Array, l: Array, s: Array, one: Any) -> Array:
        bits, k, words = planes.shape
        if -(-one.size // _bits.WORD) != words:
            raise ValueError(
                f"like differs at {path!r}: shape {one.shape} does not fit {words} "
                f"words of codes"
            )
        code = sum(
            _bits.unpack(planes[b], (k, one.size)).astype(s.dtype) * 2**b
            for b in range(bits)
        )
        return (l[:, None] + s[:, None] * code).reshape(k, *one.shape).astype(one.dtype)

    return tree.path_map(leaf, *small, beside(small.planes, like, name="like"))
