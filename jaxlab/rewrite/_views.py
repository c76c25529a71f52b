"""Which axes of a params leaf the axes of a value are, through reshapes and casts."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax.numpy as jnp

REPEAT = -1  # the `axis` of an atom along which the leaf is repeated


class Atom(NamedTuple):
    """A factor of an axis: `size` steps of `stride` entries along a leaf's axis."""

    axis: int
    stride: int
    size: int


Axis = tuple[Atom, ...]  # row-major: the last atom is the fastest


class View(NamedTuple):
    """A value that is one params leaf, or a slice of it, but for the order of axes."""

    path: str
    shape: tuple[int, ...]  # of the leaf
    levels: tuple[Axis, ...]  # what enclosing scans have sliced away, outermost first
    axes: tuple[Axis, ...]  # of the value


def whole(path: str, shape: Sequence[int]) -> View:
    """The leaf itself."""
    axes = tuple((Atom(i, 1, n),) for i, n in enumerate(shape))
    return View(path, tuple(shape), (), axes)


def peeled(view: View) -> View:
    """One slice of the leading axis, as a scan takes it."""
    first, rest = view.axes[0], view.axes[1:]
    repeated = not first or any(a.axis == REPEAT for a in first)
    levels = view.levels if repeated else (*view.levels, first)
    return view._replace(levels=levels, axes=rest)


def restacked(view: View, sliced: bool, length: int) -> View:
    """The slices of all iterations, as a scan stacks them."""
    if not sliced:
        return view._replace(axes=((Atom(REPEAT, 1, length),), *view.axes))
    return view._replace(levels=view.levels[:-1], axes=(view.levels[-1], *view.axes))


def follow(eqn: Any, views: Sequence[View | None]) -> list[View | None] | None:
    """The views that an equation's results are, or None where it consumes one."""
    name = eqn.primitive.name
    if name == "optimization_barrier":
        return list(views)
    view = views[0]
    if view is None or any(views[1:]):
        return None
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    axes = None
    if name in _SAME or (name == "convert_element_type" and _exact(old, new)):
        axes = view.axes
    elif name == "transpose":
        axes = tuple(view.axes[i] for i in eqn.params["permutation"])
    elif name == "squeeze":
        gone = eqn.params["dimensions"]
        axes = tuple(a for i, a in enumerate(view.axes) if i not in gone)
    elif name == "expand_dims":
        new_ones = set(eqn.params["dimensions"])
        rest = iter(view.axes)
        axes = tuple(() if i in new_ones else next(rest) for i in range(new.ndim))
    elif name == "broadcast_in_dim":
        axes = _broadcast(view.axes, old.shape, new.shape, eqn.params)
    elif name == "reshape" and eqn.params.get("dimensions") is None:
        axes = _reshape(view.axes, old.shape, new.shape)
    return None if axes is None else [view._replace(axes=axes)]


_SAME = frozenset(
    {
        "copy", "copy_p", "name", "sharding_constraint", "mesh_cast", "reshard",
        "reduce_precision", "stop_gradient", "pvary", "pcast", "layout_constraint",
    }
)  # fmt: skip


def _exact(old: Any, new: Any) -> bool:
    """Does a cast keep the values, but for rounding?"""
    return old.dtype == new.dtype or jnp.issubdtype(new.dtype, jnp.inexact)


def _broadcast(
    axes: Sequence[Axis], old: Sequence[int], new: Sequence[int], params: Any
) -> tuple[Axis, ...]:
    """Axes of the operand keep their atoms; the others repeat it."""
    out: list[Axis] = [(Atom(REPEAT, 1, n),) if n != 1 else () for n in new]
    for i, place in enumerate(params["broadcast_dimensions"]):
        if old[i] == new[place]:
            out[place] = axes[i]
    return tuple(out)


def _reshape(
    axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]
) -> tuple[Axis, ...] | None:
    """Matches runs of axes of equal product and deals the atoms of each."""
    if 0 in old or 0 in new:
        return None
    out: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first = i
        p, q, sizes = 1, 1, []
        if i < len(old):
            p, i = old[i], i + 1
        if j < len(new):
            q, j, sizes = new[j], j + 1, [new[j]]
        while p != q:
            if p < q:
                p, i = p * old[i], i + 1
            else:
                sizes.append(new[j])
                q, j = q * new[j], j + 1
        dealt = _deal([a for axis in axes[first:i] for a in axis], sizes)
        if dealt is None:
            return None
        out += dealt
    return tuple(out)


def _deal(atoms: Sequence[Atom], sizes: Sequence[int]) -> list[Axis] | None:
    """Deals atoms to axes of the given sizes, splitting one where its size divides."""
    left, out = list(atoms), []
    for size in sizes:
        need, mine = size, []
        while left and (need > 1 or left[0].size == 1):
            atom = left.pop(0)
            if need % atom.size == 0:
                mine.append(atom)
                need //= atom.size
            elif atom.size % need == 0:
                rest = atom.size // need
                mine.append(Atom(atom.axis, atom.stride * rest, need))
                left.insert(0, Atom(atom.axis, atom.stride, rest))
                need = 1
            else:
                return None
            if size == 1:
                break
        out.append(joined(mine))
    return out


def joined(atoms: Sequence[Atom]) -> Axis:
    """Joins neighbours that are one run of a leaf's axis."""
    out: list[Atom] = []
    for atom in atoms:
        if out and out[-1].axis == atom.axis != REPEAT:
            before = out[-1]
            if before.stride == atom.stride * atom.size:
                out[-1] = Atom(atom.axis, atom.stride, before.size * atom.size)
                continue
        out.append(atom)
    return tuple(out)


def split(axis: Axis, major: int) -> tuple[Axis, Axis] | None:
    """An axis as (major, rest), or None where no atoms make it so."""
    total = math.prod(a.size for a in axis)
    parts = _deal(axis, (major, total // major))
    return None if parts is None else (parts[0], parts[1])
