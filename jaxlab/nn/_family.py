"""Which family a config names."""

from collections.abc import Callable
import functools as ft
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..types import Apply
from . import _bert, _llama, _vit
from ._config import Config, load
from ._layers import Shapes


class _Family(NamedTuple):
    """What a family tells of a config."""

    forward: Apply
    shapes: Callable[[Config], Shapes]
    inputs: Callable[[Config], tuple[jax.ShapeDtypeStruct, ...]]


def _tokens(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Two short texts, as shapes."""
    del config
    return (jax.ShapeDtypeStruct((2, 5), jnp.int32),)


_FAMILIES = (
    dict.fromkeys(_llama.KINDS, _Family(_llama.llama, _llama.shapes, _tokens))
    | dict.fromkeys(_bert.KINDS, _Family(_bert.bert, _bert.shapes, _tokens))
    | dict.fromkeys(_vit.KINDS, _Family(_vit.vit, _vit.shapes, _vit.inputs))
)


def from_config(config: Config | str | Path) -> Apply:
    """The forward of a Hugging Face model, from its config alone.

    With the tensors as `io.load` reads them this is the whole model: no conversion, no
    other layout, no other names.

    Args:
      config: the fields of a config.json, or the path of it or of its folder.

    Returns:
      `apply(params, *inputs)`: `llama`, `bert` or `vit` with the config bound.

    Raises:
      ValueError: the config is of no family here, or has a field that is missing,
        unknown or not supported; names it.
      OSError: the file cannot be read.

    Example:
      >>> from_config({"model_type": "t5"})
      Traceback (most recent call last):
      ValueError: config: 'model_type' must be one of ['bert', ...], got 't5'
    """
    found = load(config)
    family = _family(found)
    family.shapes(found)
    return ft.partial(family.forward, config=found)


def shapes(config: Config | str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The tensors that a config implies, by the names of the checkpoint.

    Args:
      config: as for `from_config`.

    Returns:
      Shapes by dotted name, as float32. A pooler that may be absent is not listed.

    Raises:
      ValueError: as `from_config`.

    Example:
      >>> sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
      >>> sizes |= {"num_attention_heads": 2, "vocab_size": 5, "model_type": "llama"}
      >>> shapes({"architectures": ["LlamaModel"], **sizes})["norm.weight"].shape
      (4,)
    """
    found = load(config)
    due = _family(found).shapes(found)
    return {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in due.items()}


def inputs(config: Config | str | Path) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Inputs that a model of this config takes, as shapes: enough to trace it.

    Args:
      config: as for `from_config`.

    Returns:
      `[2, 5]` tokens, or two images.

    Raises:
      ValueError: as `from_config`.

    Example:
      >>> config = {"model_type": "vit", "architectures": ["ViTModel"]}
      >>> sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
      >>> inputs({**config, **sizes, "num_attention_heads": 2})[0].shape
      (2, 3, 224, 224)
    """
    found = load(config)
    return _family(found).inputs(found)


def _family(config: Config) -> _Family:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise ValueError(
            f"config: 'model_type' must be one of {sorted(_FAMILIES)}, got {kind!r}"
        )
    return _FAMILIES[kind]
