"""The models a recipe names, as tensors by name."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from . import _form
from ._checkpoint import Checkpoint, Tensor
from ._compose import Call, Source
from ._layers import PLURAL, count_keys, read_key, stacks


class Piece(NamedTuple):
    """A tensor of a model: one that is there, or one that a recipe makes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    call: Source | Call
    follows: bool = False  # its rows are the tokens of a new vocabulary
    anchor: str | None = None  # the model whose embedding of a token is preferred


Pieces = Mapping[str, Piece]


class Views(NamedTuple):
    """The open models, and the one whose files are carried."""

    models: Mapping[str, Checkpoint]
    like: str

    @classmethod
    def of(cls, form: _form.Merge, models: Mapping[str, Checkpoint]) -> "Views":
        """All that a recipe names, checked to be open and to have all their layers."""
        for name in _form.references(form):
            if name not in models:
                raise ValueError(f"the recipe needs the model {name!r}")
            _check_layers(name, models[name])
        first = form.slices[0]
        entries = (*([first.base] if first.base else ()), *first.models)
        named = [n for e in entries for n in _names(e)]
        return cls(models, form.like or named[0])

    def tensor(self, source: Source) -> Tensor:
        """The tensor of a source."""
        return self.models[source.model].tensors[source.tensor]

    def pieces(self, name: str) -> dict[str, Piece]:
        """The tensors of one open model."""
        return {
            t.name: Piece(t.shape, t.dtype, Source(name, t.name))
            for t in self.models[name].tensors.values()
        }


def _check_layers(name: str, model: Checkpoint) -> None:
    """Raises where config.json promises more layers than there are."""
    found = stacks(model.tensors)
    if len(found) != 1 or model.config is None:
        return
    ((stack, count),) = found.items()
    for path in count_keys(model.config, stack, found)[:1]:
        due = read_key(model.config, path)
        if count < due and stack.rpartition(".")[2] in PLURAL:
            raise ValueError(
                f"{name} has {count} layers {stack!r}, but its config.json says "
                f"{'.'.join(path)}: {due}"
            )


def _names(entry: _form.Entry) -> list[str]:
    inner = entry.model
    return [inner] if isinstance(inner, str) else list(_form.references(inner))
