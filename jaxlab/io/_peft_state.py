"""From the tensors of a PEFT folder to the state of an adapted model, and back."""

from collections.abc import Mapping
import dataclasses as dc
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import lowrank, rewrite, tree
from ..lowrank._places import method, sides
from ..lowrank._quantized import dense_matrices as matrices
from ..lowrank._state import fingerprint
from ..types import Adapter
from . import (
    _peft_folder as folders,
    _peft_form as forms,
    _peft_names as modules,
)
from ._errors import refuse
from ._peft_folder import Folder, Sorted
from ._peft_kind import Layer
from ._peft_layers import base_print, stacked, torch_weights
from ._peft_names import Leaf

Index = Mapping[tuple[str, str], tuple[Leaf, Any]]


def adapters(held: Folder, parts: Sorted, index: Index) -> dict[str, Adapter]:
    """The adapter of each leaf that the folder has tensors for.

    Raises:
      FormatError: some of the layers in one leaf have tensors and some have not, or
        their options differ.
    """
    out: dict[str, Adapter] = {}
    peers = modules.peers({x.path: x for x, _ in index.values()}, parts.layers)
    seen: dict[str, set[str]] = {}
    wanted = [(module, "weight") for module in parts.layers]
    for module, role in (*wanted, *parts.whole):
        if (module, role) not in index:
            raise refuse(held.file, f"the base has no {role} of {module!r}")
        leaf, _ = index[module, role]
        adapter = lowrank.full()
        if (module, role) not in parts.whole:
            if leaf.use is None:
                raise refuse(held.file, f"{leaf.path!r} is in no matrix product")
            adapter = folders.adapter_of(held, Layer(module, *sides(leaf.use), peers))
        if out.setdefault(leaf.path, adapter) != adapter:
            why = f"{module!r} has other options than the rest of {leaf.path!r}"
            raise refuse(held.file, why)
        seen.setdefault(leaf.path, set()).add(module)
    for leaf, _ in index.values():
        if leaf.path in seen and (less := leaf.modules().keys() - seen[leaf.path]):
            why = f"no tensors for {min(less)!r}, which is in the leaf {leaf.path!r}"
            raise refuse(held.file, why)
    return out


def check_base(
    held: Folder,
    parts: Sorted,
    named: Mapping[str, Leaf],
    index: Index,
    leaves: Mapping[str, Any],
) -> None:
    """Raises where the folder says that it was made for other weights."""
    for module, x in parts.base.items():
        leaf, _ = index[module, "weight"]
        own = torch_weights(leaf, leaves[leaf.path])[module]
        if own.shape != x.shape or not np.array_equal(own, x):
            why = "holds another weight of this layer than the base has"
            raise refuse(held.file, why, tensor=f"{folders.MODEL}{module}")
    now = base_print(named, leaves, parts.layers) if held.base else ""
    if now and now != held.base:
        raise ValueError(
            f"{held.file}: the adapter was made for another base than this, or it is "
            f"folded into this one already (fingerprint {held.base}, this has {now})"
        )


def placed(
    adapted: lowrank.Adapted,
    state: lowrank.State,
    named: Mapping[str, Leaf],
    index: Index,
    leaves: Mapping[str, Any],
) -> tuple[lowrank.Adapted, lowrank.State]:
    """Each place with the bias of its own module, and the fingerprint of all."""
    places = []
    for place in state.spec.places:
        if place.bias is not None:
            module = next(iter(named[place.path].modules()))
            found = index.get((module, "bias"))
            place = place._replace(bias=found[0].path if found else place.bias)
        places.append(place)
    own = fingerprint({place.path: leaves[place.path] for place in places})
    spec = lowrank.Spec(tuple(places), own)
    return dc.replace(adapted, spec=spec), state.replace(spec=spec)


def filled(
    held: Folder,
    parts: Sorted,
    named: Mapping[str, Leaf],
    adapted: lowrank.Adapted,
    state: lowrank.State,
    leaves: Mapping[str, Any],
) -> tuple[lowrank.Adapted, lowrank.State]:
    """The shapes of an adapted model and its state, with the folder's values.

    What an adapter makes from the base and keeps fixed is made here.
    """
    trained, fixed = {}, {}
    shared = {n: dict(s) for n, s in state.shared.items()}
    fixed_shared = {n: dict(s) for n, s in adapted.fixed_shared.items()}
    peers = modules.peers(named, parts.layers)
    for place in state.spec.places:
        leaf, fresh = named[place.path], state.leaves[place.path]
        if place.use is None:
            w = _whole(held, parts, leaf, leaves[place.path], fresh["w"])
            trained[place.path], fixed[place.path] = {"w": w}, {}
            continue
        name, own = method(place.adapter), fresh | adapted.fixed[place.path]
        each = []
        for module, at in leaf.modules().items():
            layer = Layer(module, *sides(place.use), peers)
            form = forms.of_use(place.use)
            s = folders.entries(held, layer, parts.layers[module], form)
            for entries in (shared.get(name, {}), fixed_shared.get(name, {})):
                for entry in entries.keys() & s.keys():
                    entries[entry] = folders.fitting(
                        held, layer, entry, entries[entry], s.pop(entry)
                    )
            mine = jax.tree.map(ft.partial(_like, len(leaf.front)), own)
            if any(entry not in s for entry in place.adapter.fixed if entry in own):
                assert leaf.use is not None
                w = matrices(leaves[place.path], leaf.use)[at]
                mine |= place.adapter.init(jax.random.key(0), tree.widen(w))
            each.append(folders.completed(held, layer, s, mine))
        s = jax.tree.map(lambda *xs, leaf=leaf: stacked(xs, leaf), *each)
        trained[place.path] = {n: v for n, v in s.items() if n in fresh}
        fixed[place.path] = {n: v for n, v in s.items() if n not in fresh}
    arrays = lambda entries: jax.tree.map(jnp.asarray, entries)
    adapted = dc.replace(
        adapted, fixed=arrays(fixed), fixed_shared=arrays(fixed_shared)
    )
    return adapted, state.replace(leaves=arrays(trained), shared=arrays(shared))


def _like(axes: int, x: Any) -> Any:
    """The shape of an entry of one layer, without the leaf's axes in front."""
    return jax.ShapeDtypeStruct(x.shape[axes:], x.dtype)


def _whole(
    held: Folder, parts: Sorted, leaf: Leaf, base: Any, fresh: Any
) -> np.ndarray:
    """A leaf that the folder holds whole."""
    each = []
    own = torch_weights(leaf, base)
    for module in leaf.modules():
        x, due = parts.whole[module, leaf.role], own[module].shape
        if x.shape != due:
            name = f"{folders.MODEL}{module}.{leaf.role}"
            why = f"has shape {x.shape}, expected {due}"
            raise refuse(held.file, why, tensor=name)
        each.append(forms.matrix(x, forms.of_use(leaf.use)))
    joint = stacked(each, leaf).astype(fresh.dtype)
    if leaf.use is None:
        return joint
    return np.asarray(rewrite.from_matrix(jnp.asarray(joint), leaf.use, fresh))
