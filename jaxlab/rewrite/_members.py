"""From unified terms to groups: who is a member, and what it may depend on."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product as cartesian
from typing import Any, NamedTuple

from ._depends import dependence
from ._groups import Factor, Group, Member, Pick, Place, Segment, describe
from ._terms import LEAF, ORDER, PRODUCT, SUM, Term, find, parts

Step = Factor | Segment | Pick
Axes = Mapping[str, Sequence[Term | None]]


class Even(NamedTuple):
    """A segment of an axis that is cut at equal distances."""

    offset: int
    size: int
    whole: int


class Occurrence(NamedTuple):
    """Where a leaf of a term is on an axis."""

    axis: int
    steps: tuple[Any, ...]


class Found(NamedTuple):
    """The free leaves of the terms of the params."""

    groups: dict[Term, Group]  # each after those that it may depend on
    per: dict[Term, list[Term]]  # what each may depend on
    at: dict[str, dict[Term, list[Occurrence]]]  # where leaves are, by path
    refused: tuple[tuple[str, str], ...]


def groups(axes: Axes, records: Iterable[Any]) -> Found:
    """The free leaves of the terms of the params, each as a group."""
    found: dict[Term, list[tuple[str, Occurrence]]] = {}
    at: dict[str, dict[Term, list[Occurrence]]] = {}
    refused: dict[tuple[str, str], None] = {}
    for path, terms in axes.items():
        at[path] = {}
        for axis, term in enumerate(terms):
            for leaf, steps in _leaves(term) if term is not None else ():
                if leaf.pinned and leaf.why:
                    refused[path, leaf.why] = None
                if leaf.size > 1:
                    here = Occurrence(axis, steps)
                    at[path].setdefault(leaf, []).append(here)
                    if not leaf.pinned:
                        found.setdefault(leaf, []).append((path, here))
    depends = dependence(records, found)
    order = {
        leaf: i
        for i, leaf in enumerate(dict.fromkeys(t for a in at.values() for t in a))
    }
    per = {leaf: sorted(depends.get(leaf, ()), key=order.__getitem__) for leaf in found}
    members = {
        leaf: _merged([m for path, here in places
                       for m in _members(path, here, per[leaf], at[path])])
        for leaf, places in found.items()
    }  # fmt: skip
    names = _names(members)
    name = lambda leaf: names.get(leaf, f"pinned {leaf.size}")
    out = {
        leaf: Group(names[leaf], leaf.size, tuple(members[leaf]),
                    tuple(map(name, per[leaf])), tuple(p.size for p in per[leaf]))
        for leaf in _parents_first(list(found), per)
    }  # fmt: skip
    return Found(out, per, at, tuple(refused))


def pieces(found: Found, leaf: Term) -> Iterator[tuple[str, Occurrence, Member, tuple]]:
    """Every place of a leaf, by path: as a member, and where what it depends on is.

    Equal pieces of an axis are members of their own.
    """
    for path, at in found.at.items():
        for here in at.get(leaf, ()):
            for _, _, near in _members(path, here, found.per[leaf], at):
                per = tuple(_place(o, 1) for o in near)
                yield path, here, Member(path, _place(here, 1), per), near


def occurrences(axes: Sequence[Term | None]) -> dict[Term, list[Occurrence]]:
    """Where each free leaf is in a value, in order."""
    out: dict[Term, list[Occurrence]] = {}
    for axis, term in enumerate(axes):
        for leaf, steps in _leaves(term) if term is not None else ():
            if leaf.size > 1 and not leaf.pinned:
                out.setdefault(leaf, []).append(Occurrence(axis, steps))
    return out


def _leaves(term: Term, before: tuple[Any, ...] = ()) -> Iterator[tuple[Term, tuple]]:
    """The leaves of a term, each with the steps that lead to it."""
    term = find(term)
    if term.kind == LEAF:
        yield term, before
    elif term.kind == ORDER:
        # position i of the axis is position order[i] of the term
        back = sorted(range(term.size), key=term.order.__getitem__)
        yield from _leaves(term.kids[0], (*before, Pick(tuple(back))))
    elif term.kind == PRODUCT:
        kids = parts(term, PRODUCT)
        sizes = tuple(k.size for k in kids)
        for i, kid in enumerate(kids):
            yield from _leaves(kid, (*before, Factor(sizes, i)))
    else:
        offset = 0
        for kid in parts(term, SUM):
            piece = Segment(offset, kid.size)
            step = Even(*piece, term.size) if term.even else piece
            yield from _leaves(kid, (*before, step))
            offset += kid.size


def _members(
    path: str,
    here: Occurrence,
    per: Sequence[Term],
    at: dict[Term, list[Occurrence]],
) -> Iterator[tuple[str, Occurrence, tuple[Occurrence, ...]]]:
    """A place of a group, with each combination of the places it may depend on."""
    near = [[o for o in at[p] if o.axis != here.axis or _beside(here.steps, o.steps)]
            for p in per]  # fmt: skip
    for combo in cartesian(*near):
        pairs = [(a, b) for i, a in enumerate(combo) for b in combo[i + 1 :]]
        if all(a.axis != b.axis or _beside(a.steps, b.steps) for a, b in pairs):
            yield path, here, combo


def _beside(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Do two chains of steps part at two factors of one product?"""
    for x, y in zip(a, b, strict=False):
        if x != y:
            return isinstance(x, Factor) and isinstance(y, Factor)
    return False


