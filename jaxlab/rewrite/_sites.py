"""Operations that consume a params leaf, and their arrays as rows of a matrix product.

Every array of such an operation has its axes labelled: an axis is rows (None), or made
of atoms of the leaf. From the labels follow the canonical form `[*batch, rows, n or m]`
and the way back.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from jax import Array
import jax.numpy as jnp

from ._matrix import Use
from ._views import REPEAT, Atom, Axis, View, split

Labels = tuple[Axis | None, ...]
POINTWISE = frozenset({"add", "add_any", "sub", "mul", "div", "max", "min", "pow"})


class Site(NamedTuple):
    """One operand of one equation that is (a view of) a params leaf."""

    use: Use
    view: View
    operand: int
    eqn: Any
    batch: frozenset[Atom]
    inputs: Labels | None  # of the input as `rows` prepares it; None: not followed
    outputs: Labels | None

    @property
    def key(self) -> tuple[str, tuple[Axis, ...]]:
        """The leaf, and what scans have sliced away."""
        return self.view.path, self.view.levels


def site(eqn: Any, operand: int, view: View) -> Site:
    """How an equation uses a leaf."""
    name = eqn.primitive.name
    found = None
    if name == "dot_general":
        found = _dot(eqn, operand, view)
    elif name == "conv_general_dilated" and operand == 1:
        found = _conv(eqn, view)
    elif name == "gather" and operand == 0:
        found = _gather(eqn, view)
    elif name in POINTWISE:
        shape = eqn.outvars[0].aval.shape
        pairs = zip(shape, view.axes, strict=False)
        same = tuple(axis if n == size(axis) else None for n, axis in pairs)
        labels = same if len(same) == len(shape) else (None,) * len(shape)
        return Site(_use(view, name, {}), view, operand, eqn, _NONE, labels, labels)
    if found is None:
        return opaque(eqn, operand, view)
    roles, inputs, outputs = found
    batch = frozenset(a for a, role in roles.items() if role == "batch")
    use = _use(view, name, roles)
    return Site(use, view, operand, eqn, batch, inputs, outputs)


def opaque(eqn: Any, operand: int, view: View) -> Site:
    """A use that is known by name only."""
    use = _use(view, eqn.primitive.name, {})
    return Site(use, view, operand, eqn, _NONE, None, None)


_NONE: frozenset[Atom] = frozenset()
Roles = dict[Atom, str]


def size(axis: Axis) -> int:
    """How long an axis is."""
    return math.prod(a.size for a in axis)


def _use(view: View, primitive: str, roles: Roles) -> Use:
    """The public record: leaf axes by role, split where one axis has several."""
    every = {a: "stacked" for level in view.levels for a in level} | roles
    shape: list[int] = []
    axes: dict[str, list[int]] = {r: [] for r in _ROLES}
    for axis, n in enumerate(view.shape):
        mine = sorted((a for a in every if a.axis == axis), key=_rank)
        real = [a for a in mine if a.size > 1]
        parts = [(every[a], a.size) for a in real or mine[:1]]
        rest = n // math.prod(k for _, k in parts)
        if rest > 1 or not parts:
            parts.append(("free" if roles else "", rest))
        for i, (role, k) in enumerate(parts):
            if i and role == parts[i - 1][0]:
                shape[-1] *= k
                continue
            axes.setdefault(role, []).append(len(shape))
            shape.append(k)
    stacked, batch, contracted, free = (tuple(axes[r]) for r in _ROLES)
    return Use(view.path, primitive, stacked, batch, contracted, free, tuple(shape))


_ROLES = ("stacked", "batch", "contracted", "free")


def _rank(atom: Atom) -> tuple[int, int]:
    """The order of the leaf."""
    return atom.axis, -atom.stride


def _roles(**axes: Sequence[Axis]) -> Roles | None:
    """Atoms by role; None where the leaf is repeated along what it sums or puts out."""
    out: Roles = {}
    for role, members in axes.items():
        for atom in (a for axis in members for a in axis):
            if atom.axis != REPEAT:
                out[atom] = role
            elif role != "batch":
                return None
    return out


Found = tuple[Roles, Labels, Labels]


def _dot(eqn: Any, operand: int, view: View) -> Found | None:
    contract, batch = eqn.params["dimension_numbers"]
    mine_c, mine_b = contract[operand], batch[operand]
    pick = lambda dims: tuple(view.axes[d] for d in dims)
    rest = [d for d in range(len(view.axes)) if d not in (*mine_c, *mine_b)]
    free, shared, summed = pick(rest), pick(mine_b), pick(mine_c)
    roles = _roles(batch=shared, contracted=summed, free=free)
    if roles is None:
        return None
    other = eqn.invars[1 - operand].aval.ndim
    rows: Labels = (None,) * (other - len(mine_c) - len(mine_b))
    outputs = (*shared, *(free + rows if operand == 0 else rows + free))
    return roles, (*shared, *rows, *summed), outputs


def _conv(eqn: Any, view: View) -> Found | None:
    p = eqn.params
    groups, spec = p["feature_group_count"], p["dimension_numbers"].rhs_spec
    out, into, *space = (view.axes[d] for d in spec)
    halves = split(out, groups) if groups > 1 else ((), out)
    if p["batch_group_count"] != 1 or halves is None:
        return None
    batch, free = halves
    roles = _roles(batch=[batch], contracted=[into, *space], free=[free])
    if roles is None or any(a.axis == REPEAT for a in batch):
        return None
    rows: Labels = (None,) * (1 + len(space))
    return roles, (*rows, batch, into, *space), (*rows, (*batch, *free))


def _gather(eqn: Any, view: View) -> Found | None:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    gone, places = numbers.collapsed_slice_dims, numbers.start_index_map
    rest = [d for d in range(len(shape)) if d not in gone]
    full = all(sizes[d] == shape[d] for d in rest)
    batched = getattr(numbers, "operand_batching_dims", ())
    if sorted(gone) != sorted(places) or not full or batched:
        return None
    free = tuple(view.axes[d] for d in rest)
    summed = tuple(view.axes[d] for d in places)
    roles = _roles(contracted=summed, free=free)
    if roles is None:
        return None
    outputs: list[Axis | None] = [None] * eqn.outvars[0].aval.ndim
    for place, axis in zip(numbers.offset_dims, free, strict=True):
        outputs[place] = axis
    rows: Labels = (None,) * (eqn.invars[1].aval.ndim - 1)
    return roles, (*rows, *summed), tuple(outputs)


def canonical(x: Array, labels: Labels, site: Site) -> Array:
    """An array with labelled axes as `[*batch, rows, rest]`."""
    sizes, order, ends = _layout(x.shape, labels, site)
    turned = x.reshape(sizes).transpose(order)
    front = [site.use.shape[a] for a in site.use.batch]
    rows = math.prod(turned.shape[ends[0] : ends[1]])
    return turned.reshape(*front, rows, math.prod(turned.shape[ends[1] :]))


def placed(x: Array, labels: Labels, site: Site, shape: Sequence[int]) -> Array:
    """The inverse of `canonical`: an array of the given shape."""
    sizes, order, _ = _layout(shape, labels, site)
    back = sorted(range(len(order)), key=order.__getitem__)
    turned = x.reshape([sizes[i] for i in order]).transpose(back)
    return turned.reshape(tuple(shape))


def _layout(
    shape: Sequence[int], labels: Labels, site: Site
) -> tuple[list[int], list[int], tuple[int, int]]:
    """Sizes of all atoms, their order, and where rows begin and end in it."""
    tags: list[tuple[int, Atom | None]] = []
    for n, label in zip(shape, labels, strict=True):
        if label is None:
            tags.append((n, None))
            continue
        real = [a for a in label if a.size > 1]
        tags += [(a.size, None if a.axis == REPEAT else a) for a in real]
    rank = {i: _rank(a) for i, (_, a) in enumerate(tags) if a is not None}
    known = sorted(rank, key=rank.__getitem__)
    front = [i for i in known if tags[i][1] in site.batch]
    tail = [i for i in known if tags[i][1] not in site.batch]
    rows = [i for i in range(len(tags)) if i not in rank]
    order = front + rows + tail
    return [n for n, _ in tags], order, (len(front), len(front) + len(rows))


def seen(leaf: Array, site: Site, dtype: Any) -> Array:
    """A leaf, its stacked axes sliced away, as the operation has it.

    Floating-point values are cast; a mask is not.
    """
    atoms = [a for axis in site.view.axes for a in axis if a.size > 1]
    real = sorted((a for a in atoms if a.axis != REPEAT), key=_rank)
    order = [real.index(a) for a in atoms if a.axis != REPEAT]
    turned = leaf.reshape([a.size for a in real]).transpose(order)
    ones = turned.reshape([1 if a.axis == REPEAT else a.size for a in atoms])
    wide = jnp.broadcast_to(ones, [a.size for a in atoms])
    out = wide.reshape(site.eqn.invars[site.operand].aval.shape)
    return out.astype(dtype) if jnp.issubdtype(out.dtype, jnp.inexact) else out


def by_level(x: Array, site: Site) -> Array:
    """`[*stacked, ...]` with one leading axis per scan, outermost first."""
    program = [a for level in site.view.levels for a in level]
    leaf = sorted(program, key=_rank)
    rest = x.shape[len(site.use.stacked) :]
    split_ = x.reshape([a.size for a in leaf] + list(rest))
    order = [leaf.index(a) for a in program]
    order += range(len(order), split_.ndim)
    return split_.transpose(order).reshape([*map(size, site.view.levels), *rest])


def by_axis(x: Array, site: Site) -> Array:
    """The inverse of `by_level`."""
    program = [a for level in site.view.levels for a in level]
    leaf = sorted(program, key=_rank)
    rest = x.shape[len(site.view.levels) :]
    split_ = x.reshape([a.size for a in program] + list(rest))
    order = [program.index(a) for a in leaf]
    order += range(len(order), split_.ndim)
    stacked = [site.use.shape[a] for a in site.use.stacked]
    return split_.transpose(order).reshape([*stacked, *rest])
