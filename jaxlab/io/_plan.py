"""What a recipe does to which tensors: one step per output tensor, nothing read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import recipe as recipes
from . import _form, _node
from ._checkpoint import Checkpoint
from ._compose import Call, Source, function, is_nested, sources
from ._names import to_path
from ._outputs import files
from ._steps import merged
from ._views import Piece, Views
from ._vocabulary import Remap, Vocabulary, vocabulary

__all__ = ["Plan", "Source", "Step", "build_plan", "references"]


class Step(NamedTuple):
    """One output tensor."""

    name: str
    shape: tuple[int, ...]
    method: Callable[..., Any] | None
    """A method with its options bound, the key not. None: the inputs have to be equal
    bit for bit, and the first is copied."""
    models: tuple[Source, ...]
    base: Source | None  # where given, the method works on `models - base`
    dtype: np.dtype | None  # inputs are cast to it first; None: they stay as they are
    out_dtype: np.dtype  # of the tensor that is written
    remap: tuple[Remap, ...] | None
    """How the rows of each of `models`, then of `base`, follow the new vocabulary."""


class Plan(NamedTuple):
    """What a recipe does: no tensor has been read for it."""

    steps: tuple[Step, ...]
    models: tuple[str, ...]  # every reference, the tokenizers' too
    like: str  # the model whose files are carried
    files: Mapping[str, bytes]  # written instead of the carried ones, or beside them
    left_out: frozenset[str]  # carried files that no longer fit, and are not copied
    notes: tuple[str, ...]  # what a user should know, for example of tensors left out


def references(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The models that a recipe of either form names; `build_plan` wants them open.

    Args:
      recipe: as `recipe.load` returns it, or mergekit's.

    Returns:
      Each reference once, in order.

    Raises:
      FormatError: it is no recipe.

    Example:
      >>> references({"use": "merge.linear", "models": ["a", "b"]})
      ('a', 'b')
    """
    return _form.references(_read(recipe))


def build_plan(recipe: Mapping[str, Any], models: Mapping[str, Checkpoint]) -> Plan:
    """Plans a merge: which function makes which tensor from which inputs.

    Args:
      recipe: as `recipe.load` returns it, or mergekit's, as plain values.
      models: an open checkpoint for every one of `references(recipe)`.

    Returns:
      The plan. Its steps are in the order of the tensors in the base, else in the first
      model, stacked layers in a row.

    Raises:
      FormatError: it is no recipe.
      ValueError: the models do not fit together or do not fit the recipe; the message
        names the tensor and both models, or the option.
    """
    form = _read(recipe)
    views = Views.of(form, models)
    words = vocabulary(form, models, views.like) if form.tokenizer else None
    made = merged(form, views, words)
    memo: dict[Any, Any] = {}
    steps = tuple(
        _step(form, name, piece, views, words, memo)
        for name, piece in made.pieces.items()
    )
    out = files(form, models, views.like, made.stacks, words)
    notes = (*made.notes, *out.notes, *_tied(out.config, steps))
    return Plan(
        steps, _form.references(form), views.like, out.written, out.left_out, notes
    )


def _read(recipe: Mapping[str, Any]) -> _form.Merge:
    return _form.read(_node.nodes(recipes.convert(recipe)))


def _step(
    form: _form.Merge,
    name: str,
    piece: Piece,
    views: Views,
    words: Vocabulary | None,
    memo: dict[Any, Any],
) -> Step:
    """The step of one tensor; equal calls share one function."""
    call, cast = piece.call, None
    assert isinstance(call, Call), name
    inputs, base, method = tuple(dict.fromkeys(sources(call))), None, None
    if not is_nested(call):
        inputs = tuple(s for s in call.inputs if isinstance(s, Source))
        base = call.base if isinstance(call.base, Source) else None
    tensors = [views.tensor(s) for s in (*inputs, *([base] if base else []))]
    dtypes = {t.dtype for t in tensors}
    if call.use == "copy":
        out = tensors[0].dtype
    else:
        inner = form.dtype or _together(dtypes)
        cast = inner if dtypes != {inner} else None
        out = form.out_dtype or inner
        if cast is not None or not _is_copy(call):
            method = _method(name, call, piece.shape, memo)
    remap = None
    if piece.follows and words is not None:
        names = tuple(s.model for s in (*inputs, *([base] if base else [])))
        key = (names, piece.anchor, tuple(t.shape[0] for t in tensors))
        if key not in memo:  # an embedding and its head share it
            memo[key] = words.remaps(inputs, base, tensors, piece.anchor)
        remap = memo[key]
    return Step(name, piece.shape, method, inputs, base, cast, out, remap)


def _is_copy(call: Call) -> bool:
    """Does a call return its input?"""
    ones = all(np.all(np.asarray(value) == 1) for _, value in call.options)
    return call.use == "merge.passthrough" and not is_nested(call) and ones


def _method(
    name: str, call: Call, shape: Sequence[int], memo: dict[Any, Any]
) -> Callable[..., Any]:
    """The bound method, after a trial on shapes alone: bad options are found now."""
    found = tuple(dict.fromkeys(sources(call)))
    key = (_bare(call, found), len(shape))
    if key not in memo:
        memo[key] = method = function(call)
        k = len(found) if is_nested(call) else len(call.inputs)
        leaf = jax.ShapeDtypeStruct((k, *(2 for _ in shape)), np.float32)
        more = {"key": jax.random.key(0)} if recipes.takes_key(method) else {}
        try:
            jax.eval_shape(lambda x: method(x, **more), {to_path(name): leaf})
        except (ValueError, TypeError) as error:
            of = ", ".join(dict.fromkeys(s.model for s in found))
            raise ValueError(f"tensor {name!r} of {of}: {error}") from None
    return memo[key]


def _bare(call: Any, found: Sequence[Source]) -> Any:
    """A call as a key: inputs by number, options by value."""
    if isinstance(call, Source):
        return found.index(call)
    if call is None:
        return None
    options = tuple(
        (k, (v.tobytes(), v.shape) if isinstance(v, np.ndarray) else (type(v), v))
        for k, v in call.options
    )
    inputs = tuple(_bare(item, found) for item in call.inputs)
    return call.use, options, inputs, _bare(call.base, found)


def _together(dtypes: set[np.dtype]) -> np.dtype:
    """The dtype that inputs of several are merged in."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _tied(config: Mapping[str, Any] | None, steps: Sequence[Step]) -> Sequence[str]:
    heads = [s.name for s in steps if s.name.endswith("lm_head.weight")]
    if heads and config is not None and config.get("tie_word_embeddings"):
        return [f"{heads[0]} is written, but config.json ties it to the embeddings"]
    return []
