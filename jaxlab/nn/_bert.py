"""Encoders of the BERT kind: BERT, MiniLM, RoBERTa and their heads."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..types import Params
from ._config import Config, architecture, evenly, labels, read, refused
from ._layers import (
    ACTIVATIONS,
    Shapes,
    Weights,
    checked,
    layer_norm,
    like,
    linear,
    linear_shapes,
    norm_shapes,
    padding,
    self_attention,
)

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_FIELDS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "type_vocab_size": 2,
}
_ROBERTA = {"pad_token_id": 1}
_STEMS = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForPreTraining",
)
KINDS = tuple(_STEMS)


def bert(
    params: Params,
    tokens: Int[Array, "b s"],
    mask: Array | None = None,
    types: Int[Array, "b s"] | None = None,
    *,
    config: Config,
) -> Any:
    r"""An encoder of the BERT kind, as a function of its checkpoint.

    Bidirectional attention, layer norms after each block; the head is the one that
    `architectures` names.

    Args:
      params: the state dict of a BERT, MiniLM or (XLM-)RoBERTa model, with the names
        and layouts of the file, nested as `io.load` returns it or flat.
      tokens: `[b, s]` token ids.
      mask: `[b, s]`, 0 where a token is padding. None: there is none.
      types: `[b, s]` segment ids. None: all 0.
      config: the fields of the model's config.json.

    Returns:
      `*Model`: (`[b, s, n]` hidden states, `[b, n]` pooled), or the former alone where
      there is no pooler. `*ForMaskedLM`: `[b, s, vocabulary]` logits;
      `*ForPreTraining`: those and `[b, 2]` of the next sentence.
      `*ForSequenceClassification`: `[b, labels]`; `*ForTokenClassification`:
      `[b, s, labels]`. In the dtype of the params.

    Raises:
      ValueError: a config field is missing, unknown or not supported, or a tensor is
        missing, left over or of another shape; names it.

    Degenerate inputs:
      A row of padding alone sees all of it.

    References:
      Devlin et al., 2018, "BERT", https://arxiv.org/abs/1810.04805, Section 3; Liu et
      al., 2019, "RoBERTa", https://arxiv.org/abs/1907.11692.

    Example:
      >>> from jaxlab import nn
      >>> sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
      >>> sizes |= {"num_attention_heads": 2, "vocab_size": 5, "model_type": "bert"}
      >>> config = {"architectures": ["BertForMaskedLM"], **sizes}
      >>> params = {n: jnp.ones(s.shape) for n, s in nn.shapes(config).items()}
      >>> bert(params, jnp.zeros((1, 3), int), config=config).shape
      (1, 3, 5)
    """
    c = fields(config)
    w = checked(params, shapes(config), optional(config))
    at, eps = c["prefix"], c["layer_norm_eps"]
    x = _embed(w, tokens, types, c)
    seen = None if mask is None else padding(mask)
    for i in range(c["num_hidden_layers"]):
        layer = f"{at}encoder.layer.{i}"
        one, two = f"{layer}.attention", f"{layer}.output"
        names = [f"{one}.self.{n}" for n in ("query", "key", "value")]
        y = self_attention(w, names, x, c["num_attention_heads"], seen)
        y = x + linear(w, f"{one}.output.dense", y)
        x = layer_norm(w, f"{one}.output.LayerNorm", y, eps=eps)
        y = ACTIVATIONS[c["hidden_act"]](linear(w, f"{layer}.intermediate.dense", x))
        y = x + linear(w, f"{two}.dense", y)
        x = layer_norm(w, f"{two}.LayerNorm", y, eps=eps)
    return _head(w, x, c)


def _embed(w: Weights, tokens: Array, types: Array | None, c: Config) -> Array:
    """Words, positions and segments, added and normalised."""
    at = f"{c['prefix']}embeddings"
    types = jnp.zeros_like(tokens) if types is None else types
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    if "pad_token_id" in c:  # RoBERTa counts real tokens, from behind the padding's id
        real = (tokens != c["pad_token_id"]).astype(tokens.dtype)
        where = jnp.cumsum(real, 1) * real + c["pad_token_id"]
    x = w[f"{at}.word_embeddings.weight"][tokens]
    x = x + w[f"{at}.token_type_embeddings.weight"][types]
    x = x + w[f"{at}.position_embeddings.weight"][where]
    return layer_norm(w, f"{at}.LayerNorm", x, eps=c["layer_norm_eps"])


def _head(w: Weights, x: Array, c: dict[str, Any]) -> Any:
    """What the architecture makes of the hidden states."""
    head, at, eps = c["head"], c["prefix"], c["layer_norm_eps"]
    pooler, roberta = f"{at}pooler.dense", "pad_token_id" in c
    pooled = lambda: jnp.tanh(linear(w, pooler, x[:, 0]))
    if head == "Model":
        return (x, pooled()) if f"{pooler}.weight" in w else x
    if head == "ForTokenClassification":
        return linear(w, "classifier", x)
    if head == "ForSequenceClassification":
        if roberta:
            y = jnp.tanh(linear(w, "classifier.dense", x[:, 0]))
            return linear(w, "classifier.out_proj", y)
        return linear(w, "classifier", pooled())
    dense, norm, bias = _lm_head(c)
    y = linear(w, dense, x)
    y = ACTIVATIONS["gelu" if roberta else c["hidden_act"]](y)
    y = layer_norm(w, norm, y, eps=eps)
    y = linear(w, f"{at}embeddings.word_embeddings", y)
    y = y + like(w[bias], y)
    return (
        y if head == "ForMaskedLM" else (y, linear(w, "cls.seq_relationship", pooled()))
    )


def _lm_head(c: Config) -> tuple[str, str, str]:
    """The names of the dense layer, the norm and the bias before the vocabulary."""
    if "pad_token_id" in c:
        return "lm_head.dense", "lm_head.layer_norm", "lm_head.bias"
    at = "cls.predictions"
    return f"{at}.transform.dense", f"{at}.transform.LayerNorm", f"{at}.bias"


def fields(config: Config) -> dict[str, Any]:
    """What a config of the BERT kind says, checked, with what follows from it."""
    kind = config["model_type"]
    c = read(config, _SIZES, _FIELDS | (_ROBERTA if kind != "bert" else {}))
    heads = _HEADS if kind == "bert" else _HEADS[:-1]
    found = architecture(config, [_STEMS[kind] + head for head in heads])
    c["head"] = found.removeprefix(_STEMS[kind])
    stem = "bert" if kind == "bert" else "roberta"
    c["prefix"] = "" if c["head"] == "Model" else f"{stem}."
    evenly(c, "hidden_size", "num_attention_heads")
    if c["hidden_act"] not in ACTIVATIONS:
        raise refused(config, "hidden_act")
    if not c["tie_word_embeddings"] and c["head"] in ("ForMaskedLM", "ForPreTraining"):
        raise refused(config, "tie_word_embeddings")
    return c


def shapes(config: Config) -> Shapes:
    """The tensors of a checkpoint, by name."""
    c = fields(config)
    n, at = c["hidden_size"], c["prefix"]
    rows = {
        "word": c["vocab_size"],
        "position": c["max_position_embeddings"],
        "token_type": c["type_vocab_size"],
    }
    out = {f"{at}embeddings.{k}_embeddings.weight": (m, n) for k, m in rows.items()}
    out |= norm_shapes(f"{at}embeddings.LayerNorm", n)
    for i in range(c["num_hidden_layers"]):
        layer, inner = f"{at}encoder.layer.{i}", c["intermediate_size"]
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            out |= linear_shapes(f"{layer}.attention.{name}", n, n)
        out |= norm_shapes(f"{layer}.attention.output.LayerNorm", n)
        out |= linear_shapes(f"{layer}.intermediate.dense", n, inner)
        out |= linear_shapes(f"{layer}.output.dense", inner, n)
        out |= norm_shapes(f"{layer}.output.LayerNorm", n)
    return out | _head_shapes(config, c)


def _head_shapes(config: Config, c: dict[str, Any]) -> Shapes:
    n, head, roberta = c["hidden_size"], c["head"], "pad_token_id" in c
    out: Shapes = {}
    if head == "ForPreTraining" or (
        head == "ForSequenceClassification" and not roberta
    ):
        out |= linear_shapes(f"{c['prefix']}pooler.dense", n, n)
    if head in ("ForMaskedLM", "ForPreTraining"):
        dense, norm, bias = _lm_head(c)
        out |= linear_shapes(dense, n, n) | norm_shapes(norm, n)
        out[bias] = (c["vocab_size"],)
    if head == "ForPreTraining":
        out |= linear_shapes("cls.seq_relationship", n, 2)
    name = "classifier"
    if head == "ForSequenceClassification" and roberta:
        out |= linear_shapes(f"{name}.dense", n, n)
        name = f"{name}.out_proj"
    if head.endswith("Classification"):
        out |= linear_shapes(name, n, labels(config))
    return out


def optional(config: Config) -> Shapes:
    """The tensors that a checkpoint may have or lack."""
    c = fields(config)
    n = c["hidden_size"]
    return linear_shapes("pooler.dense", n, n) if c["head"] == "Model" else {}
