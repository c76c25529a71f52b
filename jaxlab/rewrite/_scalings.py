"""The continuous symmetries of one group, and those of whole leaves."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
import math
from typing import Any, NamedTuple

from . import _exponents as ex
from ._answer_sums import follow, tie
from ._answer_whole import equations
from ._answers import Walk, places, where
from ._exponents import Form, Rules, System
from ._groups import Factor, Member, Pick, Place, Segment
from ._members import Occurrence, pieces
from ._symmetries import Reading
from ._terms import Term
from ._values import Event, Value

Vector = dict[Any, int]  # (number of a param, place in it), or only the number


class Search(NamedTuple):
    """A program, and in which of its events each leaf of the terms occurs."""

    read: Reading
    real: Sequence[bool]  # of each param: may it be scaled?
    events: dict[Term, list[Event]]
    cache: dict[tuple, dict[Term, list[Occurrence]]]


class Part(NamedTuple):
    """One symmetry, before it has a name."""

    leaf: Term | None  # None: of whole params
    kind: str
    vector: Vector
    ones: frozenset[int] = frozenset()


class Change(NamedTuple):
    """One place that a symmetry changes."""

    number: int  # of the param
    here: Occurrence
    near: Sequence[Occurrence]  # where what the group depends on is
    member: Member
    exponent: int


class Answer(NamedTuple):
    """The equations of one family."""

    unknowns: Sequence[Any]
    equations: list[Form]
    gains: frozenset[int] = frozenset()


def search(read: Reading, real: Sequence[bool]) -> Search:
    """Finds out in which events each leaf occurs."""
    events: dict[Term, list[Event]] = {}
    cache: dict[tuple, dict[Term, list[Occurrence]]] = {}
    for event in read.trace.events:
        xs = [x for x in (event.out, *event.operands) if isinstance(x, Value)]
        for leaf in dict.fromkeys(t for x in xs for t in where(cache, x.axes)):
            events.setdefault(leaf, []).append(event)
    return Search(read, real, events, cache)


def of_leaf(found: Search, leaf: Term, others: Sequence[Part]) -> list[Part]:
    """The symmetries of a leaf that do not follow from those of others."""
    linear = _basis(_ask(found, leaf, ex.LINEAR), (), 0)
    turns = _ask(found, leaf, ex.ROTATIONS)
    turned = _basis(turns, linear, 2)
    parts = [Part(leaf, "general linear", v) for v in linear]
    parts += [Part(leaf, "rotation", v) for v in turned]
    follows = [(p.kind, v) for p in others if not p.ones
               and (v := _beside(found.read, p, leaf))]  # fmt: skip
    follows += [(p.kind, p.vector) for p in parts]
    gains = frozenset(n for n in turns.gains if found.real[-n - 1])
    if gains:
        folded = _ask(found, leaf, ex.ROTATIONS, gains)
        more = _basis(folded, linear + turned, 2)
        parts += [Part(leaf, "rotation", v, gains) for v in more]
    scales, signs = (_ask(found, leaf, rules) for rules in (ex.SCALES, ex.SIGNS))
    return parts + _entrywise(leaf, scales, signs, follows)


def of_params(found: Search, others: Sequence[Part]) -> list[Part]:
    """The scales and signs of whole params that do not follow from others."""
    read, answers = found.read, []
    pairs = zip(read.params, found.real, strict=True)
    unknowns = [x.number for x, real in pairs if real and x.shape]
    start: dict[int, Form] = {n: {n: 1} for n in unknowns}
    for rules in (ex.SCALES, ex.SIGNS):
        system = System(rules, {})
        equations(system, read.trace, start, read.outputs)
        answers.append(Answer(unknowns, list(system.equations.values())))
    scales, signs = answers
    follows = [(p.kind, v) for p in others if not p.ones and (v := _overall(read, p))]
    return _entrywise(None, scales, signs, follows)


def changes(read: Reading, part: Part) -> Iterator[Change]:
    """What a part changes, place by place."""
    if part.leaf is None:
        for number, exponent in part.vector.items():
            x = read.params[-number - 1]
            here = Occurrence(0, (Factor((1, x.shape[0]), 0),))
            member = Member(read.paths[-number - 1], Place(*here))
            yield Change(number, here, (), member, exponent)
        return
    numbers = {path: -i for i, path in enumerate(read.paths, 1)}
    for path, here, member, near in pieces(read.found, part.leaf):
        if exponent := part.vector.get((numbers[path], here)):
            yield Change(numbers[path], here, near, member, exponent)


def _ask(
    found: Search, leaf: Term, rules: Rules, ones: frozenset[int] = frozenset()
) -> Answer:
    """Follows a leaf through the program."""
    walk = Walk(leaf, System(rules, {}), {}, ones, set(), found.cache)
    unknowns = []
    for x, real in zip(found.read.params, found.real, strict=True):
        for o in places(walk, x.axes) if x.number not in ones else ():
            unknown = x.number, o
            walk.forms[unknown] = {unknown: 1} if real else {}
            unknowns += [unknown] * real
    follow(walk, found.events.get(leaf, ()))
    for a, b in found.read.trace.same:
        tie(walk, a, b)
    return Answer(unknowns, list(walk.system.equations.values()), frozenset(walk.gains))


def _basis(answer: Answer, known: Sequence[Vector], modulo: int) -> list[Vector]:
    """What solves the equations, beyond what is known."""
    all_ = ex.solutions(answer.equations, answer.unknowns, modulo)
    return ex.beyond(all_, known, modulo)


def _entrywise(
    leaf: Term | None,
    scales: Answer,
    signs: Answer,
    follows: Sequence[tuple[str, Vector]],
) -> list[Part]:
    """Scales and signs, beyond those that follow from a kind of symmetry."""
    known = [v for kind, v in follows if kind not in ("rotation", "sign")]
    signed, parts = [v for kind, v in follows if kind != "scale"], []
    for v in _basis(scales, known, 0):
        free = ex.solves(v, signs.equations, signs.unknowns)
        signed += [v] * free
        parts.append(Part(leaf, "scale and sign" if free else "scale", v))
    return parts + [Part(leaf, "sign", v) for v in _basis(signs, signed, 2)]


def _beside(read: Reading, part: Part, leaf: Term) -> Vector:
    """What a part does to a leaf beside its own, if it does the same at all units.

    Empty where that is not as if the other leaf itself were scaled.
    """
    assert part.leaf is not None
    if leaf not in read.found.per[part.leaf]:
        return {}
    index, out = read.found.per[part.leaf].index(leaf), {}
    for number, here, near, _, exponent in changes(read, part):
        place = near[index]
        steps = [s for o in (here, *near) for s in o.steps if s not in place.steps]
        cut = [s for s in steps if not isinstance(s, Factor | Pick)]
        if cut or (number, place) in out:
            return {}
        out[number, place] = exponent
    return out


def _overall(read: Reading, part: Part) -> Vector:
    """What a part does to params if it does the same to all units; else empty."""
    each: dict[tuple[int, int], int] = {}
    entries: dict[tuple[int, int], int] = {}
    out: dict[int, int] = {}
    for number, here, _, member, exponent in changes(read, part):
        at, shape = (number, here.axis), read.params[-number - 1].shape
        if (count := _entries(member, shape)) == math.prod(shape):
            out[number] = out.get(number, 0) + exponent
            continue
        if each.setdefault(at, exponent) != exponent:
            return {}
        entries[at] = entries.get(at, 0) + count
    for (number, axis), exponent in each.items():
        if entries[number, axis] != math.prod(read.params[-number - 1].shape):
            return {}
        out[number] = out.get(number, 0) + exponent
    return out


def _entries(member: Member, shape: Sequence[int]) -> int:
    """How many entries of a leaf a member is."""
    share, seen = Fraction(math.prod(shape)), set()
    for place in (member.place, *member.per):
        length = shape[place.axis]
        for i, step in enumerate(place.steps):
            if isinstance(step, Segment):
                cut = (place.axis, place.steps[: i + 1])
                share *= 1 if cut in seen else Fraction(step.size, length)
                seen.add(cut)
                length = step.size
            elif isinstance(step, Factor):
                length = step.sizes[step.index]
    return int(share)
