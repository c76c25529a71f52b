"""One output tensor: checked against its inputs, and with its options."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from . import _form, _option
from ._compose import Call, sources
from ._views import Piece, Pieces, Views
from ._vocabulary import Vocabulary, embedding, is_head, is_input

_PAIRS = ("merge.slerp", "merge.nearswap", "merge.arcee_fusion")


class Column(NamedTuple):
    """One input of a slice."""

    label: str
    pieces: Pieces
    layers: tuple[int, int] | None
    is_base: bool


class Work(NamedTuple):
    form: _form.Merge
    views: Views
    words: Vocabulary | None
    notes: list[str]


def made(
    name: str,
    inputs: Sequence[str],
    part: _form.Slice,
    columns: Sequence[Column],
    t: float,
    work: Work,
) -> Piece:
    """One output tensor."""
    pieces = [_find(c, n) for c, n in zip(columns, inputs, strict=True)]
    words = work.words
    follows = words is not None and all(
        words.follows(s, work.views.tensor(s)) for p in pieces for s in sources(p.call)
    )
    skip = 1 if follows else 0
    for piece, column in zip(pieces, columns, strict=True):
        if piece.shape[skip:] != pieces[0].shape[skip:]:
            raise ValueError(
                f"tensor {name!r} has shape {pieces[0].shape} in {columns[0].label} "
                f"and {piece.shape} in {column.label}{_hint(name, work)}"
            )
    shape = pieces[0].shape
    if follows and words is not None:
        shape = (words.rows, *shape[1:])
    ours = [p for p, c in zip(pieces, columns, strict=True) if not c.is_base]
    base = next((p for p, c in zip(pieces, columns, strict=True) if c.is_base), None)
    anchor = next((c.label for c in columns if c.is_base), None)
    if anchor is None:
        anchor = columns[0].label if part.use in _PAIRS else work.form.like
    if not all(_is_float(p.dtype) for p in pieces):
        return _copy(name, pieces, columns, shape, follows, anchor)
    names = [n for n, c in zip(inputs, columns, strict=True) if not c.is_base]
    labels = [c.label for c in columns if not c.is_base]
    call = Call(
        part.use,
        _options(part, name, names, labels, t),
        tuple(p.call for p in ours),
        base.call if base else None,
    )
    return Piece(shape, pieces[0].dtype, call, follows, anchor)


def _options(
    part: _form.Slice, name: str, inputs: list[str], labels: list[str], t: float
) -> tuple[tuple[str, Any], ...]:
    """The options for one tensor."""
    out = []
    for key, value in part.options.items():
        try:
            found = _option.evaluate(value, name, inputs, t)
        except ValueError as error:
            raise ValueError(f"{part.use}: option {key!r}: {error}") from None
        each = found if isinstance(found, list) else [found]
        for item, label in zip(each, labels, strict=False):
            if item is _option.ABSENT:
                of = f" of {label}" if isinstance(found, list) else ""
                raise ValueError(
                    f"{part.use} needs {key!r}{of} for tensor {name!r}: no case "
                    "matches, and there is no other value"
                )
        out.append((key, _option.bound(found)))
    return tuple(out)


def _copy(
    name: str,
    pieces: Sequence[Piece],
    columns: Sequence[Column],
    shape: tuple[int, ...],
    follows: bool,
    anchor: str | None,
) -> Piece:
    """A tensor that is not merged: the inputs have to be equal."""
    for piece, column in zip(pieces, columns, strict=True):
        if piece.dtype != pieces[0].dtype:
            raise ValueError(
                f"tensor {name!r} is {pieces[0].dtype} in {columns[0].label} and "
                f"{piece.dtype} in {column.label}"
            )
    found = dict.fromkeys(s for p in pieces for s in sources(p.call))
    call = Call("copy", (), tuple(found))
    return Piece(shape, pieces[0].dtype, call, follows, anchor)


def _find(column: Column, name: str) -> Piece:
    """A tensor of an input; a head that is tied there is the input embedding."""
    if name in column.pieces:
        return column.pieces[name]
    tied = embedding(column.pieces) if is_head(name) else None
    if tied is None:
        raise ValueError(f"{column.label} has no tensor {name!r}")
    return column.pieces[tied]


def _is_float(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _hint(name: str, work: Work) -> str:
    if work.words is None and (is_input(name) or is_head(name)):
        return ": where vocabularies differ, say whose to take (tokenizer: union)"
    return ""
