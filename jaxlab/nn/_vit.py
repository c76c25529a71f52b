"""Vision transformers as Hugging Face stores them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params
from ._config import Config, architecture, evenly, labels, read, refused
from ._layers import (
    ACTIVATIONS,
    Shapes,
    checked,
    layer_norm,
    like,
    linear,
    linear_shapes,
    norm_shapes,
    self_attention,
)

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_FIELDS = {
    "hidden_act": "gelu",
    "image_size": 224,
    "layer_norm_eps": 1e-12,
    "num_channels": 3,
    "patch_size": 16,
    "pooler_act": "tanh",
    "pooler_output_size": None,
    "qkv_bias": True,
}
_HEADS = ("ViTModel", "ViTForImageClassification")
KINDS = ("vit",)


def vit(params: Params, images: Float[Array, "b c h w"], *, config: Config) -> Any:
    r"""A vision transformer, as a function of its checkpoint.

    Patches by a convolution, a class token, learned positions, layer norms before each
    block and one at the end.

    Args:
      params: the state dict of a Hugging Face ViT, with the names and layouts of the
        file, nested as `io.load` returns it or flat.
      images: `[b, channels, h, w]` of the size that the config says, normalised as the
        model wants them.
      config: the fields of the model's config.json.

    Returns:
      `ViTForImageClassification`: `[b, labels]` logits. `ViTModel`: (`[b, s, n]` hidden
      states, `[b, n]` pooled), or the former alone where there is no pooler. In the
      dtype of the params.

    Raises:
      ValueError: a config field is missing, unknown or not supported, or a tensor is
        missing, left over or of another shape, or the images are; names it.

    References:
      Dosovitskiy et al., 2020, "An Image is Worth 16x16 Words",
      https://arxiv.org/abs/2010.11929, Section 3.1.

    Example:
      >>> from jaxlab import nn
      >>> sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
      >>> sizes |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
      >>> config = {"model_type": "vit", "architectures": ["ViTModel"], **sizes}
      >>> params = {n: jnp.ones(s.shape) for n, s in nn.shapes(config).items()}
      >>> vit(params, jnp.ones((2, 3, 8, 8)), config=config).shape
      (2, 5, 4)
    """
    c = fields(config)
    w = checked(params, shapes(config), optional(config))
    at, eps = c["prefix"], c["layer_norm_eps"]
    due = (c["num_channels"], *_pair(config, "image_size"))
    if images.shape[1:] != due:
        raise ValueError(f"images must be [b, {due}], got {images.shape}")
    patches = f"{at}embeddings.patch_embeddings.projection"
    x = jax.lax.conv_general_dilated(
        images.astype(w[f"{patches}.weight"].dtype),
        w[f"{patches}.weight"],
        _pair(config, "patch_size"),
        "VALID",
        dimension_numbers=("NCHW", "OIHW", "NHWC"),
    )
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    x = x + like(w[f"{patches}.bias"], x)
    first = w[f"{at}embeddings.cls_token"]
    first = jnp.broadcast_to(first, (x.shape[0], 1, x.shape[-1]))
    x = jnp.concatenate([first, x], 1) + w[f"{at}embeddings.position_embeddings"]
    for i in range(c["num_hidden_layers"]):
        layer = f"{at}encoder.layer.{i}"
        y = layer_norm(w, f"{layer}.layernorm_before", x, eps=eps)
        one = f"{layer}.attention"
        names = [f"{one}.attention.{n}" for n in ("query", "key", "value")]
        y = self_attention(w, names, y, c["num_attention_heads"])
        x = x + linear(w, f"{one}.output.dense", y)
        y = layer_norm(w, f"{layer}.layernorm_after", x, eps=eps)
        y = ACTIVATIONS[c["hidden_act"]](linear(w, f"{layer}.intermediate.dense", y))
        x = x + linear(w, f"{layer}.output.dense", y)
    x = layer_norm(w, f"{at}layernorm", x, eps=eps)
    if c["head"] != "ViTModel":
        return linear(w, "classifier", x[:, 0])
    if "pooler.dense.weight" not in w:
        return x
    return x, ACTIVATIONS[c["pooler_act"]](linear(w, "pooler.dense", x[:, 0]))


def fields(config: Config) -> dict[str, Any]:
    """What a ViT's config says, checked, with what follows from it."""
    c = read(config, _SIZES, _FIELDS)
    c["head"] = architecture(config, _HEADS)
    c["prefix"] = "" if c["head"] == "ViTModel" else "vit."
    evenly(c, "hidden_size", "num_attention_heads")
    for name in ("hidden_act", "pooler_act"):
        if c[name] not in ACTIVATIONS:
            raise refused(config, name)
    return c


def _pair(config: Config, name: str) -> tuple[int, int]:
    """A size of both sides, or of each."""
    value = config.get(name, _FIELDS[name])
    one, two = value if isinstance(value, list | tuple) else (value, value)
    return one, two


def inputs(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Two images, as shapes."""
    shape = (2, fields(config)["num_channels"], *_pair(config, "image_size"))
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)


def shapes(config: Config) -> Shapes:
    """The tensors of a checkpoint, by name."""
    c = fields(config)
    n, at = c["hidden_size"], c["prefix"]
    whole, patch = _pair(config, "image_size"), _pair(config, "patch_size")
    tokens = (whole[0] // patch[0]) * (whole[1] // patch[1]) + 1
    patches = f"{at}embeddings.patch_embeddings.projection"
    out: Shapes = {
        f"{at}embeddings.cls_token": (1, 1, n),
        f"{at}embeddings.position_embeddings": (1, tokens, n),
        f"{patches}.weight": (n, c["num_channels"], *patch),
        f"{patches}.bias": (n,),
    }
    for i in range(c["num_hidden_layers"]):
        layer, inner = f"{at}encoder.layer.{i}", c["intermediate_size"]
        for name in ("query", "key", "value"):
            full = f"{layer}.attention.attention.{name}"
            out |= linear_shapes(full, n, n, bias=c["qkv_bias"])
        out |= linear_shapes(f"{layer}.attention.output.dense", n, n)
        out |= linear_shapes(f"{layer}.intermediate.dense", n, inner)
        out |= linear_shapes(f"{layer}.output.dense", inner, n)
        for name in ("before", "after"):
            out |= norm_shapes(f"{layer}.layernorm_{name}", n)
    out |= norm_shapes(f"{at}layernorm", n)
    if at:
        out |= linear_shapes("classifier", n, labels(config))
    return out


def optional(config: Config) -> Shapes:
    """The tensors that a checkpoint may have or lack."""
    c = fields(config)
    n, m = c["hidden_size"], c["pooler_output_size"] or c["hidden_size"]
    return linear_shapes("pooler.dense", n, m) if c["head"] == "ViTModel" else {}
