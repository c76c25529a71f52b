"""What can be made wider: the label axes of two models, and the widths of a program."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import rewrite, tree
from ..rewrite import Symmetries
from ..types import Apply, Params, Where
from ._descent import by_path
from ._features import Uses
from ._widen import Wide


def side_by_side(
    a: Params, b: Params, symmetries: Symmetries, heads: Where | None
) -> tuple[Params, Params, dict[str, tuple[int, int]]]:
    """Both models with the labels of both, 0 in the other; and where B's begin."""
    if heads is None:
        return a, b, {}
    ours, theirs = by_path(a), by_path(b)
    chosen = [p for p in ours if heads(p, ours[p])]
    if not chosen:
        raise ValueError(f"{heads} selects no leaf of {list(ours)[:5]}...")
    found = {}
    for path in chosen:
        x, y = ours[path], theirs.get(path)
        if y is None or x.ndim != y.ndim:
            raise ValueError(f"params_b has no leaf {path!r} of {x.ndim} axes")
        axis = _label_axis(path, x, symmetries)
        found[path] = axis, x.shape[axis]
        ours[path] = _padded(x, y.shape[axis], axis, before=False)
        theirs[path] = _padded(y, x.shape[axis], axis, before=True)
    put = lambda tree_, leaves: tree.path_map(lambda p, _: leaves[p], tree_)
    return put(a, ours), put(b, theirs), found


def check_width(
    apply: Apply, wide: Wide, params: Params, narrow: Params, inputs: tuple[Any, ...]
) -> Uses:
    """The uses of the wide model; raises, by group, where `apply` is of one width."""
    grown = [
        g.name
        for g, h in zip(wide.symmetries.groups, wide.resized.groups, strict=True)
        if g.size != h.size
    ]
    want = jax.eval_shape(apply, narrow, *inputs)
    if _runs(apply, wide.resized, params, inputs, want):
        return rewrite.uses(apply, params, *inputs)
    for name in grown:
        one = {name: wide.units[name]}
        sizes = {name: wide.units[name].shape[-1]}
        if wide.units[name].shape[:-1] != _counts(wide.symmetries)[name]:
            continue
        shapes = jax.eval_shape(
            lambda x, one=one: rewrite.select(x, wide.symmetries, one), narrow
        )
        groups = rewrite.resized(wide.symmetries, sizes)
        if not _runs(apply, groups, shapes, inputs, want):
            raise ValueError(
                f"apply is not the same function at another width of group {name!r}: "
                f"{sizes[name]} units in place of {_sizes(wide.symmetries)[name]}"
            )
    raise ValueError(f"apply is not the same function at other widths of {grown}")


def _runs(
    apply: Apply, groups: Symmetries, params: Params, inputs: tuple[Any, ...], want: Any
) -> bool:
    """Does `apply` take these parameters, to outputs alike, with these groups?"""
    try:
        got = jax.eval_shape(apply, params, *inputs)
        same = jax.tree.map(
            lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), got, want
        )
        found = rewrite.symmetries(apply, params, *inputs)
    except (TypeError, ValueError):
        return False
    sets = [{(m.path, m.place) for m in g.members} for g in found.groups]
    every = [{(m.path, m.place) for m in g.members} for g in groups.groups]
    alike = all(any(e <= s for s in sets) for e in every)
    return alike and all(jax.tree.leaves(same))


def _counts(symmetries: Symmetries) -> Mapping[str, tuple[int, ...]]:
    return {g.name: g.counts for g in symmetries.groups}


def _sizes(symmetries: Symmetries) -> Mapping[str, int]:
    return {g.name: g.size for g in symmetries.groups}


def _label_axis(path: str, leaf: Array, symmetries: Symmetries) -> int:
    """The one axis longer than 1 that no group permutes."""
    taken = {
        m.place.axis for g in symmetries.groups for m in g.members if m.path == path
    }
    free = [i for i, n in enumerate(leaf.shape) if i not in taken and n > 1]
    if len(free) != 1:
        raise ValueError(
            f"heads: {path!r} of shape {leaf.shape} needs one axis of labels, but the "
            f"axes {free} are in no group"
        )
    return free[0]


def _padded(leaf: Array, more: int, axis: int, *, before: bool) -> Array:
    """The leaf with zeros for the labels of the other model."""
    shape = (*leaf.shape[:axis], more, *leaf.shape[axis + 1 :])
    zeros = jnp.zeros(shape, leaf.dtype)
    return jnp.concatenate([zeros, leaf] if before else [leaf, zeros], axis)
