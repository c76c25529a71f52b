"""What is known while one group is followed through a program: where, and how it goes.

A value has a form for each place of the group in it; a place without a form is one
along which all entries are alike.
"""

from collections.abc import Iterable, Sequence
import math
from typing import Any, NamedTuple

from . import _exponents as ex
from ._exponents import Form, System
from ._groups import Factor, Pick
from ._members import Occurrence, occurrences
from ._terms import Term
from ._values import Event, Value

Forms = dict[Occurrence, Form]
Given = Iterable[tuple[Occurrence, int, Form]]  # a place, how far it moves, its form


class Walk(NamedTuple):
    """One leaf of the terms, followed through the program."""

    leaf: Term
    system: System
    forms: dict[tuple[int, Occurrence], Form]  # by the number of a value, and place
    ones: frozenset[int]  # numbers of params taken to be one along the leaf
    gains: set[int]  # numbers of params that multiply entry by entry
    cache: dict[tuple, dict[Term, list[Occurrence]]]


def places(walk: Walk, axes: tuple) -> list[Occurrence]:
    """Where the leaf is in a value with those axes."""
    return where(walk.cache, axes).get(walk.leaf, [])


def where(cache: dict[tuple, dict], axes: tuple) -> dict[Term, list[Occurrence]]:
    """Where each leaf is in a value with those axes."""
    if axes not in cache:
        cache[axes] = occurrences(axes)
    return cache[axes]


def answers(walk: Walk, x: Any) -> Forms:
    """How an operand answers, at the places of the leaf in it."""
    if not isinstance(x, Value) or x.number in walk.ones:
        return {}
    found = places(walk, x.axes)
    if x.number == 0:  # a constant: alike along one place, but not in two together
        return {o: {} for o in found} if len(found) > 1 else {}
    return {o: walk.forms[x.number, o] for o in found if (x.number, o) in walk.forms}


def fixed(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """What is not known to pass anything on."""
    for x in event.operands:
        for form in answers(walk, x).values():
            ex.fix(walk.system, form)
    return {o: {} for o in outs}


def passed(walk: Walk, given: Given, outs: Iterable[Occurrence]) -> Forms:
    """Hands forms on to the places that hold the same entries.

    Where an axis has the leaf, but not at those places, nothing is passed on.
    """
    given, found = list(given), {}
    for o in outs:
        axis = [g for g in given if g[0].axis == o.axis]
        here = [form for g, shift, form in axis if covers(g, shift, o)]
        if here:
            found[o] = ex.equal(walk.system, here)
        elif axis:
            for _, _, form in axis:
                ex.fix(walk.system, form)
            found[o] = {}
    return found


def covers(g: Occurrence, shift: int, o: Occurrence) -> bool:
    """Do two places share entries, each at the same unit?

    The first is on an axis that begins at position `shift` of that of the second.
    """
    if shift == 0 and g.steps == o.steps:
        return True
    (start, stride, picks), (begin, width, order) = spot(g.steps), spot(o.steps)
    if (stride, picks) != (width, order):
        return False
    return unit(g.steps, begin - shift) == 0 or unit(o.steps, start + shift) == 0


def spot(steps: Sequence[Any]) -> tuple[int, int, tuple]:
    """The position of unit 0, how far it is to unit 1, and what reorders them."""
    position, stride, picks = 0, 1, ()
    for step in steps:
        if isinstance(step, Factor):
            stride *= math.prod(step.sizes[step.index + 1 :])
        elif isinstance(step, Pick):
            picks = (*picks, step)
        else:
            position += step.offset * stride
    return position, stride, picks


def unit(steps: Sequence[Any], position: int) -> int | None:
    """The unit that a position is of, before any reordering; None if it is of none."""
    if position < 0:
        return None
    for step in steps:
        if isinstance(step, Factor):
            minor = math.prod(step.sizes[step.index + 1 :])
            if position >= minor * math.prod(step.sizes[: step.index + 1]):
                return None
            position = position // minor % step.sizes[step.index]
        elif not isinstance(step, Pick):
            position -= step.offset
            if not 0 <= position < step.size:
                return None
    return position


def pairs(a: Forms, b: Forms) -> list[tuple[Form, Form]] | None:
    """The forms of two operands along one axis, place by place; None: they differ."""
    both = [(o, p) for o in a for p in b if covers(p._replace(axis=o.axis), 0, o)]
    if {o for o, _ in both} != a.keys() or {p for _, p in both} != b.keys():
        return None
    return [(a[o], b[p]) for o, p in both]


def on(forms: Forms, axis: int) -> Forms:
    """The forms along one axis."""
    return {o: f for o, f in forms.items() if o.axis == axis}
