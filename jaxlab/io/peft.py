"""PEFT's adapter folders, read onto any model and written from one."""

import functools as ft
from pathlib import Path
from typing import Any

import jax

from .. import lowrank, rewrite
from ..lowrank._state import by_path, plain_shapes
from ..types import Apply, Params
from . import (
    _peft_config as configs,
    _peft_folder as folders,
    _peft_names as modules,
    _peft_state as states,
    _peft_write as writing,
)
from ._errors import refuse
from ._peft_layers import base_print
from ._peft_names import Names


def load(
    folder: str | Path,
    apply: Apply,
    params: Params,
    *inputs: Any,
    names: Names = None,
) -> tuple[lowrank.Adapted, lowrank.State]:
    """Puts the adapter of a PEFT folder on a model.

    A tensor finds its leaf by its module's name: the leaf `layers/0/q_proj/kernel`, or
    `layers.0.q_proj.weight` of a torch state dict, is the weight of
    `layers.0.q_proj`. How a leaf is a matrix is read from the program, so that it may
    be transposed, split by head, a convolution, or all layers of a scan at once.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      apply: the function `apply(params, *inputs)`.
      params: its parameters, the base that the adapter was trained on.
      *inputs: inputs of `apply`, for their shapes; `ShapeDtypeStruct`s will do.
      names: module names by path of leaf, or a function of the path (None: by the
        path): `{"block_0/attn/q/kernel": "layers.0.q_proj"}`. Layers stacked in one
        leaf have one `{}` per axis: `{"layers/q/kernel": "layers.{}.q_proj"}`.

    Returns:
      `(adapted, state)` as of `lowrank.attach`. What the folder holds whole
      (`modules_to_save`, biases) is in the state too.

    Raises:
      FormatError: a type or a field's value that is not implemented, a tensor that is
        missing, left over or of another shape, a pickle in place of safetensors;
        names file, field and tensor.
      ValueError: the folder was written for another base.
    """
    held = folders.read(folder)
    leaves = by_path(params)
    uses = rewrite.uses(apply, plain_shapes(params), *inputs)
    named = modules.leaves(uses, names)
    index = modules.index(named)
    known = {module for module, _ in index}
    parts = folders.sort(held, known, [m for m, *_ in modules.peers(named, known)])
    adapters = states.adapters(held, parts, index)
    if not adapters:
        raise refuse(held.file, "holds no tensor of any layer")
    rate, key = configs.dropout(held.config), jax.random.key(0)
    attach = ft.partial(lowrank.attach, apply, key=key, dropout=rate)
    adapted, state = jax.eval_shape(
        lambda p: attach(p, adapters, *inputs), params
    )  # what the folder holds need not be made
    states.check_base(held, parts, named, index, leaves)
    adapted, state = states.placed(adapted, state, named, index, leaves)
    return states.filled(held, parts, named, adapted, state, leaves)


def save(
    folder: str | Path,
    adapted: lowrank.Adapted,
    state: lowrank.State,
    params: Params,
    *inputs: Any,
    names: Names = None,
    base: str | None = None,
) -> None:
    """Writes an adapter as a folder that PEFT reads.

    Args:
      folder: missing, or empty; it appears whole or not at all.
      adapted: the adapted model.
      state: what was trained.
      params: the base. A fingerprint of its adapted leaves is stored, which `load`
        checks.
      *inputs: inputs of the model, for their shapes: needed only where matrices are
        trained whole (`lowrank.full`), to tell what is in and out in them.
      names: as for `load`.
      base: the base's name, which PEFT keeps as `base_model_name_or_path`.

    Returns:
      Nothing.

    Raises:
      ValueError: an adapter that PEFT has not, two of its types in one model, options
        that it cannot keep by layer, or weights that are not the adapter's; names the
        leaf.
      OSError: the disk is full, the folder read-only or not empty.
    """
    lowrank.kept(params, state)  # raises where this is another base
    leaves = by_path(params)
    uses = {path: () for path in leaves}
    if inputs:
        uses = rewrite.uses(adapted.model, plain_shapes(params), *inputs)
    uses |= {p.path: (p.use,) for p in state.spec.places if p.use is not None}
    named = modules.leaves(uses, names)
    kind = writing.kind_of(state)
    layers, tensors = writing.layer_tensors(kind, adapted, state, named)
    said, whole = writing.whole_tensors(kind, state, leaves, named)
    said |= configs.said_dropout(kind.name, adapted.dropout)
    said |= {"base_model_name_or_path": base, "inference_mode": True}
    layers |= {module: {} for module in said.pop("target_modules", ())}
    others = {leaf.module for leaf in named.values() if leaf.role == "weight"}
    text = configs.write(kind.name, layers, others - layers.keys(), said)
    known = base_print(named, leaves, layers)
    metadata = {folders.BASE: known} if known else {}
    folders.write(folder, text, tensors | whole, metadata)
