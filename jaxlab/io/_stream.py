"""Streams a merge: one tensor at a time, in blocks, by the function used in memory."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import rewrite, tree
from ._errors import refuse
from ._feed import KEEP, Feed, Group, Settings, feed, rows_per_block
from ._joint import Joint, together
from ._names import to_path
from ._task import Task, fingerprint, group_leaf, is_double, leaf_function


def stream(
    todo: Sequence[Task], tasks: Sequence[Task], settings: Settings, memo: "Memo"
) -> Iterator[tuple[Task, Iterator[np.ndarray]]]:
    """Computes the tasks `todo`, some or all of `tasks`, one after another.

    Yields (task, its blocks in order). A method whose leaves depend on each other, such
    as a trim over all weights of a model, first passes over all of `tasks`.
    """
    with ThreadPoolExecutor(1) as ahead:
        joint = Joint.of(tasks, settings, ahead)
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
    what a search for a threshold keeps; all of a tensor, and of what is made of it on
    the way, where a method needs all of it; of all tensors where it needs those.
    """
    real = [t for t in tasks if math.prod(t.shape)]
    held = {t.name for t in together(real)}
    most, joined, whole = 0, 0, {}
    for task in real:
        if task.method is None:
            kind = "flat"
        else:
            kind = "whole" if task.name in held else _planned(task, settings, memo)[0]
        if kind == "whole":
            need = whole.get(key := fingerprint(task)) or _whole_bytes(task, settings)
            whole[key] = need
        else:
            need = _block_bytes(task, kind)
        joined += need if task.name in held else 0
        most = max(most, need)
    return max(most, joined)


class Memo(NamedTuple):
    """How tensors are cut, learnt once from the first of those that are alike."""

    kinds: dict[Any, tuple[str, str, rewrite.Passes | None]]  # name, kind, passes


def _whole_bytes(task: Task, settings: Settings) -> int:
    """What a task takes that is computed all at once."""
    group = task.group
    with jax.enable_x64(is_double(task)):
        live = rewrite.live_bytes(leaf_function(task, settings), *group.avals())
    return sum(t.nbytes for t in group.tensors) + live


def _block_bytes(task: Task, kind: str) -> int:
    """What a task takes that is computed in blocks."""
    group, shape = task.group, task.group.avals()[0].shape[1:]
    size, entries = math.prod(shape), len(group.tensors)
    width = sum(t.dtype.itemsize for t in group.tensors)
    inner = 1 if kind == "flat" else math.prod(shape[1:])
    rows = rows_per_block(group, inner) * inner
    block = min(size, max(rows, inner))
    kept = min(size * width, KEEP) + min(4 * size * entries, 4 * rewrite.ROOM)
    return block * (3 * width + 8 * (entries + 1)) + kept


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
    """How a task can be cut: "flat", by "rows", or not at all ("whole")."""
    key = fingerprint(task)
    if key not in memo.kinds:
        with jax.enable_x64(is_double(task)):
            memo.kinds[key] = (task.name, *_cut(task, settings))
    name, kind, plan = memo.kinds[key]
    if plan is not None and name != task.name:  # its random bits alone are others
        old, new = (tree.path_number(to_path(n)) for n in (name, task.name))
        plan = rewrite.refolded(plan, old, new)
    return kind, plan


def _cut(task: Task, settings: Settings) -> tuple[str, rewrite.Passes | None]:
    fn = lambda arrays: [leaf_function(task, settings)(*arrays)]
    leaf = group_leaf(task.group)
    if (plan := rewrite.flat(fn, [leaf])) is not None:
        return "flat", plan
    try:
        return "rows", rewrite.passes(fn, [leaf])
    except rewrite.Refused:
        return "whole", None


def _whole(task: Task, settings: Settings, source: Feed) -> Iterator[np.ndarray]:
    """A tensor whose method needs all of it at once."""
    everything = source._replace(step=source.rows)
    ((_, arrays),) = everything.blocks(sample=False)
    with jax.enable_x64(is_double(task)):
        out = jax.jit(leaf_function(task, settings))(*arrays)
    yield np.asarray(out)


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
