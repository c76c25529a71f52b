"""Decoders of the Llama kind: Llama, Mistral, Qwen2, Qwen3."""

from typing import Any

from jaxtyping import Array, Float, Int
import numpy as np

from ..types import Params
from ._config import Config, architecture, evenly, read, refused
from ._layers import (
    ACTIVATIONS,
    Shapes,
    Weights,
    attention,
    checked,
    linear,
    linear_shapes,
    padding,
    rms_norm,
)
from ._rope import frequencies, rotate, tables

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_FIELDS = {
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_WINDOWS = {
    "layer_types": None,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, **_WINDOWS},
    "qwen3": {
        "num_key_value_heads": 32,
        "attention_bias": False,
        **_WINDOWS,
        "head_dim": 128,
    },
}
KINDS = tuple(_KINDS)


def llama(
    params: Params,
    tokens: Int[Array, "b s"],
    mask: Array | None = None,
    *,
    config: Config,
) -> Float[Array, "b s m"]:
    r"""A decoder of the Llama kind, as a function of its checkpoint.

    Causal attention with rotary positions, grouped key-value heads, RMS norms before
    each block, gated feed-forward layers.

    Args:
      params: the state dict of a Llama, Mistral, Qwen2 or Qwen3 model, with the names
        and layouts of the file, nested as `io.load` returns it or flat.
      tokens: `[b, s]` token ids.
      mask: `[b, s]`, 0 where a token is padding. None: there is none.
      config: the fields of the model's config.json.

    Returns:
      `[b, s, vocabulary]` logits of a `*ForCausalLM`, `[b, s, n]` hidden states of a
      `*Model`, in the dtype of the params.

    Raises:
      ValueError: a config field is missing, unknown or not supported, or a tensor is
        missing, left over or of another shape; names it.

    Degenerate inputs:
      A query that may see no key sees all of them equally.

    References:
      Touvron et al., 2023, "LLaMA", https://arxiv.org/abs/2302.13971, Section 2.3;
      Ainslie et al., 2023, "GQA", https://arxiv.org/abs/2305.13245.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import nn
      >>> sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
      >>> sizes |= {"num_attention_heads": 2, "vocab_size": 5, "model_type": "llama"}
      >>> config = {"architectures": ["LlamaForCausalLM"], **sizes}
      >>> params = {n: jnp.ones(s.shape) for n, s in nn.shapes(config).items()}
      >>> llama(params, jnp.zeros((1, 3), int), config=config).shape
      (1, 3, 5)
    """
    c = fields(config)
    w = checked(params, shapes(config))
    at, length = c["prefix"], tokens.shape[1]
    turn = tables(frequencies(config, c, c["d"]), length)
    row, column = np.arange(length)[:, None], np.arange(length)[None, :]
    x = w[f"{at}embed_tokens.weight"][tokens]
    for i, window in enumerate(c["windows"]):
        seen = (column <= row) & (column > row - (window or length))
        seen = seen[None, None, None]
        seen = seen if mask is None else padding(mask) & seen
        layer, eps = f"{at}layers.{i}", c["rms_norm_eps"]
        y = rms_norm(w, f"{layer}.input_layernorm", x, eps=eps)
        x = x + _attend(w, f"{layer}.self_attn", y, c, turn, seen)
        y = rms_norm(w, f"{layer}.post_attention_layernorm", x, eps=eps)
        gate = ACTIVATIONS[c["hidden_act"]](linear(w, f"{layer}.mlp.gate_proj", y))
        up = linear(w, f"{layer}.mlp.up_proj", y)
        x = x + linear(w, f"{layer}.mlp.down_proj", gate * up)
    x = rms_norm(w, f"{at}norm", x, eps=c["rms_norm_eps"])
    if not at:
        return x
    tied = c["tie_word_embeddings"]
    return linear(w, "model.embed_tokens" if tied else "lm_head", x)


def _attend(
    w: Weights, name: str, x: Array, c: Config, turn: tuple[Any, Any], seen: Any
) -> Array:
    """Grouped attention with rotary positions."""
    b, s, _ = x.shape
    g, d = c["num_key_value_heads"], c["d"]
    q = linear(w, f"{name}.q_proj", x).reshape(b, s, g, -1, d)
    k = linear(w, f"{name}.k_proj", x).reshape(b, s, g, d)
    v = linear(w, f"{name}.v_proj", x).reshape(b, s, g, d)
    if f"{name}.q_norm.weight" in w:
        q = rms_norm(w, f"{name}.q_norm", q, eps=c["rms_norm_eps"])
        k = rms_norm(w, f"{name}.k_norm", k, eps=c["rms_norm_eps"])
    return linear(
        w, f"{name}.o_proj", attention(rotate(q, *turn), rotate(k, *turn), v, seen)
    )


def fields(config: Config) -> dict[str, Any]:
    """What a config of the Llama kind says, checked, with what follows from it."""
    kind = config["model_type"]
    c = read(config, _SIZES, {**_FIELDS, **_KINDS[kind]})
    whole, bare = f"{kind.capitalize()}ForCausalLM", f"{kind.capitalize()}Model"
    c["prefix"] = "model." if architecture(config, (whole, bare)) == whole else ""
    c["num_key_value_heads"] = c["num_key_value_heads"] or c["num_attention_heads"]
    evenly(c, "num_attention_heads", "num_key_value_heads")
    c["d"] = c["head_dim"] or evenly(c, "hidden_size", "num_attention_heads")
    if c["hidden_act"] not in ACTIVATIONS:
        raise refused(config, "hidden_act")
    c["windows"] = _windows(config, c)
    return c


def _windows(config: Config, c: dict[str, Any]) -> list[int | None]:
    """How far back each layer sees; None: to the first token."""
    count, width = c["num_hidden_layers"], c.get("sliding_window")
    if not c.get("use_sliding_window", True):
        width = None
    if (kinds := c.get("layer_types")) is not None:
        known = {"full_attention", "sliding_attention"}
        if len(kinds) != count or set(kinds) - known:
            raise refused(config, "layer_types")
        return [width if kind == "sliding_attention" else None for kind in kinds]
    first = c.get("max_window_layers", 0)
    return [width if i >= first else None for i in range(count)]


def shapes(config: Config) -> Shapes:
    """The tensors of a checkpoint, by name."""
    c = fields(config)
    n, d, at = c["hidden_size"], c["d"], c["prefix"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    kind = config["model_type"]
    bias = c.get("attention_bias", kind == "qwen2")
    out: Shapes = {f"{at}embed_tokens.weight": (c["vocab_size"], n)}
    for i in range(c["num_hidden_layers"]):
        layer = f"{at}layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        out[f"{layer}.input_layernorm.weight"] = (n,)
        for name, m in (("q", q), ("k", kv), ("v", kv)):
            out |= linear_shapes(f"{attn}.{name}_proj", n, m, bias=bias)
        out |= linear_shapes(f"{attn}.o_proj", q, n, bias=bias and kind != "qwen2")
        if kind == "qwen3":
            out |= dict.fromkeys((f"{attn}.{x}_norm.weight" for x in "qk"), (d,))
        out[f"{layer}.post_attention_layernorm.weight"] = (n,)
        bent, inner = bool(c.get("mlp_bias")), c["intermediate_size"]
        for name in ("gate", "up"):
            out |= linear_shapes(f"{mlp}.{name}_proj", n, inner, bias=bent)
        out |= linear_shapes(f"{mlp}.down_proj", inner, n, bias=bent)
    out[f"{at}norm.weight"] = (n,)
    if at and not c["tie_word_embeddings"]:
        out["lm_head.weight"] = (c["vocab_size"], n)
    return out
