"""OFT: Qiu et al., 2023."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, like, rows
from ._rank import wide
from ._structured import (
    block_sides,
    cayley,
    check_blocks,
    identities,
    is_plain,
    skew,
    turned,
)


def oft(
    *,
    block_size: int | None = None,
    blocks: int | None = None,
    share: bool = False,
    terms: int | None = None,
    eps: float | None = None,
) -> Adapter:
    r"""A rotation of a layer's inputs, in blocks: $y = x R W$.

    $R = \mathrm{diag}(R_1, \dots)$, each block the Cayley transform of a
    skew-symmetric matrix, $R_i = (I - Q_i)(I + Q_i)^{-1}$: angles and lengths among
    the weight's rows, and among its columns, stay. The input of a dense layer is
    rotated, not its weight, which spares training the gradient of a dense weight;
    that of a convolution or a look-up is not, its weight is.

    Args:
      block_size: b, that of a block; divides n.
      blocks: their number, in its place.
      share: one block for all.
      terms: in place of the inverse, K terms of the series (OFT v2's
        Cayley-Neumann), for the opposite Q as in PEFT:
        $I + 2 \sum_{k<K-1} Q^k + Q^{K-1}$; K = 3 and 4 are the same there, 1 is
        I, 2 is I + 2 Q. Only nearly a rotation, for small Q.
      eps: $\epsilon$ of the constrained form (COFT): each $Q_i$ is projected
        to a norm of at most $\epsilon / \sqrt{\mathrm{blocks}}$.

    Returns:
      An adapter with state `q [n / b or 1, b (b - 1) / 2]`, the entries above the
      diagonals.

    Raises:
      ValueError: not exactly one of block_size and blocks, terms below 1, eps not
        positive; from `init`: the blocks do not divide n, or are of size 1.

    Degenerate inputs:
      Fresh, Q = 0: the layer is unchanged. Dropout in `attach` acts on all of the
      input, as nothing is added to the layer.

    References:
      Qiu et al., 2023, "Controlling Text-to-Image Diffusion by Orthogonal
      Finetuning", https://arxiv.org/abs/2306.07280, section 3. Qiu et al., 2025,
      "Orthogonal Finetuning Made Scalable", https://arxiv.org/abs/2506.19847, for
      rotated inputs and the series. The gradient passes COFT's projection as it
      is, as in PEFT, but the state is not overwritten.

    Example:
      >>> adapter = oft(block_size=2)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["q"].shape
      (2, 1)
    """
    check_blocks(block_size, blocks)
    if terms is not None and terms < 1:
        raise ValueError(f"terms must be at least 1, got {terms}")
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        number, size = block_sides(w.shape[0], block_size, blocks)
        entries = size * (size - 1) // 2
        return {"q": jnp.zeros((1 if share else number, entries), wide(w))}

    def rotations(n: int, s: dict[str, Any]) -> Array:
        q = skew(s["q"], block_sides(n, block_size, blocks)[1])
        if eps is not None:
            q = q + jax.lax.stop_gradient(_projected(q, eps) - q)
        return cayley(q) if terms is None else _series(q, terms)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        if not is_plain(x):
            return x @ like(merge(dense(w), s), x)
        x, r = rows(x), rotations(dense(w).shape[0], s)
        return turned(x, like(r, x)) @ like(dense(w), x)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        back = jnp.swapaxes(rotations(w.shape[0], s), -1, -2)
        return turned(w.T.astype(back.dtype), back).T.astype(w.dtype)

    options = (("block_size", block_size), ("blocks", blocks), ("share", share))
    rest = (("terms", terms), ("eps", eps))
    return Adapter(init, apply, merge, config=("oft", *options, *rest))


def _series(q: Array, terms: int) -> Array:
    """The first terms of the transform of -Q; the last one counts once."""
    out = identities(q)
    if terms == 1:
        return out
    out, power = out + 2 * q, q
    if terms == 2:
        return out
    for _ in range(2, max(terms - 1, 3)):
        power = power @ q
        out = out + 2 * power
    return out + power @ q


def _projected(q: Array, eps: float) -> Array:
    """Blocks within a ball."""
    most = eps / q.shape[0] ** 0.5
    norm = jnp.sqrt(jnp.sum(q**2, (-2, -1), keepdims=True))
    return q * jnp.minimum(1, most / jnp.where(norm > 0, norm, 1))
