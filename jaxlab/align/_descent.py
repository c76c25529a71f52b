"""Coordinate descent over groups: each is matched while all others stand still."""

from collections.abc import Callable, Sequence
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
import numpy as np

from .. import tree
from ..rewrite import Group, Member, Symmetries, permute
from ._tables import Permutations, Tables, assign, compose, placed, tables

Leaves = dict[str, Any]
ROUNDS = 3  # over the groups inside a unit, for each pair of units


class Likeness(NamedTuple):
    """How alike the units of two models are, from their leaves by path.

    Each is a function of (group, a, b).
    """

    pairs: Callable[..., np.ndarray]
    """`[*counts, n, n]`: unit i of a with unit j of b, the rest of b as it is."""
    matched: Callable[..., np.ndarray]
    """`[*counts, n]`: unit i of a with unit i of b."""
    whole: Callable[..., float] | None = None
    """What both models score on the leaves of a group that meets a leaf twice."""


def descend(
    symmetries: Symmetries,
    a: Leaves,
    b: Leaves,
    likeness: Likeness,
    *,
    key: PRNGKeyArray,
    iterations: int,
    start: Permutations,
) -> Tables:
    """The permutations of b that are found when no single group can gain any more."""
    total = tables(symmetries, start)
    b = moved(symmetries, b, total)
    groups = symmetries.groups
    for sweep in range(iterations):
        order = jax.random.permutation(jax.random.fold_in(key, sweep), len(groups))
        gained = False
        for i in np.asarray(order):
            found = _step(symmetries, groups[i], a, b, likeness)
            if found:
                b = moved(symmetries, b, found)
                total = compose(symmetries, total, found)
                gained = True
        if not gained:
            break
    return total


def moved(symmetries: Symmetries, leaves: Leaves, permutations: Tables) -> Leaves:
    """The leaves after permuting; places that are alike share an executable."""
    leaves = dict(leaves)
    for group in symmetries.groups:
        table = permutations.get(group.name)
        if table is None or (table == np.arange(group.size)).all():
            continue
        for m in group.members:
            if m.path in leaves:
                alone = nameless(group, m)
                leaves[m.path] = _permuted(alone, leaves[m.path], table)
    return leaves


def nameless(group: Group, member: Member) -> Group:
    """A group of one member and no names: those of layers alike are equal."""
    per = ("",) * len(group.per)
    return Group("", group.size, (member._replace(path=""),), per, group.counts)


def _step(
    symmetries: Symmetries, group: Group, a: Leaves, b: Leaves, likeness: Likeness
) -> Tables:
    """What the group, and those inside its units, change to gain; {} where nothing."""
    inner = _inside(symmetries, group)
    if inner:
        scores, options = _paired(symmetries, group, inner, a, b, likeness)
        before = likeness.matched(group, a, b)
    else:
        scores, options = likeness.pairs(group, a, b), {}
        before = np.diagonal(scores, 0, -2, -1)
    table = assign(scores)
    after = np.take_along_axis(scores, table[..., None], -1)[..., 0]
    found = {group.name: table} | _chosen(symmetries, group, table, options)
    paths = [m.path for m in group.members]
    if likeness.whole and len(paths) > len(set(paths)):
        then = moved(symmetries, {p: b[p] for p in paths}, found)
        before = np.asarray(likeness.whole(group, a, b))
        after = np.asarray(likeness.whole(group, a, then))
    noise = 8 * np.finfo(after.dtype).eps * (np.abs(after) + np.abs(before)).sum()
    after, before = after.astype(np.float64), before.astype(np.float64)
    return found if (after - before).sum() > noise else {}


def _paired(
    symmetries: Symmetries,
    group: Group,
    inner: Sequence[Group],
    a: Leaves,
    b: Leaves,
    likeness: Likeness,
) -> tuple[np.ndarray, Tables]:
    """Scores of all pairs of units, each with the groups inside it matched first.

    Turning b by s units puts all pairs (i, i + s) face to face, so that the groups
    inside are matched for all of them at once. Also returns, by group, the tables that
    each of the n turns has found.
    """
    n, lead = group.size, (*group.counts, group.size)
    paths = {m.path for m in group.members}
    a, b = ({p: x[p] for p in x if p in paths} for x in (a, b))
    rows, turns = np.arange(n), []
    for s in range(n):
        found = {group.name: np.broadcast_to((rows + s) % n, lead)}
        turned = moved(symmetries, b, found)
        for _ in range(ROUNDS):
            steps = 0
            for one in inner:
                step = _step(symmetries, one, a, turned, likeness)
                turned = moved(symmetries, turned, step)
                found = compose(symmetries, found, step)
                steps += bool(step)
            if not steps:
                break
        turns.append((likeness.matched(group, a, turned), found))
    scores = np.empty((*lead, n), turns[0][0].dtype)
    for s, (score, _) in enumerate(turns):
        scores[..., rows, (rows + s) % n] = score
    names = [g.name for g in symmetries.groups if group.name in g.per]
    return scores, {p: np.stack([found[p] for _, found in turns]) for p in names}


def _chosen(
    symmetries: Symmetries, group: Group, table: np.ndarray, options: Tables
) -> Tables:
    """The tables inside the units, from the turn that each unit was assigned."""
    turn = (table - np.arange(group.size)) % group.size
    out = {}
    for one in symmetries.groups:
        if one.name in options:
            index, _ = placed(turn, group, one)
            out[one.name] = np.take_along_axis(options[one.name], index[None], 0)[0]
    return out


def _inside(symmetries: Symmetries, group: Group) -> list[Group]:
    """The groups that depend on this one, but for those inside one of them."""
    within = [g for g in symmetries.groups if group.name in g.per]
    names = {g.name for g in within}
    return [g for g in within if not names & set(g.per)]


@ft.partial(jax.jit, static_argnames="group")
def _permuted(group: Group, leaf: Array, table: Array) -> Array:
    """One place of a leaf, permuted."""
    return permute({"": leaf}, Symmetries((group,)), {"": table})[""]


def by_path(params: Any) -> Leaves:
    """The leaves of a model by slash path."""
    leaves = map(jnp.asarray, jax.tree.leaves(params))
    return dict(zip(tree.paths(params), leaves, strict=True))
