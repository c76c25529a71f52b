"""Where a program meets the units of a group as features, and moments of those.

A feature is a column of what goes into (or comes out of) the operation on a leaf, as
`rewrite.as_matrix` lays it out. An array of the leaf's shape that holds the number of
each entry's feature says which features a unit has, whatever the steps to its place.
"""

from collections.abc import Callable, Iterable, Mapping
import itertools as it
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from .. import rewrite, tree
from ..rewrite import Group, Member, Symmetries, Use
from ..types import Apply, Params

Side = Literal["input", "output"]
Uses = Mapping[str, tuple[Use, ...]]


class Reading(NamedTuple):
    """The features of one side of the operation on a leaf."""

    use: Use
    side: Side
    joint: bool  # is one block made of all: do groups reach across experts or layers?
    kept: tuple[int, ...]  # of the features of a block, those that are looked at

    @property
    def features(self) -> int:
        """How many features a block has."""
        return math.prod(
            self.use.shape[a] for a in _axes(self.use, self.side, self.joint)
        )


def matrix_use(uses: Uses, path: str) -> Use | None:
    """The one product of matrices that a leaf is used in, or None."""
    found = [u for u in uses[path] if is_product(u)]
    return found[0] if len(found) == 1 else None


def is_product(use: Use) -> bool:
    """Is the leaf summed over, as a matrix is?"""
    roles = (*use.stacked, *use.batch, *use.contracted, *use.free)
    return bool(use.contracted) and len(roles) == len(use.shape)


def numbers(use: Use, shape: tuple[int, ...], side: Side) -> np.ndarray:
    """The number of each entry's feature, in the shape of the leaf.

    Numbers count through the blocks (layers, experts), then through the features.
    """
    size = lambda axes: math.prod(use.shape[a] for a in axes)
    lead = size(use.stacked) * size(use.batch)
    n, m = size(use.contracted), size(use.free)
    own = (lead, n, 1) if side == "input" else (lead, 1, m)
    ids = jnp.arange(math.prod(own), dtype=jnp.int32).reshape(own)
    matrix = jnp.broadcast_to(ids, (lead, n, m))
    like: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    return np.asarray(rewrite.from_matrix(matrix, use, like))


def tells(ids: np.ndarray, member: Member, group: Group) -> bool:
    """Has every unit of the group features of its own?"""
    units = np.asarray(rewrite.unfold(jnp.asarray(ids), member, group))
    first, second = units[(0,) * len(group.counts)][:2]
    return not np.intersect1d(first, second).size


def readings(
    uses: Uses, params: Params, symmetries: Symmetries, side: Side
) -> dict[str, Reading]:
    """By path, the matrix products that meet some group's units on one side."""
    shapes = {p: np.shape(x) for p, x in zip_paths(params)}
    out = {}
    for path in dict.fromkeys(m.path for g in symmetries.groups for m in g.members):
        use, shape = matrix_use(uses, path), shapes[path]
        if use is None:
            continue
        mine = [(m, g) for g in symmetries.groups for m in g.members if m.path == path]
        mine = [x for x in mine if tells(numbers(use, shape, side), *x)]
        if mine:
            other = numbers(use, shape, "output" if side == "input" else "input")
            joint = any(tells(other, *x) for x in mine)
            kept = _kept(use, shape, side, joint, mine)
            out[path] = Reading(use, side, joint, kept)
    return out


def stream(
    apply: Apply,
    params_a: Params,
    params_b: Params,
    batches: Iterable[Any],
    found: Mapping[str, Reading],
    reduce: Callable[[Array, Array], Any],
) -> dict[str, Any]:
    """The sum over batches of `reduce(x_a, x_b)`, of both models' features, by name.

    Each is `[blocks, rows, features]`, with the features that are kept.
    """
    names = {side: {r.use.path: n for n, r in found.items() if r.side == side}
             for side in get_args(Side)}  # fmt: skip
    used = {r.use for r in found.values()}
    captures = {
        side: rewrite.capture(
            apply,
            where=lambda p, _, mine=mine: p in mine,
            reduce=lambda x: x,
            of=side,
            only=lambda u: u in used,
        )
        for side, mine in names.items()
        if mine
    }

    def features(params: Params, *inputs: Any) -> dict[str, Array]:
        return {
            names[side][p]: _blocks(x, found[names[side][p]])
            for side, captured in captures.items()
            for p, x in captured(params, *inputs)[1].items()
        }

    @jax.jit
    def one(a: Params, b: Params, *inputs: Any) -> dict[str, Any]:
        x, y = features(a, *inputs), features(b, *inputs)
        return {n: reduce(x[n], y[n]) for n in found}

    total = None
    for batch in batches:
        more = one(params_a, params_b, *as_inputs(batch))
        total = more if total is None else jax.tree.map(jnp.add, total, more)
    return {} if total is None else total


def _blocks(x: Array, reading: Reading) -> Array:
    """`[blocks, rows, kept]` of the canonical `[*stacked, *batch, rows, features]`."""
    x = tree.widen(x)
    if reading.joint:
        x = jnp.moveaxis(x, -2, 0)[None]
        x = x.reshape(1, x.shape[1], -1)
    x = x.reshape(-1, *x.shape[-2:])
    if len(reading.kept) == x.shape[-1]:
        return x
    return x[..., np.array(reading.kept)]


def _kept(
    use: Use, shape: tuple[int, ...], side: Side, joint: bool, mine: list[Any]
) -> tuple[int, ...]:
    """All features of a block, but of the patches of a convolution the middle tap."""
    axes = _axes(use, side, joint)
    sizes = [use.shape[a] for a in axes]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    if side == "input" and use.primitive == "conv_general_dilated":
        units = [_unit_of(use, shape, *x) for x in mine]
        for i, axis in enumerate(axes):
            if all((u == u.take([0], axis)).all() for u in units):
                ids = ids.take([sizes[i] // 2], i)
    return tuple(ids.reshape(-1).tolist())


def _unit_of(
    use: Use, shape: tuple[int, ...], member: Member, group: Group
) -> np.ndarray:
    """The unit of each entry of a leaf, in the shape that its use views it in."""
    leaf = jnp.zeros(shape, jnp.int32)
    entries = rewrite.unfold(leaf, member, group)
    units = jnp.arange(group.size, dtype=jnp.int32)[:, None]
    units = jnp.broadcast_to(units, entries.shape)
    return np.asarray(rewrite.fold(leaf, member, group, units)).reshape(use.shape)


def _axes(use: Use, side: Side, joint: bool) -> tuple[int, ...]:
    """The axes of the view of a leaf that count the features of a block."""
    own = use.contracted if side == "input" else use.free
    return (*use.stacked, *use.batch, *own) if joint else own


def peek(batches: Iterable[Any]) -> tuple[tuple[Any, ...], Iterable[Any]]:
    """The inputs of the first batch, and all batches; raises where there is none."""
    rest = iter(batches)
    for first in rest:
        return as_inputs(first), it.chain([first], rest)
    raise ValueError("batches is empty: activations need data")


def as_inputs(batch: Any) -> tuple[Any, ...]:
    """What a model is applied to: a tuple, or the one input that a batch is."""
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def zip_paths(params: Params) -> list[tuple[str, Any]]:
    """The leaves with their slash paths."""
    return list(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