def _merged(members: Iterable[tuple]) -> list[Member]:
    """The members; equal pieces of an axis that was cut evenly become a factor."""
    runs: list[list[tuple]] = []
    for member in members:
        if runs and _follows(runs[-1], member):
            runs[-1].append(member)
        else:
            runs.append([member])
    return [
        Member(run[0][0], _place(run[0][1], len(run)),
               tuple(_place(o, len(run)) for o in run[0][2]))
        for run in runs
    ]  # fmt: skip


def _follows(run: list[tuple], member: tuple) -> bool:
    """Is a member the next piece after those of a run, and like them?"""
    (path, first, pers), (other, here, more) = run[0], member
    cut = next((s for s in first.steps if isinstance(s, Even)), None)
    if cut is None or path != other:
        return False
    piece = Even(cut.offset + len(run) * cut.size, cut.size, cut.whole)
    shift = lambda o: o._replace(steps=tuple(piece if s == cut else s for s in o.steps))
    on_axis = lambda o: shift(o) if o.axis == first.axis else o
    return (here, more) == (shift(first), tuple(map(on_axis, pers)))


def _place(o: Occurrence, run: int) -> Place:
    """A place; `run` equal pieces that follow each other are one more factor."""
    steps: list[Any] = list(o.steps)
    for i, step in enumerate(steps):
        if isinstance(step, Even):
            offset, size, whole = step
            steps[i : i + 1] = (
                [Segment(offset, run * size)] if run * size < whole else []
            )
            if run > 1:
                at = i + (run * size < whole)
                inner = steps[at] if at < len(steps) else None
                if isinstance(inner, Factor):
                    steps[at] = Factor((run, *inner.sizes), inner.index + 1)
                else:
                    steps.insert(at, Factor((run, size), 1))
            break
    steps = [Segment(s.offset, s.size) if isinstance(s, Even) else s for s in steps]
    return Place(o.axis, tuple(steps))


def _names(members: dict[Term, list[Member]]) -> dict[Term, str]:
    """The place of the first member; another number where two would be alike."""
    out, taken = {}, set()
    for leaf, found in members.items():
        first = name = f"{found[0].path}:{describe(found[0].place)}"
        for i in range(2, 2 + len(taken)):
            if name not in taken:
                break
            name = f"{first}#{i}"
        taken.add(name)
        out[leaf] = name
    return out


def _parents_first(leaves: list[Term], per: dict[Term, list[Term]]) -> list[Term]:
    """Each leaf after those that it may depend on, as far as that can be."""
    out: dict[Term, None] = {}
    open_now: set[Term] = set()

    def visit(leaf: Term) -> None:
        if leaf in out or leaf in open_now or leaf not in per:
            return
        open_now.add(leaf)
        for parent in per[leaf]:
            visit(parent)
        out[leaf] = None

    for leaf in leaves:
        visit(leaf)
    return list(out)
