"""Which tensors of which models make which output tensor, by which call."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import _form
from ._layers import Place, is_before, members, place, stacks
from ._pieces import Column, Work, made
from ._views import Piece, Views
from ._vocabulary import Vocabulary, embedding, is_head

# A model recomputes these, and many folders leave them out.
_BUFFERS = ("inv_freq", "attn.bias", "attn.masked_bias", "position_ids")


class Merged(NamedTuple):
    """The tensors of the result, in order."""

    pieces: dict[str, Piece]
    notes: tuple[str, ...]
    stacks: Mapping[
        str, tuple[int, ...]
    ]  # by stack, the first source's layers, stacked


def merged(form: _form.Merge, views: Views, words: Vocabulary | None) -> Merged:
    """Every output tensor of a recipe; nested recipes are merged the same way."""
    out: dict[str, Piece] = {}
    notes: list[str] = []
    stacked: dict[str, tuple[int, ...]] = {}
    seen: set[str] = set()
    for module, slices in form.modules.items():
        rows = [_columns(s, module, views, words, notes) for s in slices]
        work = Work(form, views, words, notes)
        if len(slices) == 1 and all(c.layers is None for c in rows[0]):
            result = _whole(slices[0], rows[0], work)
        else:
            result, (stack, layers) = _stacked(slices, rows, work)
            stacked[stack] = layers
        for name in result.keys() & out.keys():
            raise ValueError(f"tensor {name!r} is in two modules of the recipe")
        out |= result
        seen.update(rows[0][0].pieces)
    if None not in form.modules:
        every = views.models[views.like].tensors
        left = [n for n in every if n not in seen]
        notes += [f"{len(left)} tensors in no module: {left[0]}..."] if left else []
    return Merged(out, tuple(dict.fromkeys(notes)), stacked)


def _columns(
    part: _form.Slice,
    module: str | None,
    views: Views,
    words: Vocabulary | None,
    notes: list[str],
) -> list[Column]:
    """The inputs of a slice, the base last, without the buffers that some lack."""
    entries = [(e, False) for e in part.models]
    entries += [(part.base, True)] if part.base else []
    columns = []
    for entry, is_base in entries:
        if isinstance(entry.model, str):
            label, pieces = entry.model, views.pieces(entry.model)
        else:
            label = "the nested recipe"
            pieces = merged(entry.model, views, words).pieces
        held = {n: pieces[n] for n in members(module, list(pieces))}
        columns.append(Column(label, held, entry.layers, is_base))
    shared = set.intersection(*({*c.pieces} for c in columns))
    drop = {n for c in columns for n in c.pieces if n not in shared and is_buffer(n)}
    if drop:
        notes.append(f"{len(drop)} buffers are not in all models and are left out")
    keep = lambda c: {n: p for n, p in c.pieces.items() if n not in drop}
    return [c._replace(pieces=keep(c)) for c in columns]


def _whole(part: _form.Slice, columns: list[Column], work: Work) -> dict[str, Piece]:
    """All tensors of the inputs, each with its namesakes."""
    first = next((c for c in columns if c.label == work.views.like), None)
    first = first or next((c for c in columns if c.is_base), columns[0])
    names = dict.fromkeys(first.pieces)
    names |= dict.fromkeys(n for c in columns for n in c.pieces if is_head(n))
    _check_same(columns, [{*c.pieces} for c in columns], set(names))
    found = stacks(names)
    out = {}
    for name in names:
        where = place(name, found)
        t = 0.0 if where is None else _depth(where.layer, found[where.stack])
        out[name] = made(name, [name] * len(columns), part, columns, t, work)
    return out


def _stacked(
    slices: Sequence[_form.Slice], rows: list[list[Column]], work: Work
) -> tuple[dict[str, Piece], tuple[str, tuple[int, ...]]]:
    """Ranges of layers, stacked and renumbered; the rest from the first and last."""
    stack = _only_stack(rows)
    ranges = [[_range(c, stack) for c in columns] for columns in rows]
    first = rows[0][0]
    block: dict[str, Piece] = {}
    layers: list[int] = []
    for part, columns, spans in zip(slices, rows, ranges, strict=True):
        lengths = {high - low for low, high in spans}
        if len(lengths) > 1:
            said = ", ".join(
                f"{c.label} {list(s)}" for c, s in zip(columns, spans, strict=True)
            )
            raise ValueError(f"a slice needs as many layers of each model: {said}")
        count = lengths.pop()
        for i in range(count):
            at = [low + i for low, _ in spans]
            block |= _layer(
                stack, len(layers), at, _depth(i, count), part, columns, work
            )
            layers.append(at[0])
    ends = {True: (slices[0], rows[0]), False: (slices[-1], rows[-1])}
    out: dict[str, Piece] = {}
    loose = {}
    for before, (_, columns) in ends.items():
        here = [
            [n for n in _names_of(c, stack) if is_before(n) == before] for c in columns
        ]
        heads = [n for names in here for n in names if is_head(n)]
        loose[before] = dict.fromkeys((*here[0], *heads))
        _check_same(columns, [{*names} for names in here], {*loose[before]})
    for name in dict.fromkeys((*first.pieces, *loose[True], *loose[False])):
        if place(name, [stack]) is not None:
            out |= block
        elif name in loose[is_before(name)]:
            part, columns = ends[is_before(name)]
            out[name] = made(name, [name] * len(columns), part, columns, 0.0, work)
    return out, (stack, tuple(layers))


def _layer(
    stack: str,
    number: int,
    at: list[int],
    t: float,
    part: _form.Slice,
    columns: list[Column],
    work: Work,
) -> dict[str, Piece]:
    """One output layer, from one layer of every input."""
    rests = []
    for column, layer in zip(columns, at, strict=True):
        places = (place(n, [stack]) for n in column.pieces)
        rests.append({p.rest: None for p in places if p and p.layer == layer})
    for column, layer, rest in zip(columns, at, rests, strict=True):
        for other in rests[0].keys() ^ rest.keys():
            raise ValueError(
                f"layer {at[0]} of {columns[0].label} and layer {layer} of "
                f"{column.label} differ: only one has {other!r}"
            )
    out = {}
    for rest in rests[0]:
        name = Place(stack, number, rest).name
        inputs = [Place(stack, i, rest).name for i in at]
        out[name] = made(name, inputs, part, columns, t, work)
    return out


def _check_same(
    columns: Sequence[Column], names: Sequence[set[str]], due: set[str]
) -> None:
    """Raises where a tensor is not in all inputs, heads aside."""
    for column, held in zip(columns, names, strict=True):
        for name in sorted(due ^ held):
            if is_head(name) and embedding(column.pieces) is not None:
                continue
            owners = [c for c, n in zip(columns, names, strict=True) if name in n]
            lacking = [c for c, n in zip(columns, names, strict=True) if name not in n]
            raise ValueError(
                f"tensor {name!r} is in {owners[0].label} but not in {lacking[0].label}"
            )


def _only_stack(rows: list[list[Column]]) -> str:
    """The one layer stack that slices can mean."""
    found = stacks(rows[0][0].pieces)
    for column in (c for columns in rows for c in columns):
        mine = stacks(column.pieces)
        if mine.keys() != found.keys():
            raise ValueError(
                f"the layers of {rows[0][0].label} are {sorted(found)}, those of "
                f"{column.label} {sorted(mine)}"
            )
    if len(found) != 1:
        raise ValueError(
            f"slices need one stack of layers, {rows[0][0].label} has {sorted(found)}: "
            "write the recipe with modules"
        )
    return next(iter(found))


def _range(column: Column, stack: str) -> tuple[int, int]:
    count = stacks(column.pieces)[stack]
    low, high = column.layers or (0, count)
    if high > count:
        raise ValueError(
            f"layers [{low}, {high}] of {column.label}: it has {count} layers"
        )
    return low, high


def _names_of(column: Column, stack: str) -> list[str]:
    return [n for n in column.pieces if place(n, [stack]) is None]


def _depth(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


def is_buffer(name: str) -> bool:
    """Is this a tensor that models recompute, and many folders leave out?"""
    return name.endswith(_BUFFERS)
