"""The slices and splits that expose a place of an array, and their inverse."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from ._groups import Factor, Member, Pick, Segment

Step = Factor | Segment | Pick


def shifted(
    steps: tuple[Step, ...], cut: tuple[Step, ...], size: int
) -> tuple[Step, ...]:
    """The steps to a place, after the place at the end of `cut` became `size`."""
    if not steps or not cut:
        return steps
    (a, *rest), (b, *below) = steps, cut
    inside = tuple(rest)
    if a == b:
        inside = shifted(tuple(rest), tuple(below), size)
    if isinstance(a, Factor) and isinstance(b, Factor):
        grown = _grown(tuple(below), b.sizes[b.index], size)
        sizes = (*a.sizes[: b.index], grown, *a.sizes[b.index + 1 :])
        return (Factor(sizes, a.index), *inside)
    if not (isinstance(a, Segment) and isinstance(b, Segment)):
        raise ValueError("units of a reordered axis cannot be left out: their order "
                         "is stated by the program")  # fmt: skip
    more = _grown(tuple(below), b.size, size) - b.size
    moved = Segment(a.offset + more * (a.offset > b.offset), a.size + more * (a == b))
    return (moved, *inside)


def _grown(steps: tuple[Step, ...], old: int, size: int) -> int:
    """The new length of an axis of length `old`, on which `steps` lead to `size`."""
    if not steps:
        return size
    first, *rest = steps
    if isinstance(first, Segment):
        return old - first.size + _grown(tuple(rest), first.size, size)
    assert isinstance(first, Factor)
    part = first.sizes[first.index]
    return old // part * _grown(tuple(rest), part, size)


def view(member: Member, ndim: int) -> tuple[list[tuple[int, Step]], list[int]]:
    """The slices and splits that expose a member, and the order of axes after them.

    The order puts the axes of `per` first, the group's axis next, all others last.
    """
    places = (*member.per, member.place)
    steps, labels = [], []
    for axis in range(ndim):
        here = [(i, p.steps) for i, p in enumerate(places) if p.axis == axis]
        more, found = _expand(len(labels), here)
        steps += more
        labels += found
    front = [labels.index(i) for i in range(len(places))]
    return steps, front + [i for i in range(len(labels)) if i not in front]


def _expand(
    axis: int, chains: list[tuple[int, tuple[Step, ...]]]
) -> tuple[list[tuple[int, Step]], list[int | None]]:
    """The steps on one axis of all places on it, and which place each new axis is."""
    if not chains:
        return [], [None]
    if any(not steps for _, steps in chains):
        ((label, _),) = chains
        return [], [label]
    first = chains[0][1][0]
    if not isinstance(first, Factor):
        more, labels = _expand(axis, [(i, steps[1:]) for i, steps in chains])
        return [(axis, first), *more], labels
    out: list[tuple[int, Step]] = [(axis, first)]
    labels: list[int | None] = []
    for index in range(len(first.sizes)):
        inner = [(i, steps[1:]) for i, steps in chains if steps[0].index == index]
        more, found = _expand(axis + len(labels), inner)
        out += more
        labels += found
    return out, labels


def unroll(x: Array, steps: Sequence[tuple[int, Step]]) -> list[Array]:
    """The array after each of the steps, itself first."""
    stages = [x]
    for axis, step in steps:
        if isinstance(step, Segment):
            end = step.offset + step.size
            x = jax.lax.slice_in_dim(x, step.offset, end, axis=axis)
        elif isinstance(step, Pick):
            x = jnp.take(x, np.array(step.positions), axis)
        else:
            x = x.reshape((*x.shape[:axis], *step.sizes, *x.shape[axis + 1 :]))
        stages.append(x)
    return stages


def roll(x: Array, stages: Sequence[Array], steps: Sequence[tuple[int, Step]]) -> Array:
    """Puts a changed last stage back into the first; sizes may have changed."""
    for whole, (axis, step) in zip(stages[-2::-1], steps[::-1], strict=True):
        if isinstance(step, Segment):
            end, full = step.offset + step.size, whole.shape[axis]
            before = jax.lax.slice_in_dim(whole, 0, step.offset, axis=axis)
            after = jax.lax.slice_in_dim(whole, end, full, axis=axis)
            x = jnp.concatenate([before, x, after], axis)
        elif isinstance(step, Pick):
            x = jnp.take(x, np.argsort(step.positions), axis)
        else:
            n = len(step.sizes)
            flat = int(np.prod(x.shape[axis : axis + n]))
            x = x.reshape((*x.shape[:axis], flat, *x.shape[axis + n :]))
    return x
