"""The function that a checkpoint's tensors are the parameters of."""

from collections.abc import Callable, Sequence
import importlib
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import nn
from ._checkpoint import Checkpoint

_INPUT = re.compile(r"([a-z]+[0-9]*)\[([0-9]+(?:,[0-9]+)*)?\]")


class Forward(NamedTuple):
    """`apply(params, *inputs)`, and the shapes of inputs to trace it with."""

    apply: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]


def known(checkpoint: Checkpoint) -> Forward:
    """The forward that the config.json of a model names.

    Raises:
      ValueError: there is no config, or none that is known; names the model.
    """
    if checkpoint.config is None:
        raise ValueError(
            f"{checkpoint.path} has no config.json that says which model it is; name "
            "a forward and its inputs"
        )
    try:
        config = dict(checkpoint.config)
        return Forward(nn.from_config(config), nn.inputs(config))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def chosen(
    config: Path | None, name: str | None, inputs: Sequence[str]
) -> Forward | None:
    """The forward that a config or a dotted name says; None where neither is given.

    Raises:
      ValueError: both are given, or inputs without a forward or the other way round.
    """
    if name is None and inputs:
        raise ValueError("inputs are those of a forward: name it (--forward)")
    if name is not None and config is not None:
        raise ValueError("either a config or a forward, not both")
    if name is not None:
        if not inputs:
            raise ValueError(f"{name} needs its inputs (--input float32[2,32,32,3])")
        return named(name, inputs, ours=False)
    if config is None:
        return None
    return Forward(nn.from_config(config), nn.inputs(config))


def named(name: str, inputs: Sequence[str], *, ours: bool) -> Forward:
    """The forward of a dotted name, with inputs as text: `float32[2,32,32,3]`.

    Args:
      name: `nn.resnet20` for one of ours; else a module and a function in it, which
        are imported.
      inputs: dtype and shape of each input.
      ours: only one of ours may be named, since a recipe must not run code.

    Returns:
      The forward.

    Raises:
      ValueError: there is no such function, or an input is not spelt so.

    Example:
      >>> named("nn.resnet8", ["float32[2,32,32,3]"], ours=True).inputs
      (ShapeDtypeStruct(shape=(2, 32, 32, 3), dtype=float32),)
    """
    module, _, last = name.rpartition(".")
    if module == "nn":
        apply = vars(nn).get(last)
    elif ours:
        raise ValueError(f"a recipe may name a forward of nn alone, not {name!r}")
    else:
        try:
            apply = getattr(importlib.import_module(module), last, None)
        except (ImportError, ValueError) as error:
            raise ValueError(f"no forward {name!r}: {error}") from None
    if not callable(apply):
        raise ValueError(f"no forward {name!r}: it is no function of {module!r}")
    return Forward(apply, tuple(map(_input, inputs)))


def _input(text: str) -> jax.ShapeDtypeStruct:
    match = _INPUT.fullmatch(text.replace(" ", ""))
    try:
        dtype = jnp.dtype(match[1]) if match else None
    except TypeError:
        dtype = None
    if match is None or dtype is None:
        raise ValueError(f"{text!r} is no input; write it like float32[2,32,32,3]")
    shape = tuple(map(int, match[2].split(","))) if match[2] else ()
    return jax.ShapeDtypeStruct(shape, dtype)
