"""Merges whose leaves depend on each other, as a trim over all weights does."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import functools as ft
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import rewrite, tree
from ..merge import on_base
from ._feed import Settings, feed
from ._names import to_path
from ._task import Task, bound, frozen, group_leaf, is_double, is_random


class Joint(NamedTuple):
    """Tensors whose results depend on each other: all are passed over first."""

    index: dict[str, int]
    plan: rewrite.Passes
    known: dict[int, Any]
    blocks: Callable[[int, bool], Iterator[Any]]

    @classmethod
    def of(
        cls, tasks: Sequence[Task], settings: Settings, ahead: ThreadPoolExecutor
    ) -> "Joint | None":
        """The joint part of a run, with its statistics; or None where there is none."""
        merged = [t for t in tasks if t.method is not None and math.prod(t.shape)]
        tied = [t for t in merged if not _leafwise(t)]
        if not tied:
            return None
        method = _shared(tied)
        names = [to_path(t.name) for t in tied]
        if is_random(method):
            method = ft.partial(method, key=jax.random.key(settings.seed))

        def fn(*leaves: Sequence[jax.Array]) -> list[jax.Array]:
            wide = [[tree.widen(jnp.asarray(x)) for x in leaf] for leaf in leaves]
            models = {n: x[0] for n, x in zip(names, wide, strict=True)}
            if tied[0].group.base is None:
                out = method(models)
            else:
                base = {n: x[1] for n, x in zip(names, wide, strict=True)}
                out = on_base(method)(models, base)
            return [out[n].astype(t.dtype) for n, t in zip(names, tied, strict=True)]

        leaves = [group_leaf(t.group) for t in tied]
        with jax.enable_x64(any(map(is_double, tied))):
            plan = rewrite.flat(fn, leaves)
            flat = plan is not None
            plan = plan or rewrite.passes(fn, leaves)
        sources = [feed(t.group, flat, ahead, settings) for t in tied]

        def blocks(leaf: int, sample: bool) -> Iterator[Any]:
            source = sources[leaf]._replace(kept=[])  # too many tensors to keep any
            yield from source.blocks(sample=sample)

        known = rewrite.statistics(plan, blocks)
        return cls({t.name: i for i, t in enumerate(tied)}, plan, known, blocks)

    def results(self, task: Task) -> Iterator[np.ndarray]:
        """The blocks of one of the tensors."""
        leaf = self.index[task.name]
        for _, block in rewrite.results(self.plan, self.known, leaf, self.blocks):
            yield np.asarray(block)


def _leafwise(task: Task) -> bool:
    """Does the method treat leaves independently?"""
    assert task.method is not None
    key = _Bound(bound(task.method), task.method)
    return _leafwise_method(key, len(task.group.models))


class _Bound(NamedTuple):
    key: tuple[Any, ...]
    method: Any

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self.key == other.key


@ft.lru_cache(maxsize=4096)
def _leafwise_method(key: _Bound, k: int) -> bool:
    method: Callable[..., Any] = key.method
    if is_random(method):
        method = ft.partial(method, key=jax.random.key(0))
    shape = jax.ShapeDtypeStruct((k, 2, 3), np.float32)
    return rewrite.leafwise(method, {"a": shape, "b": shape})


def _shared(tasks: Sequence[Task]) -> Callable[..., Any]:
    """The one method of joint tasks; options that differ become trees by path."""
    functions: set[Any] = {getattr(t.method, "func", t.method) for t in tasks}
    if len(functions) != 1:
        raise ValueError("tensors that are merged together need one method")
    keywords = [dict(getattr(t.method, "keywords", {})) for t in tasks]
    out = {}
    for name in keywords[0]:
        values = [k[name] for k in keywords]
        if len({frozen(v) for v in values}) == 1:
            out[name] = values[0]
        else:
            paths = [to_path(t.name) for t in tasks]
            out[name] = dict(zip(paths, values, strict=True))
    return ft.partial(functions.pop(), **out)
