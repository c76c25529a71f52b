"""A model of the units of two: some merged, the others kept from both."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from .. import rewrite, tree
from ..rewrite import Group, Member, Symmetries
from ..types import Params
from ._descent import by_path
from ._features import Uses, is_product, numbers, tells
from ._tables import Tables, placed

MERGED, FIRST, SECOND = range(3)
SCALED = frozenset({"mul", "div", "dot_general"})


class Wide(NamedTuple):
    """How a wider model is made of the units of two models of one shape."""

    symmetries: Symmetries  # of both models
    resized: Symmetries  # of the wide one
    units: Tables  # `[*counts, wider]` the unit that each comes from
    kinds: dict[str, np.ndarray]  # `[wider]` MERGED, FIRST or SECOND
    roles: dict[tuple[str, Member], frozenset[str]]  # of what `roles` returns
    heads: dict[str, tuple[int, int]]  # by path, an output axis and where B's begin


class Sides(NamedTuple):
    """Of each entry of a wide leaf: does it belong to A, does it belong to B?"""

    a: np.ndarray
    b: np.ndarray


def blocks(
    symmetries: Symmetries,
    scores: Mapping[str, np.ndarray],
    shares: Mapping[str, float],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The units of each group that stay merged, and those that do not; best first.

    `scores` `[*counts, n]` say how well a unit of one model fits its match.
    """
    merged, apart = {}, {}
    for g in symmetries.groups:
        order = np.argsort(-scores[g.name], -1, kind="stable")
        kept = g.size - round(shares.get(g.name, 0.0) * g.size)
        merged[g.name] = np.sort(order[..., :kept], -1).astype(np.int32)
        apart[g.name] = np.sort(order[..., kept:], -1).astype(np.int32)
    return merged, apart


def widen(
    symmetries: Symmetries,
    merged: Mapping[str, np.ndarray],
    apart: Mapping[str, np.ndarray],
    roles: dict[tuple[str, Member], frozenset[str]],
    heads: dict[str, tuple[int, int]],
) -> Wide:
    """Puts the merged units first, then the rest of A, then the rest of B."""
    units, kinds = {}, {}
    for g in symmetries.groups:
        m, s = merged[g.name], apart[g.name]
        table = np.concatenate([m, s, s], -1)
        for outer in symmetries.groups:
            if outer.name in g.per:
                index, axis = placed(units[outer.name], outer, g)
                table = np.take_along_axis(table, index, axis)
        units[g.name] = table
        kinds[g.name] = np.repeat(np.arange(3), [m.shape[-1], *[s.shape[-1]] * 2])
        for member in g.members if s.size else ():
            if len(roles[g.name, member]) > 1 and "mixed" in roles[g.name, member]:
                raise ValueError(
                    f"{member.path!r} both reads and makes the units of {g.name!r}, or "
                    f"may, which then cannot be kept apart: give it a size of 0"
                )
    sizes = {n: len(k) for n, k in kinds.items()}
    resized = rewrite.resized(symmetries, sizes)
    return Wide(symmetries, resized, units, kinds, roles, heads)


def partial_merge(wide: Wide, a: Params, b: Params) -> Params:
    """Both models in one: what is merged is averaged, what is not stands side by side.

    A unit kept from A reads what is left of A and what is merged. A merged one reads
    everything, and averages what each model feeds it.
    """
    ours, theirs = (rewrite.select(x, wide.symmetries, wide.units) for x in (a, b))

    def leaf(path: str, x: Array, y: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        out = sides(wide, path, x.shape, "output")
        seen = sides(wide, path, x.shape, "input", "output")
        half = np.where(out.a & out.b, 0.5, 1.0)
        p, q = tree.widen(x), tree.widen(y)
        mine, others = ((half * s).astype(p.dtype) for s in seen)
        return (p * mine + q * others).astype(x.dtype)

    return tree.path_map(leaf, ours, theirs)


def sides(wide: Wide, path: str, shape: tuple[int, ...], *which: str) -> Sides:
    """Whose the entries of a wide leaf are, by the units on some sides of its use."""
    a, b = np.ones(shape, bool), np.ones(shape, bool)
    for old, new in zip(wide.symmetries.groups, wide.resized.groups, strict=True):
        kind = wide.kinds[old.name]
        for member, there in zip(old.members, new.members, strict=True):
            if member.path != path or (kind == MERGED).all():
                continue
            if wide.roles[old.name, member] & {*which}:
                a = _masked(a, there, new, kind != SECOND)
                b = _masked(b, there, new, kind != FIRST)
    if path in wide.heads and "output" in which:
        axis, start = wide.heads[path]
        index = np.expand_dims(
            np.arange(shape[axis]), tuple(range(1, len(shape) - axis))
        )
        a, b = a & (index < start), b & (index >= start)
    return Sides(a, b)


def roles(
    uses: Uses, params: Params, symmetries: Symmetries
) -> dict[tuple[str, Member], frozenset[str]]:
    """On which sides of the use of its leaf the units of each member are.

    "input" where they are summed over, "output" where they are made, both for experts;
    "mixed" besides where two uses of the leaf disagree, or where a leaf of several axes
    is first multiplied by something else: what it is for then is not known.
    """
    out = {}
    shapes = {p: np.shape(x) for p, x in by_path(params).items()}
    for group in symmetries.groups:
        for member in group.members:
            found = {
                frozenset(
                    side
                    for side in ("input", "output")
                    if tells(numbers(use, shapes[member.path], side), member, group)
                )
                for use in uses[member.path]
                if is_product(use)
            }
            every = frozenset[str]().union(*found) or frozenset({"output"})
            scaled = len(shapes[member.path]) > 1 and any(
                not is_product(use) and use.primitive in SCALED
                for use in uses[member.path]
            )
            mixed = frozenset({"mixed"} if len(found) > 1 or scaled else ())
            out[group.name, member] = every | mixed
    return out


def _masked(
    mask: np.ndarray, member: Member, group: Group, keep: np.ndarray
) -> np.ndarray:
    """The mask without the units of a group that are not kept."""
    whole = jnp.asarray(mask)
    entries = rewrite.unfold(whole, member, group) & keep[:, None]
    return np.asarray(rewrite.fold(whole, member, group, entries))
