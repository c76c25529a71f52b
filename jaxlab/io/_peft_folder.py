"""A PEFT folder on disk: its tensors sorted by layer, and each layer's adapter."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ..types import Adapter
from . import _peft_config as configs, _peft_form as forms
from ._atomic import atomic_bytes, atomic_folder
from ._dtypes import little
from ._errors import refuse, show
from ._header import Entry
from ._peft_form import Form
from ._peft_kind import Config, Kind, Layer, Tensors
from ._safetensors import open_safetensors, safetensors_writer

WEIGHTS = "adapter_model.safetensors"
MODEL, TOP = "base_model.model.", "base_model."
BASE = "jaxlab_base"
"""The key of the base's fingerprint in the metadata of the weights."""
_ALL = {"weight": "weight", "bias": "bias", "base_layer.bias": "bias"}
_ALL |= {f"ln_tuning_layers.{role}": role for role in ("weight", "bias")}


class Folder(NamedTuple):
    """What a folder holds."""

    file: Path
    config: Config
    kind: Kind
    tensors: Tensors
    """By name, without the prefix of the model."""
    common: Tensors
    """Those that the model has once."""
    base: str
    """The fingerprint of the base it was made for; "" if it does not say."""


class Sorted(NamedTuple):
    """The tensors of a folder by what they belong to."""

    layers: dict[str, Tensors]
    """By module, then by the name behind it."""
    whole: dict[tuple[str, str], np.ndarray]
    """By module and role: parameters that are stored whole."""
    base: dict[str, np.ndarray]
    """By module: weights of the base, which PEFT adds for embeddings."""


def read(path: str | Path) -> Folder:
    """Reads a folder; raises FormatError naming file, tensor or field."""
    folder = Path(path)
    config, kind = configs.read(folder)
    file = folder / WEIGHTS
    if not file.exists():
        pickle = folder / "adapter_model.bin"
        why = "the file is missing"
        if pickle.exists():
            why += (
                f", and {pickle.name} is refused: unpickling runs whatever code it "
                "names; save it again with safe_serialization=True"
            )
        raise refuse(file, why)
    tensors, common = {}, {}
    with open_safetensors(file) as held:
        for name, tensor in held.tensors.items():
            x = tensor.read()
            if name.startswith(MODEL):
                tensors[name.removeprefix(MODEL)] = x
            elif name.startswith(TOP) and is_common(kind, name[len(TOP) :]):
                common[name.removeprefix(TOP)] = x
            else:
                raise refuse(file, f"is none of {kind.name}'s", tensor=name)
        base = held.metadata.get(BASE, "")
    return Folder(file, config, kind, tensors, common, base)


def is_common(kind: Kind, name: str) -> bool:
    """Is a tensor one that the model has once?"""
    return any(name == c or name.startswith(f"{c}.") for c in kind.common_tensors)


def sort(folder: Folder, modules: Iterable[str], weights: Iterable[str]) -> Sorted:
    """Gives every tensor to one of the base's modules; `weights` have a matrix.

    Raises:
      FormatError: a tensor is of no module, or of one that the config does not choose;
        a module that it chooses has no tensors. Names them.
    """
    known = set(modules)
    layers: dict[str, Tensors] = {}
    whole: dict[tuple[str, str], np.ndarray] = {}
    base: dict[str, np.ndarray] = {}
    for name, x in folder.tensors.items():
        parts = name.split(".")
        heads = (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))
        module = next((h for h in heads if h in known), None)
        if module is None:
            why = f"the base has no such module; it has {show(sorted(known)[:5])}"
            raise refuse(folder.file, f"{why}: names= says which is which", tensor=name)
        rest = name.removeprefix(f"{module}.")
        if rest == "base_layer.weight":
            base[module] = x
        elif rest in _ALL and _trained(folder.config, module, _ALL[rest]):
            whole[module, _ALL[rest]] = x
        elif rest in _ALL or not _chosen(folder.config, module):
            field = "modules_to_save" if rest in _ALL else "target_modules"
            why = f"the field {field!r} does not choose {module!r}"
            raise refuse(folder.file, why, tensor=name)
        else:
            layers.setdefault(module, {})[rest] = x
    if folder.common and not layers:  # a type that stores nothing by layer
        layers = {m: {} for m in weights if configs.targeted(folder.config, m)}
    _lacking(folder, layers.keys() | {m for m, _ in whole}, weights)
    return Sorted(layers, whole, base)


