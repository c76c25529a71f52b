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
    plan: rewrite.Passes | None  # None: no block of a leaf can be computed alone
    known: dict[int, Any]
    blocks: Callable[[int, bool], Iterator[Any]]
    made: Sequence[np.ndarray] = ()  # where there is no plan, the results

    @classmethod
    def of(
        cls, tasks: Sequence[Task], settings: Settings, ahead: ThreadPoolExecutor
    ) -> "Joint | None":
        """The joint part of a run, with its statistics; or None where there is none."""
        tied = _tied(tasks)
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
            plan = plan or _by_rows(fn, leaves)
        sources = [feed(t.group, flat, ahead, settings) for t in tied]

        def blocks(leaf: int, sample: bool) -> Iterator[Any]:
            source = sources[leaf]._replace(kept=[])  # too many tensors to keep any
            yield from source.blocks(sample=sample)

        index = {t.name: i for i, t in enumerate(tied)}
        if plan is None:
            whole = [s._replace(step=s.rows).blocks(sample=False) for s in sources]
            arrays = [next(blocks)[1] for blocks in whole]
            with jax.enable_x64(any(map(is_double, tied))):
                made = [np.asarray(x) for x in jax.jit(fn)(*arrays)]
            return cls(index, None, {}, blocks, made)
        return cls(index, plan, rewrite.statistics(plan, blocks), blocks)

    def results(self, task: Task) -> Iterator[np.ndarray]:
        """The blocks of one of the tensors."""
        leaf = self.index[task.name]
        if self.plan is None:
            yield self.made[leaf]
            return
        for _, block in rewrite.results(self.plan, self.known, leaf, self.blocks):
            yield np.asarray(block)


def together(tasks: Sequence[Task]) -> list[Task]:
    """The tensors that a joint method needs in memory, all of them at once."""
    tied = _tied(tasks)
    return tied if tied and not _cuttable(_key(tied[0]), _models(tied[0])) else []


def _tied(tasks: Sequence[Task]) -> list[Task]:
    """The tensors whose results depend on each other."""
    merged = [t for t in tasks if t.method is not None and math.prod(t.shape)]
    return [t for t in merged if not _leafwise_method(_key(t), _models(t))]


def _by_rows(
    fn: Callable[..., Any], leaves: Sequence[rewrite.Leaf]
) -> rewrite.Passes | None:
    """The passes in blocks of rows, or None where there are none."""
    try:
        return rewrite.passes(fn, leaves)
    except rewrite.Refused:
        return None


def _key(task: Task) -> "_Bound":
    """What decides how a task's method treats leaves."""
    assert task.method is not None
    return _Bound(bound(task.method), task.method)


def _models(task: Task) -> int:
    return len(task.group.models)


class _Bound(NamedTuple):
    key: tuple[Any, ...]
    method: Any

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self.key == other.key


@ft.lru_cache(maxsize=4096)
def _leafwise_method(key: _Bound, k: int) -> bool:
    """Does the method treat leaves independently?"""
    shape = jax.ShapeDtypeStruct((k, 2, 3), np.float32)
    return rewrite.leafwise(_with_key(key.method), {"a": shape, "b": shape})


@ft.lru_cache(maxsize=4096)
def _cuttable(key: _Bound, k: int) -> bool:
    """Can the method be computed in blocks of rows, as two matrices tell?"""
    leaf = rewrite.Leaf((jax.ShapeDtypeStruct((k, 2, 3), np.float32),), (1,))
    method = _with_key(key.method)
    fn = lambda a, b: list(method({"a": a[0], "b": b[0]}).values())
    return _by_rows(fn, [leaf, leaf]) is not None


def _with_key(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with any key, where it needs one."""
    if is_random(method):
        return ft.partial(method, key=jax.random.key(0))
    return method


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
