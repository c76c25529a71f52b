"""One output tensor: what it is made of, and the function that makes it."""

from collections.abc import Callable, Mapping
import functools as ft
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import rewrite, tree
from ..merge import on_base
from ._feed import Group, Settings
from ._names import to_path


class Task(NamedTuple):
    """One output tensor: what it is made of, and how."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    method: Callable[..., Any] | None  # None copies the first input
    group: Group


def is_random(method: Callable[..., Any]) -> bool:
    """Does a method still need a key?"""
    parameter = inspect.signature(method).parameters.get("key")
    return parameter is not None and parameter.default is parameter.empty


def is_double(task: Task) -> bool:
    """Is a task computed in float64?"""
    return any(a.dtype == np.float64 for a in task.group.avals())


def group_leaf(group: Group) -> rewrite.Leaf:
    """A group as the leaf of a function: models are cut on axis 1, a base on axis 0."""
    avals = group.avals()
    return rewrite.Leaf(avals, (1, 0)[: len(avals)])


def leaf_function(task: Task, settings: Settings) -> Callable[..., jax.Array]:
    """The task as a function of `models [k, *leaf]` and perhaps `base [*leaf]`.

    Inputs are widened to at least float32; the result is rounded once.
    """
    assert task.method is not None
    path = to_path(task.name)
    method = task.method
    if is_random(method):
        method = ft.partial(method, key=jax.random.key(settings.seed))

    def apply(models: jax.Array, base: jax.Array | None = None) -> jax.Array:
        wide = {path: tree.widen(jnp.asarray(models))}
        if base is None:
            out = method(wide)
        else:
            out = on_base(method)(wide, {path: tree.widen(jnp.asarray(base))})
        return out[path].astype(task.dtype)

    return apply


def fingerprint(task: Task) -> tuple[Any, ...]:
    """Tasks with one fingerprint are alike but for their names."""
    assert task.method is not None
    return (*bound(task.method), task.group.avals(), task.dtype)


def bound(method: Callable[..., Any]) -> tuple[Any, ...]:
    """A method and its hyperparameters, as something hashable."""
    if not isinstance(method, ft.partial):
        return (method,)
    values = sorted(method.keywords.items())
    return (method.func, *((k, frozen(v)) for k, v in values))


def frozen(value: Any) -> Any:
    """An option as something hashable: arrays and lists by value, records by field."""
    if isinstance(value, Mapping):
        return tuple((k, frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, tuple) and any(isinstance(v, str | tuple) for v in value):
        return tuple(map(frozen, value))
    if isinstance(value, np.ndarray | jax.Array | list | tuple):
        array = np.asarray(value)
        return (array.dtype.str, array.shape, array.tobytes())
    return value
