"""What one type of PEFT's adapters is to us: its options, its tensors, our state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..types import Adapter

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]


class Layer(NamedTuple):
    """One adapted layer: PEFT's module name, and the sides of its matrix [n, m]."""

    path: str
    n: int
    m: int
    peers: tuple[tuple[str, int, int], ...] = ()
    """(path, n, m) of all adapted layers in the model's order, itself among them: for
    what is drawn once for all of them; empty where only one is known."""


class Kind(NamedTuple):
    """One `peft_type`."""

    name: str
    """As `adapter_config.json` spells it: "LORA"."""
    adapter: Callable[[Config, Layer], Adapter]
    """The fields, defaults and patterns applied -> our adapter of this layer."""
    read: Callable[[Tensors, Config, Layer], dict[str, Any]]
    """PEFT's tensors of a layer, by their name behind the module's, those of the model
    among them -> all of our `s`: trained, fixed, shared."""
    write: Callable[[dict[str, Any], Config, Layer], Tensors]
    """The inverse of `read`."""
    fields: Callable[[Adapter], Config]
    """Our adapter -> the fields that make it; the inverse of `adapter`."""
    implements: frozenset[str]
    """The fields that may hold any value; every other one must hold its default."""
    common: tuple[str, ...] = ()
    """The entries of `s` that all layers share."""
    common_tensors: tuple[str, ...] = ()
    """PEFT's names of the tensors that the model has once; "name" stands for
    "name.0", "name.1"... too."""
