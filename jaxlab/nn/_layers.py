"""Layers of state dicts: torch's names and layouts, `weight [out, in]`."""

from collections.abc import Callable, Mapping, Sequence
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from .. import tree
from ..types import Params

Weights = Mapping[str, Array]
"""A checkpoint's tensors by dotted name."""

Shapes = dict[str, tuple[int, ...]]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": ft.partial(jax.nn.gelu, approximate=False),
    "gelu_new": ft.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": ft.partial(jax.nn.gelu, approximate=True),
}

_BUFFERS = ("position_ids", "rotary_emb.inv_freq", "num_batches_tracked")


def is_buffer(name: str) -> bool:
    """Does a state dict hold this tensor though no forward reads it?"""
    return name.endswith(_BUFFERS)


def named(params: Params) -> dict[str, Array]:
    """The leaves by dotted name, of nested dicts or of a flat one."""
    names = (path.replace("/", ".") for path in tree.paths(params))
    return dict(zip(names, jax.tree.leaves(params), strict=True))


def checked(params: Params, due: Shapes, optional: Shapes | None = None) -> Weights:
    """The weights by name, after a check against the shapes that a config implies.

    Raises:
      ValueError: a tensor is missing, left over or of another shape; names it.
    """
    weights, known = named(params), {**(optional or {}), **due}
    for name in due:
        if name not in weights:
            raise ValueError(f"params has no tensor {name!r}, which the config implies")
    for name, leaf in weights.items():
        if name not in known:
            if is_buffer(name):
                continue
            raise ValueError(f"params has {name!r}, which the config does not imply")
        if tuple(leaf.shape) != known[name]:
            raise ValueError(
                f"{name!r} has shape {tuple(leaf.shape)}, the config implies "
                f"{known[name]}"
            )
    return weights


def linear_shapes(name: str, n: int, m: int, *, bias: bool = True) -> Shapes:
    """The tensors of a linear layer from n to m."""
    return {f"{name}.weight": (m, n)} | ({f"{name}.bias": (m,)} if bias else {})


def norm_shapes(name: str, n: int) -> Shapes:
    """The tensors of a layer norm."""
    return {f"{name}.weight": (n,), f"{name}.bias": (n,)}


def linear(w: Weights, name: str, x: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
    """A linear layer, with a bias where the weights have one."""
    y = jnp.einsum("...n,mn->...m", x, w[f"{name}.weight"])
    bias = w.get(f"{name}.bias")
    return y if bias is None else y + like(bias, y)


def like(v: Any, x: Float[Array, "*b n"]) -> Float[Array, "*#b n"]:
    """A vector along the last axis of x, in its dtype."""
    return jnp.asarray(v).astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def layer_norm(
    w: Weights, name: str, x: Float[Array, "*b n"], *, eps: float
) -> Float[Array, "*b n"]:
    """A layer norm over the last axis, in at least float32."""
    y = tree.widen(x)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    y = y * like(w[f"{name}.weight"], y) + like(w[f"{name}.bias"], y)
    return y.astype(x.dtype)


def rms_norm(
    w: Weights, name: str, x: Float[Array, "*b n"], *, eps: float
) -> Float[Array, "*b n"]:
    """A root-mean-square norm over the last axis, in at least float32."""
    y = tree.widen(x)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y.astype(x.dtype) * like(w[f"{name}.weight"], x)


def attention(
    q: Float[Array, "b s g h d"],
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g d"],
    mask: Bool[Array, "#b 1 1 #s s"] | np.ndarray | None = None,
) -> Float[Array, "b s _"]:
    """Softmax attention of h query heads to each of g key and value heads.

    The softmax is taken in at least float32. A query that may see nothing sees all.
    """
    scores = tree.widen(jnp.einsum("bqghd,bkgd->bghqk", q, k)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    seen = jax.nn.softmax(scores, -1).astype(v.dtype)
    out = jnp.einsum("bghqk,bkgd->bqghd", seen, v)
    return out.reshape(*out.shape[:2], -1)


def self_attention(
    w: Weights,
    names: Sequence[str],
    x: Float[Array, "b s n"],
    heads: int,
    mask: Bool[Array, "b 1 1 1 s"] | None = None,
) -> Float[Array, "b s n"]:
    """Attention of every position to all, by the projections named for q, k and v."""
    split = lambda y: y.reshape(*y.shape[:2], heads, -1)
    q, k, v = (split(linear(w, name, x)) for name in names)
    return attention(q[:, :, :, None], k, v, mask)


def padding(mask: Array) -> Bool[Array, "b 1 1 1 s"]:
    """A mask of tokens `[b, s]`, 0 where they are padding, for `attention`."""
    return (mask != 0)[:, None, None, None, :]
