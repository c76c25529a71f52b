"""From the state of an adapted model to the tensors and fields of a PEFT folder."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .. import lowrank
from ..lowrank._places import method, sides
from . import (
    _peft_config as configs,
    _peft_folder as folders,
    _peft_form as forms,
    _peft_names as modules,
)
from ._peft_kind import Config, Kind, Layer
from ._peft_kinds import KINDS, METHODS
from ._peft_layers import torch_weights
from ._peft_names import Leaf


def kind_of(state: lowrank.State) -> Kind:
    """The type of PEFT's that a state is of; raises where there is none, or two."""
    kinds: dict[str, str] = {}
    for place in state.spec.places:
        if place.use is None:
            continue
        name = method(place.adapter)
        kind = next((k for k, own in METHODS.items() if name in own.split()), None)
        if kind is None:
            raise ValueError(f"{place.path!r} has {name}, which is no type of PEFT's")
        kinds.setdefault(kind, place.path)
    if len(kinds) > 1:
        (one, a), (two, b) = list(kinds.items())[:2]
        raise ValueError(
            f"{a!r} is of PEFT's type {one}, {b!r} of {two}: one folder has one type"
        )
    return KINDS[next(iter(kinds), "LN_TUNING")]


def layer_tensors(
    kind: Kind,
    adapted: lowrank.Adapted,
    state: lowrank.State,
    named: Mapping[str, Leaf],
) -> tuple[dict[str, Config], dict[str, np.ndarray]]:
    """By module the fields of its adapter; by PEFT's name every tensor."""
    layers, tensors = {}, {}
    leaves = [named[p.path] for p in state.spec.places if p.use is not None]
    peers = modules.peers(named, {m for leaf in leaves for m in leaf.modules()})
    for place in state.spec.places:
        if place.use is None:
            continue
        modules.check(named[place.path])
        name = method(place.adapter)
        fields, form = kind.fields(place.adapter), forms.of_use(place.use)
        config = configs.fill(kind.name, fields)
        common = state.shared.get(name, {}) | adapted.fixed_shared.get(name, {})
        own = state.leaves[place.path] | adapted.fixed[place.path]
        for module, at in named[place.path].modules().items():
            s = jax.tree.map(lambda x, at=at: np.asarray(x[at]), own)
            s |= jax.tree.map(np.asarray, common)
            made = kind.write(s, config, Layer(module, *sides(place.use), peers))
            every = {n: x for n, x in made.items() if folders.is_common(kind, n)}
            tensors |= {f"{folders.TOP}{n}": x for n, x in every.items()}
            made = {n: x for n, x in made.items() if n not in every}
            try:
                made = forms.shaped(made, form, kind.name)
            except ValueError as error:
                raise ValueError(f"{place.path!r}: {error}") from None
            tensors |= {f"{folders.MODEL}{module}.{n}": x for n, x in made.items()}
            layers[module] = fields
    return layers, tensors


def whole_tensors(
    kind: Kind,
    state: lowrank.State,
    leaves: Mapping[str, Any],
    named: Mapping[str, Leaf],
) -> tuple[Config, dict[str, np.ndarray]]:
    """What is trained whole: the fields that say so, and the tensors by PEFT's name.

    PEFT stores modules whole, so the rest of each is there too, as the base has it;
    but of an adapted layer only its bias.
    """
    places = state.spec.places
    own = {p.path: state[p.path]["w"] for p in places if p.use is None}
    layers = {named[p.path].module for p in places if p.use is not None}
    wanted = {named[path].module for path in own} - layers
    tensors: dict[str, np.ndarray] = {}
    names: set[str] = set()
    biased = False
    for path, leaf in named.items():
        if leaf.module in layers and path in own:
            infix, biased = "base_layer.", True
        elif leaf.module in wanted:
            infix = "ln_tuning_layers." if kind.name == "LN_TUNING" else ""
            names |= leaf.modules().keys()
        else:
            continue
        modules.check(leaf)
        w = own.get(path, leaves[path])
        if leaf.use is None and np.ndim(w) > 1 + len(leaf.front):
            raise ValueError(
                f"{path!r} is trained whole: save needs the inputs of the model, to "
                "tell what is in and out in it"
            )
        for module, x in torch_weights(leaf, w).items():
            tensors[f"{folders.MODEL}{module}.{infix}{leaf.role}"] = np.asarray(x)
    said: Config = {}
    if biased:
        said["bias"] = (
            "lora_only" if kind.name == "ADALORA" else f"{kind.name.lower()}_only"
        )
    if names and kind.name == "LN_TUNING":
        said["target_modules"] = sorted(names)
    elif names:
        said["modules_to_save"] = sorted(names)
    return said, tensors