def adapter_of(folder: Folder, layer: Layer) -> Adapter:
    """Our adapter of one layer."""
    try:
        return folder.kind.adapter(configs.for_layer(folder.config, layer.path), layer)
    except ValueError as error:
        file = folder.file.with_name(configs.CONFIG)
        raise refuse(file, f"{layer.path!r}: {error}") from error


def entries(
    folder: Folder, layer: Layer, tensors: Tensors, form: Form
) -> dict[str, Any]:
    """All entries of our state that a layer's tensors hold.

    Raises:
      FormatError: a tensor is missing, has another shape, or is unknown; names it.
    """
    config, kind = configs.for_layer(folder.config, layer.path), folder.kind
    try:
        held = forms.flat(tensors, form, kind.name)
        s = kind.read(held | folder.common, config, layer)
        due = kind.write(s, config, layer)
    except KeyError as error:
        name = f"{MODEL}{layer.path}.{error.args[0]}"
        raise refuse(folder.file, "the tensor is missing", tensor=name) from error
    except (ValueError, IndexError) as error:
        why = f"{error}"
        raise refuse(folder.file, why, tensor=f"{MODEL}{layer.path}") from error
    for name, x in held.items():
        if name not in due:
            full = f"{MODEL}{layer.path}.{name}"
            raise refuse(folder.file, f"{kind.name} has no such tensor", tensor=full)
        if x.shape != due[name].shape:
            full = f"{MODEL}{layer.path}.{name}"
            why = f"has shape {x.shape}, expected {due[name].shape}"
            raise refuse(folder.file, why, tensor=full)
    return s


def completed(
    folder: Folder, layer: Layer, given: Mapping[str, Any], fresh: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a fresh state, replaced by those given; what is fixed may lack.

    Raises:
      FormatError: an entry has not the shape it should; names the layer and the entry.
    """
    fixed = adapter_of(folder, layer).fixed
    out = dict(fresh)
    for name, old in fresh.items():
        if name not in given:
            if name not in fixed:
                raise refuse(folder.file, f"{layer.path!r} has no {name!r}")
            continue
        out[name] = jax.tree.map(
            lambda x, y, name=name: fitting(folder, layer, name, x, y),
            old,
            given[name],
        )
    return out


def write(
    path: str | Path,
    config: bytes,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a folder that appears whole or not at all."""
    held = {n: np.ascontiguousarray(x) for n, x in sorted(tensors.items())}
    order = [Entry(n, little(x.dtype), x.shape) for n, x in held.items()]
    order.sort(key=lambda e: (-e.dtype.itemsize, e.name))
    with atomic_folder(path) as staging:
        file = staging / WEIGHTS
        with safetensors_writer(file, order, {"format": "pt", **metadata}) as add:
            for entry in order:
                add(held[entry.name].astype(entry.dtype, copy=False))
        atomic_bytes(staging / configs.CONFIG, config)


def is_folder(path: Path) -> bool:
    """Does a folder look like one of PEFT's?"""
    return (path / configs.CONFIG).is_file()


def _lacking(folder: Folder, own: Collection[str], weights: Iterable[str]) -> None:
    """Raises where a module that the config chooses has no tensors in the file."""
    if folder.config["target_modules"] == configs.LINEAR:
        return
    for module in weights:
        if module not in own and configs.targeted(folder.config, module):
            why = f"no tensors for {module!r}, which target_modules chooses"
            raise refuse(folder.file, why)


def _trained(config: Config, module: str, role: str) -> bool:
    """Does the config say that this parameter is trained whole?"""
    biased = role == "bias" and config.get("bias", "none") != "none"
    tuned = config["peft_type"] == "LN_TUNING" and _chosen(config, module)
    return biased or tuned or configs.to_save(config, module)


def _chosen(config: Config, module: str) -> bool:
    """Does the config choose a layer, or not say which?"""
    every = config["target_modules"] in (configs.LINEAR, None)
    return every or configs.targeted(config, module)


def fitting(folder: Folder, layer: Layer, name: str, old: Any, new: Any) -> Any:
    """One array of a state, of the shape and dtype that a fresh one has."""
    if tuple(np.shape(new)) != tuple(old.shape):
        why = (
            f"{name!r} has shape {tuple(np.shape(new))}, expected {tuple(old.shape)} "
            f"(a weight [{layer.n}, {layer.m}])"
        )
        raise refuse(folder.file, why, tensor=f"{MODEL}{layer.path}")
    return np.asarray(new).astype(old.dtype)
