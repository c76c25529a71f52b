"""Streams a merge: one tensor at a time, in blocks, by the function used in memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import functools as ft
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import rewrite, tree
from ..merge import on_base
from ._errors import refuse
from ._feed import KEEP, Feed, Group, Settings, feed, rows_per_block
from ._names import to_path

SEARCH = 2**24  # values that a search for a threshold keeps, at most


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


def takes_deltas(method: Callable[..., Any]) -> bool:
    """Does a method merge task vectors? Its first parameter says so."""
    return next(iter(inspect.signature(method).parameters)) == "deltas"


def stream(
    todo: Sequence[Task], tasks: Sequence[Task], settings: Settings, memo: "Memo"
) -> Iterator[tuple[Task, Iterator[np.ndarray]]]:
    """Computes the tasks `todo`, some or all of `tasks`, one after another.

    Yields (task, its blocks in order). A method whose leaves depend on each other, such
    as a trim over all weights of a model, first passes over all of `tasks`.
    """
    with ThreadPoolExecutor(1) as ahead:
        joint = _Joint.of(tasks, settings, ahead)
        for task in todo:
            if not math.prod(task.shape):
                yield task, iter(())
            elif task.method is None:
                yield task, _copied(task, settings, ahead)
            elif joint is not None and task.name in joint.index:
                yield task, joint.results(task)
            else:
                yield task, _alone(task, settings, ahead, memo)


def peak_memory(tasks: Sequence[Task], settings: Settings, memo: "Memo") -> int:
    """About how many bytes a run needs beyond the bare runtime.

    Three blocks of inputs, their float32 copies, what one leaf keeps between passes and
    what a search for a threshold keeps; all of a tensor where a method needs all of it.
    """
    most = 0
    for task in (t for t in tasks if math.prod(t.shape)):
        group, shape = task.group, task.group.avals()[0].shape[1:]
        size, entries = math.prod(shape), len(group.tensors)
        width = sum(t.dtype.itemsize for t in group.tensors)
        kind = "flat" if task.method is None else _planned(task, settings, memo)[0]
        inner = 1 if kind == "flat" else math.prod(shape[1:])
        rows = size if kind == "whole" else rows_per_block(group, inner) * inner
        block = min(size, max(rows, inner))
        kept = min(size * width, KEEP) + min(4 * size * entries, 4 * SEARCH)
        most = max(most, block * (3 * width + 8 * (entries + 1)) + kept)
    return most


class Memo(NamedTuple):
    """What earlier tensors taught about later ones."""

    kinds: dict[Any, str]  # by fingerprint without the name
    plans: dict[Any, rewrite.Passes | None]


def _alone(
    task: Task, settings: Settings, ahead: ThreadPoolExecutor, memo: Memo
) -> Iterator[np.ndarray]:
    """The blocks of a tensor that depends on no other."""
    kind, plan = _planned(task, settings, memo)
    source = feed(task.group, kind == "flat", ahead, settings)
    if plan is None:
        yield from _whole(task, settings, source)
        return
    blocks = lambda _, sample: source.blocks(sample=sample)
    known = rewrite.statistics(plan, blocks)
    for _, block in rewrite.results(plan, known, 0, blocks):
        yield np.asarray(block)


def _planned(
    task: Task, settings: Settings, memo: Memo
) -> tuple[str, rewrite.Passes | None]:
    """How a task is cut, traced once for all tasks that are alike."""
    key = _fingerprint(task)
    if key not in memo.plans:
        kind, plan = _plan(task, settings, memo.kinds.get(key[1:]))
        memo.kinds[key[1:]], memo.plans[key] = kind, plan
    return memo.kinds[key[1:]], memo.plans[key]


def _plan(
    task: Task, settings: Settings, kind: str | None
) -> tuple[str, rewrite.Passes | None]:
    """How a task can be cut: "flat", by "rows", or not at all ("whole")."""
    with jax.enable_x64(is_double(task)):
        return _cut(task, settings, kind)


def is_double(task: Task) -> bool:
    """Is a task computed in float64?"""
    return any(a.dtype == np.float64 for a in task.group.avals())


def _cut(
    task: Task, settings: Settings, kind: str | None
) -> tuple[str, rewrite.Passes | None]:
    fn = lambda arrays: [leaf_function(task, settings)(*arrays)]
    leaf = group_leaf(task.group)
    if kind == "flat":  # as an earlier tensor of this shape, but for the random bits
        long = rewrite.lengthened(leaf)
        return kind, rewrite.passes(lambda x: [y.reshape(-1) for y in fn(x)], [long])
    if kind is None and (plan := rewrite.flat(fn, [leaf])) is not None:
        return "flat", plan
    try:
        return "rows", rewrite.passes(fn, [leaf])
    except rewrite.Refused:
        return "whole", None


def group_leaf(group: Group) -> rewrite.Leaf:
    """A group as the leaf of a function: models are cut on axis 1, a base on axis 0."""
    avals = group.avals()
    return rewrite.Leaf(avals, (1, 0)[: len(avals)])


def _whole(task: Task, settings: Settings, source: Feed) -> Iterator[np.ndarray]:
    """A tensor whose method needs all of it at once."""
    everything = source._replace(step=source.rows)
    ((_, arrays),) = everything.blocks(sample=False)
    with jax.enable_x64(is_double(task)):
        out = jax.jit(leaf_function(task, settings))(*arrays)
    yield np.asarray(out)


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


def _copied(
    task: Task, settings: Settings, ahead: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """A tensor that passes through, such as integers: all inputs must agree."""
    first, *others = task.group.tensors
    for tensor in others:
        if tensor.dtype != first.dtype:
            why = f"{tensor.dtype}, but {first.dtype} in {first.file}; it is not merged"
            raise refuse(tensor.file, why, tensor=tensor.name)
    alike = Group(task.group.tensors, None)
    lenient = settings._replace(allow_nonfinite=True)
    for _, (models,) in feed(alike, True, ahead, lenient).blocks(sample=False):
        for tensor, row in zip(others, models[1:], strict=True):
            if row.tobytes() != models[0].tobytes():
                why = f"differs from {first.file}; {first.dtype} tensors are not merged"
                raise refuse(tensor.file, why, tensor=tensor.name)
        yield models[0].astype(task.dtype)


def _fingerprint(task: Task) -> tuple[Any, ...]:
    """Tasks with one fingerprint share their passes."""
    method = task.method
    assert method is not None
    name = task.name if is_random(method) else ""
    return (name, *_bound(method), task.group.avals(), task.dtype)


def _bound(method: Callable[..., Any]) -> tuple[Any, ...]:
    """A method and its hyperparameters, as something hashable."""
    if not isinstance(method, ft.partial):
        return (method,)
    values = sorted(method.keywords.items())
    return (method.func, *((k, _frozen(v)) for k, v in values))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    return value


class _Joint(NamedTuple):
    """Tensors whose results depend on each other: all are passed over first."""

    index: dict[str, int]
    plan: rewrite.Passes
    known: dict[int, Any]
    blocks: Callable[[int, bool], Iterator[Any]]

    @classmethod
    def of(
        cls, tasks: Sequence[Task], settings: Settings, ahead: ThreadPoolExecutor
    ) -> "_Joint | None":
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
    bound = _Bound(_bound(task.method), task.method)
    return _leafwise_method(bound, len(task.group.models))


class _Bound(NamedTuple):
    key: tuple[Any, ...]
    method: Any

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self.key == other.key


@ft.lru_cache(maxsize=4096)
def _leafwise_method(bound: _Bound, k: int) -> bool:
    method: Callable[..., Any] = bound.method
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
        if len({_frozen(v) for v in values}) == 1:
            out[name] = values[0]
        else:
            paths = [to_path(t.name) for t in tasks]
            out[name] = dict(zip(paths, values, strict=True))
    return ft.partial(functions.pop(), **out)
