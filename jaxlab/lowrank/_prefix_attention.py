"""Prefix tuning as a gated adapter of each head, and MAM: He et al., 2021."""

import math

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._adapters import DESIGNS, modify, scaled_parallel
from ._prompt import Prompt, prefix_tuning
from ._rank import wide


def prefix_attention(
    q: Array,
    k: Array,
    v: Array,
    keys: Array,
    values: Array,
    *,
    mask: Array | None = None,
) -> Array:
    r"""Attention behind a prefix, as an adapter of each head with a gate.

    Attention over $[P_k; K]$, $[P_v; V]$ is, by head,
    $(1 - \lambda(q)) \mathrm{Attn}(q, K, V) +
    \lambda(q) \mathrm{softmax}(q P_k^\top) P_v$ with
    $\lambda(q) = \sum_i e^{(q P_k^\top)_i} / (\sum_i e^{(q P_k^\top)_i} +
    \sum_j e^{(q K^\top)_j})$, which is how it is computed: nothing gets longer.

    Args:
      q: `[..., s, heads, e]`; the logits are divided by the root of e.
      k: `[..., t, heads, e]`.
      v: `[..., t, heads, e]`.
      keys: $P_k$ `[p, heads, e]`, of one layer of `prefix_tuning`.
      values: $P_v$, likewise.
      mask: what a query may see, `[..., s, t]`; of the prefix it sees all.

    Returns:
      `[..., s, heads, e]`, in the dtype of q.

    Raises:
      ValueError: shapes that do not fit.

    Degenerate inputs:
      A query that may see no position sees the prefix alone.

    References:
      He et al., 2021, "Towards a Unified View of Parameter-Efficient Transfer
      Learning", https://arxiv.org/abs/2110.04366, equations 5 to 7.

    Example:
      >>> x, prefix = jnp.ones((5, 3, 4)), jnp.zeros((5, 3, 4))
      >>> bool((prefix_attention(x, x, x, x, prefix) == 0.5).all())
      True
    """
    heads = (-2, -2, -2, 1, 1, None)
    return jax.vmap(_head, heads, -2)(q, k, v, keys, values, mask)


def mam(
    *,
    layers: int,
    heads: int,
    dim: int,
    length: int = 30,
    size: int | None = 800,
    rank: int = 512,
    scale: float = 4.0,
) -> dict[str, Prompt | Adapter]:
    """The mix-and-match adapter: a short prefix and a wide scaled parallel adapter.

    Args:
      layers: of the model.
      heads: of its attention.
      dim: of its hidden representation.
      length: p, of each layer's prefix.
      size: of the network that makes the prefixes in training; None for none.
      rank: r, of the adapter of each feed-forward.
      scale: s, of that adapter.

    Returns:
      `{"attention": prefix_tuning(...), "ffn": scaled_parallel(...)}`: the first for
      the model's keys and values, the second for `attach` or `modify`.

    Raises:
      ValueError: a length or rank below 1.

    References:
      He et al., 2021, https://arxiv.org/abs/2110.04366, section 4.6.

    Example:
      >>> parts = mam(layers=2, heads=2, dim=8, length=3, rank=4)
      >>> keys, _ = parts["attention"].apply(parts["attention"].init(jax.random.key(0)))
      >>> keys.shape
      (2, 3, 2, 4)
    """
    prefix = prefix_tuning(
        length=length, layers=layers, heads=heads, dim=dim, size=size
    )
    return {"attention": prefix, "ffn": scaled_parallel(rank=rank, scale=scale)}


def _head(
    q: Array, k: Array, v: Array, keys: Array, values: Array, mask: Array | None
) -> Array:
    """One head: `q [..., s, e]`, `k` and `v [..., t, e]`, a prefix `[p, e]`."""
    dtype = q.dtype
    q, k, v, keys, values = (x.astype(wide(x)) for x in (q, k, v, keys, values))
    q = q / math.sqrt(q.shape[-1])
    logits = q @ k.swapaxes(-1, -2)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    h = jax.nn.softmax(logits) @ v
    ahead = jax.nn.logsumexp(q @ keys.T, axis=-1, keepdims=True)
    gate = jax.nn.sigmoid(ahead - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    s = {"down": keys.T, "up": values}
    return modify(q, h, s, design=DESIGNS["prefix"], gate=gate).astype(dtype)
