"""VB-LoRA: Li, Han and Ji, 2024."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._rank import check_rank, plus, wide


def vblora(
    *,
    rank: int,
    num_vectors: int = 256,
    vector_length: int = 256,
    topk: int = 2,
    bank_bound: float = 0.02,
    logits_std: float = 0.1,
) -> Adapter:
    r"""A low-rank update whose factors mix the vectors of one bank for all layers.

    $y = x W + (x A) B$. Each run of b entries of a column of A, or of a row of B, is
    $\sum_{s \in \mathrm{top}_k} w_s \alpha_s$: the softmax w of its k largest logits,
    times those vectors $\alpha_s$ of the bank.

    Args:
      rank: r, at least 1.
      num_vectors: h, those in the bank.
      vector_length: b; divides n and m.
      topk: k, from 1 to h.
      bank_bound: the bank starts uniform within plus and minus this.
      logits_std: the logits start normal, of this standard deviation.

    Returns:
      An adapter with state `logits_a [r, n / b, h]`, `logits_b [r, m / b, h]` and, for
      all layers, `bank [h, b]`.

    Raises:
      ValueError: a rank below 1, or topk not from 1 to num_vectors; from `init`: a
        vector_length that does not divide n and m.

    Degenerate inputs:
      Fresh, the layer changes by a product of two mixtures, about $10^{-4}$ r at the
      defaults: a bank of zeros would have no gradient. Logits of minus infinity are
      never mixed, as in the files that keep only the largest.

    References:
      Li, Han and Ji, 2024, "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with
      Vector Banks", https://arxiv.org/abs/2405.15179, equations 2 to 4.

    Example:
      >>> adapter = vblora(rank=2, num_vectors=6, vector_length=2)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 8)))
      >>> s["logits_a"].shape, s["logits_b"].shape
      ((2, 2, 6), (2, 4, 6))
    """
    check_rank(rank)
    if not 1 <= topk <= num_vectors:
        raise ValueError(f"topk must be from 1 to {num_vectors} vectors, got {topk}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        out, keys = {}, jax.random.split(key)
        for name, size, own in zip("ab", w.shape, keys, strict=True):
            if size % vector_length:
                raise ValueError(
                    f"vector_length={vector_length} does not divide the sides of a "
                    f"weight {list(w.shape)}"
                )
            shape = (rank, size // vector_length, num_vectors)
            drawn = jax.random.normal(own, shape, wide(w))
            out[f"logits_{name}"] = logits_std * drawn
        return out

    def shared(key: Array, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        del sizes
        shape, limit = (num_vectors, vector_length), bank_bound
        drawn = jax.random.uniform(key, shape, jnp.float32, -limit, limit)
        return {"bank": drawn}

    def factors(s: dict[str, Any]) -> tuple[Array, Array]:
        bank = s["bank"].astype(s["logits_a"].dtype)
        return mixed(s["logits_a"], bank, topk).T, mixed(s["logits_b"], bank, topk)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = factors(s)
        return plus(x @ w, (x @ like(a, x)) @ like(b, x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        a, b = factors(s)
        return plus(w, a @ b)

    options = (("rank", rank), ("num_vectors", num_vectors))
    options += (("vector_length", vector_length), ("topk", topk))
    options += (("bank_bound", bank_bound), ("logits_std", logits_std))
    config = ("vblora", *options)
    return Adapter(init, apply, merge, shared=shared, config=config)


def mixed(logits: Array, bank: Array, topk: int) -> Array:
    """The vectors `[r, parts * b]` of `logits [r, parts, h]` and a bank `[h, b]`."""
    weights, chosen = topk_weights(logits, topk)
    parts = jnp.einsum("...k,...kb->...b", weights, bank[chosen])
    return parts.reshape(logits.shape[0], -1)


def topk_weights(logits: Array, topk: int) -> tuple[Array, Array]:
    """The k largest logits after a softmax among them, and where they are."""
    largest, chosen = jax.lax.top_k(logits, topk)
    return jax.nn.softmax(largest, axis=-1), chosen
