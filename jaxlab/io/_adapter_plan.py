"""What an adapter on disk makes of the tensors of a checkpoint."""

from collections.abc import Callable, Mapping
import functools as ft
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..lowrank._state import fingerprint
from ..types import Adapter
from . import (
    _adapter_file as files,
    _peft_folder as folders,
    _peft_form as forms,
    _peft_layers as layers,
)
from ._checkpoint import Checkpoint
from ._errors import refuse
from ._peft_folder import Folder
from ._peft_form import Form
from ._peft_kind import Layer

Make = Callable[[np.ndarray], np.ndarray]
"""A tensor of the base -> the folded one, in float32 or wider."""


def opened(adapter: str | Path, component: str | None) -> Folder:
    """An adapter of any format as a PEFT folder holds it.

    Raises:
      ValueError: it has several components, or not the one asked for.
    """
    found = files.peft_folders(adapter)
    if found:
        return folders.read(found[_chosen(adapter, list(found), component)])
    parts = files.read(adapter).components
    return files.as_folder(adapter, parts[_chosen(adapter, list(parts), component)])


def _chosen(adapter: str | Path, found: list[str], component: str | None) -> str:
    """The component that is wanted."""
    if component is None and len(found) == 1:
        return found[0]
    if component in found or (component is not None and found == [""]):
        return component if component in found else ""
    raise ValueError(
        f"{adapter} has adapters for {', '.join(found)}: name one of them as component"
    )


def plan(held: Folder, model: Checkpoint) -> dict[str, Make]:
    """By tensor, what becomes of it; every layer of the adapter is checked.

    Raises:
      FormatError: the adapter does not fit the base; names file and tensor.
    """
    own = {_split(name): tensor for name, tensor in model.tensors.items()}
    wide = [m for (m, role), t in own.items() if role == "weight" and len(t.shape) > 1]
    parts = folders.sort(held, {module for module, _ in own}, wide)
    out: dict[str, Make] = {}
    for module, tensors in parts.layers.items():
        tensor = own.get((module, "weight"))
        if tensor is None:
            raise refuse(held.file, f"the base has no weight of {module!r}")
        fan = bool(held.config.get("fan_in_fan_out"))
        form = forms.of_shape(tensor.shape, tensors, fan_in_fan_out=fan)
        layer = Layer(module, *forms.sides(tensor.shape, form))
        adapter = folders.adapter_of(held, layer)
        given = folders.entries(held, layer, tensors, form)
        _fitting(held, layer, adapter, given)
        out[tensor.name] = ft.partial(_merged, held, layer, given, form)
        if adapter.bias is None:
            continue
        bias = own.get((module, "bias"))
        try:
            if bias is None:
                adapter.bias(None, given)
            else:
                out[bias.name] = ft.partial(_biased, adapter, given)
        except ValueError as error:
            raise refuse(held.file, f"{module!r}: {error}") from None
    for (module, role), x in parts.whole.items():
        tensor = own.get((module, role))
        if tensor is None or tensor.shape != x.shape:
            shape = None if tensor is None else tensor.shape
            why = f"the base has {module}.{role} of shape {shape}, this is {x.shape}"
            raise refuse(held.file, why)
        out[tensor.name] = ft.partial(_replaced, x)
    return out


def _fitting(
    held: Folder, layer: Layer, adapter: Adapter, given: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The shapes of a fresh state, after a check of those given against them."""
    like = jax.ShapeDtypeStruct((layer.n, layer.m), np.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        fresh = jax.eval_shape(adapter.init, key, like)
    except ValueError as error:
        raise refuse(held.file, f"{layer.path!r}: {error}") from None
    common = {} if adapter.shared is None else held.kind.common
    own = {n: x for n, x in given.items() if n not in common}
    return folders.completed(held, layer, own, fresh)


def _merged(
    held: Folder, layer: Layer, given: Mapping[str, Any], form: Form, w: np.ndarray
) -> np.ndarray:
    """A weight with its adapter folded in."""
    adapter, matrix = (
        folders.adapter_of(held, layer),
        jnp.asarray(forms.matrix(w, form)),
    )
    s = dict(given)
    if any(name not in s for name in adapter.fixed):  # made from the base
        s = adapter.init(jax.random.key(0), matrix) | s
    assert adapter.merge is not None
    s = jax.tree.map(jnp.asarray, s)
    return forms.weight(np.asarray(adapter.merge(matrix, s)), form)


def _biased(adapter: Adapter, given: Mapping[str, Any], b: np.ndarray) -> np.ndarray:
    """A bias as its layer's adapter has it."""
    assert adapter.bias is not None
    return np.asarray(adapter.bias(jnp.asarray(b), jax.tree.map(jnp.asarray, given)))


def _replaced(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A tensor that the adapter holds whole."""
    return x.astype(w.dtype)


def check_base(held: Folder, model: Checkpoint) -> None:
    """Raises where the adapter says that it was made for other weights."""
    if not held.base:
        return
    prints = {}
    for module, tensors in files.grouped(held)[0].items():
        tensor = model.tensors[f"{module}.weight"]
        fan = bool(held.config.get("fan_in_fan_out"))
        form = forms.of_shape(tensor.shape, tensors, fan_in_fan_out=fan)
        w = forms.weight(forms.matrix(tensor.read(), form), form._replace(turned=True))
        prints[module] = fingerprint({"": np.asarray(w)})
    now = layers.joint_print(prints)
    if now != held.base:
        raise ValueError(
            f"{held.file}: the adapter was made for another base than {model.path}, or "
            f"it is folded into this one already (fingerprint {held.base}, this has "
            f"{now})"
        )


def _split(name: str) -> tuple[str, str]:
    """The module and the parameter that a tensor is."""
    module, _, role = name.rpartition(".")
    return module, role
