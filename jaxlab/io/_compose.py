"""One tensor's merge as one function, also where recipes nest."""

from collections.abc import Callable, Iterator
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import recipe, tree
from ..merge import on_base


class Source(NamedTuple):
    """One tensor of one model; the model's reference is as the recipe spells it."""

    model: str
    tensor: str


class Call(NamedTuple):
    """A method, its options, and what it is applied to."""

    use: str
    options: tuple[tuple[str, Any], ...]
    inputs: tuple["Source | Call", ...]
    base: "Source | Call | None" = None


def sources(call: Source | Call | None) -> Iterator[Source]:
    """Every tensor a call reads: inputs before the base, nested ones in their place."""
    if isinstance(call, Source):
        yield call
    elif call is not None:
        for item in (*call.inputs, call.base):
            yield from sources(item)


def is_nested(call: Call) -> bool:
    """Is an input, or the base, itself the result of a call?"""
    return any(isinstance(item, Call) for item in (*call.inputs, call.base))


def function(call: Call) -> ft.partial:
    """The call as a method: of its own inputs, or where it nests of all its sources.

    A nested one takes the sources' stack as `models` and returns a model. Nothing is
    rounded between the calls.
    """
    if not is_nested(call):
        return ft.partial(recipe.lookup(call.use), **dict(call.options))
    found = tuple(dict.fromkeys(sources(call)))
    shape = _shape(call, found, iter(range(10**6)))
    run = (
        _random(shape)
        if any(recipe.takes_key(recipe.lookup(u)) for u in _uses(call))
        else _fixed(shape)
    )
    options = {}
    for i, inner in enumerate(_calls(call)):
        options |= {f"{i}.{name}": value for name, value in inner.options}
    return ft.partial(run, **options)


class _Shape(NamedTuple):
    """A call without its options and names: which method, on which rows."""

    use: str
    number: int
    inputs: tuple["int | _Shape", ...]
    base: "int | _Shape | None"


def _shape(call: Call, found: tuple[Source, ...], numbers: Iterator[int]) -> _Shape:
    number = next(numbers)
    one = lambda item: (
        found.index(item)
        if isinstance(item, Source)
        else item and _shape(item, found, numbers)
    )
    inputs = tuple(one(item) for item in call.inputs)
    return _Shape(call.use, number, inputs, one(call.base))


def _calls(call: Call) -> Iterator[Call]:
    """Every call in it, in the order that `_shape` numbers them."""
    yield call
    for item in (*call.inputs, call.base):
        if isinstance(item, Call):
            yield from _calls(item)


def _uses(call: Call) -> set[str]:
    return {inner.use for inner in _calls(call)}


@ft.cache
def _fixed(shape: _Shape) -> Callable[..., Any]:
    def nested(models: Any, **options: Any) -> Any:
        return _run(shape, models, options, None)

    return nested


@ft.cache
def _random(shape: _Shape) -> Callable[..., Any]:
    def nested(models: Any, *, key: Any, **options: Any) -> Any:
        return _run(shape, models, options, key)

    return nested


def _run(shape: _Shape, models: Any, options: dict[str, Any], key: Any) -> Any:
    """Runs a call on the rows of a stack, in float32 or wider; rounds at the end."""
    wide = jax.tree.map(tree.widen, models)
    out = _nested(shape, wide, options, key)
    return jax.tree.map(lambda y, x: y.astype(x.dtype), out, models)


def _nested(shape: _Shape, wide: Any, options: dict[str, Any], key: Any) -> Any:
    def one(item: "int | _Shape") -> Any:
        if isinstance(item, int):
            return jax.tree.map(lambda x: x[item], wide)
        return _nested(item, wide, options, key)

    start = f"{shape.number}."
    own = {k.removeprefix(start): v for k, v in options.items() if k.startswith(start)}
    method = ft.partial(recipe.lookup(shape.use), **own)
    if recipe.takes_key(method):
        folded = jax.random.fold_in(key, np.uint32(shape.number))
        method = ft.partial(method, key=folded)
    rows = [one(item) for item in shape.inputs]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
    if shape.base is None:
        return method(stacked)
    return on_base(method)(stacked, one(shape.base))
