"""What is known while whole leaves are scaled or flipped: one form for each value."""

from collections.abc import Sequence
from typing import Any

from . import _exponents as ex
from ._answer_entries import entry
from ._answer_moves import scales_with
from ._axis_elementwise import ELEMENTWISE
from ._constants import uniform
from ._exponents import Form, System
from ._values import Event, Sliced, Trace, Value

LINEAR = frozenset(
    """broadcast_in_dim cumsum cut dynamic_slice expand_dims gather layer
    reduce_sum reduce_window_sum reshape rev slice squeeze transpose""".split()
)  # in the first operand
JOINS = frozenset("concatenate dynamic_update_slice stack pad".split())
EXTREMES = frozenset(
    "reduce_max reduce_min reduce_window_max reduce_window_min cummax cummin".split()
)
TIMES = frozenset(["dot_general", "conv_general_dilated"])


def equations(
    system: System, trace: Trace, start: dict[int, Form], outputs: Sequence[Value]
) -> None:
    """Follows values through a program, from the forms of the params by number."""
    forms = dict(start)
    for event in trace.events:
        given = [_form(forms, x) for x in event.operands]
        forms[event.out.number] = _of(system, event, given)
    for a, b in trace.same:
        ex.equal(system, [_form(forms, a) or {}, _form(forms, b) or {}])
    for out in outputs:
        ex.fix(system, _form(forms, out) or {})


def _form(forms: dict[int, Form], x: Any) -> Form | None:
    """The form of an operand; None of a constant."""
    if isinstance(x, Sliced):
        x = x.base
    return forms.get(x.number, {}) if isinstance(x, Value) else None


def _of(system: System, event: Event, given: list[Form | None]) -> Form:
    if event.name in ELEMENTWISE:
        return entry(system, event, given)
    first = given[0] or {}
    if event.name in TIMES:
        return ex.product(system, first, given[1] or {})
    if event.name in EXTREMES:
        return ex.positive(system, first)
    if event.name in JOINS:
        last = 2 if event.name == "dynamic_update_slice" else None
        pairs = list(zip(event.operands, given, strict=True))[:last]
        alike = [f or {} for x, f in pairs if f is not None or uniform(x) != 0]
        return ex.equal(system, alike) if alike else {}
    if event.name == "carry":
        new: Form = {("carry", event.out.number): 1}
        return new if uniform(event.operands[0]) == 0 else first
    if event.name in LINEAR and scales_with(event.params):
        return first
    for form in given:
        ex.fix(system, form or {})
    return {}
