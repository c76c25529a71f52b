"""What operations entry by entry do to the exponents of a group."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from . import _exponents as ex
from ._answers import Forms, Walk, answers, covers, fixed, passed
from ._constants import uniform
from ._exponents import Form, System
from ._members import Occurrence
from ._values import Event, Value

ODD = frozenset("asin asinh atan atanh erf erf_inv sign sin sinh tan tanh".split())
EVEN = frozenset("cos cosh is_finite".split())
SAME = frozenset(
    """copy copy_p convert_element_type neg name pvary real reduce_precision
    sharding_constraint stop_gradient""".split()
)
POWERS = {"square": 2, "sqrt": Fraction(1, 2), "rsqrt": Fraction(-1, 2),
          "cbrt": Fraction(1, 3)}  # fmt: skip
COMPARE = frozenset("eq ge gt le lt ne".split())
AS_IT_IS = ("broadcast_in_dim", "convert_element_type", "layer", "reshape")


def entrywise(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """Each place answers for itself."""
    given = [_aligned(walk, answers(walk, x), outs) for x in event.operands]
    uneven = any(isinstance(x, np.ndarray) and uniform(x) is None
                 for x in event.operands)  # fmt: skip
    if None in given or (uneven and len(outs) > 1 and not walk.system.rules.entrywise):
        return fixed(walk, event, outs)
    _note_gains(walk, event, given)
    found = {}
    for o in outs:
        forms = [a.get(o) for a in given if a is not None]
        if any(f is not None for f in forms):
            found[o] = entry(walk.system, event, forms)
    return found


def _aligned(walk: Walk, forms: Forms, outs: Sequence[Occurrence]) -> Forms | None:
    """The forms of an operand at the places of the result; None: they differ."""
    if forms.keys() <= set(outs):
        return forms
    for o in forms:
        if not any(covers(o, 0, p) for p in outs if p.axis == o.axis):
            return None
    return passed(walk, [(o, 0, f) for o, f in forms.items()], outs)


def _note_gains(walk: Walk, event: Event, given: Sequence) -> None:
    """Remembers a param that multiplies something else that has the leaf."""
    if event.name == "mul" and all(given):
        for x in event.operands:
            while isinstance(x, Value) and x.origin and x.number > 0:
                if x.origin[0] not in AS_IT_IS:
                    break
                x = x.origin[2][0]
            if isinstance(x, Value) and x.number < 0:
                walk.gains.add(x.number)


Given = list[Form | None]  # by operand; None: it is the same for all units


def entry(system: System, event: Event, forms: Given) -> Form:
    """How the result answers to what is done to the operands."""
    return _ENTRY.get(event.name, _changing)(system, event, forms)


def _changing(system: System, event: Event, forms: Given) -> Form:
    """An operation that nothing passes through."""
    del event
    for form in forms:
        ex.fix(system, form or {})
    return {}


def _product(system: System, event: Event, forms: Given) -> Form:
    first, second = forms
    if first is not None and second is not None:
        return ex.product(system, first, second, sign=1 if event.name == "mul" else -1)
    if first is None and event.name == "div":
        return ex.power(system, second or {}, -1)
    return first or second or {}


def _same(system: System, event: Event, forms: Given) -> Form:
    kind = np.dtype(event.params.get("new_dtype", "f4")).kind
    form = forms[0] or {}
    return ex.fix(system, form) if kind in "biu" else form


def _power(system: System, event: Event, forms: Given) -> Form:
    by = POWERS.get(event.name) or event.params["y"]
    return ex.power(system, forms[0] or {}, by)


def _absolute(system: System, event: Event, forms: Given) -> Form:
    del event
    form = forms[0] or {}
    return form if system.rules == ex.SCALES else ex.unsigned(system, form)


def _odd(system: System, event: Event, forms: Given) -> Form:
    scales = event.name == "sign" and system.rules == ex.SCALES
    return {} if scales else ex.odd(system, forms[0] or {})


def _even(system: System, event: Event, forms: Given) -> Form:
    if event.name == "is_finite" and system.rules == ex.SCALES:
        return {}
    return ex.unsigned(system, forms[0] or {})


def _joined(system: System, event: Event, forms: Given) -> Form:
    """Operands that must change alike; zero changes as anything does."""
    given = list(zip(event.operands, forms, strict=True))
    if event.name == "select_n":
        chosen = given.pop(0)[1]
        if chosen is not None and not system.rules.entrywise:
            return _changing(system, event, forms)
        ex.fix(system, chosen or {})
    alike = [f or {} for x, f in given if f is not None or uniform(x) != 0]
    form = ex.equal(system, alike) if alike else {}
    if event.name in COMPARE:
        ex.positive(system, form)
        return {}
    return ex.positive(system, form) if event.name in ("max", "min") else form


_ENTRY: dict[str, Callable[[System, Event, Given], Form]] = {
    "mul": _product, "div": _product, "abs": _absolute, "integer_pow": _power,
}  # fmt: skip
_ENTRY |= dict.fromkeys(SAME, _same) | dict.fromkeys(POWERS, _power)
_ENTRY |= dict.fromkeys(ODD, _odd) | dict.fromkeys(EVEN, _even)
_ENTRY |= dict.fromkeys(
    (*COMPARE, "add", "sub", "add_any", "max", "min", "select_n"), _joined
)
