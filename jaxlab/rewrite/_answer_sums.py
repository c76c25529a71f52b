"""What contractions, reductions and loops do to the exponents of a group."""

from collections.abc import Iterable, Sequence

from . import _exponents as ex
from ._answer_entries import entrywise
from ._answer_moves import MOVES
from ._answers import (
    Forms,
    Walk,
    answers,
    fixed,
    on,
    pairs,
    passed,
    places,
    spot,
)
from ._axis_contract import REDUCE
from ._axis_elementwise import ELEMENTWISE
from ._constants import uniform
from ._groups import Factor
from ._members import Occurrence
from ._values import Event, Value


def follow(walk: Walk, events: Iterable[Event]) -> None:
    """Adds the equations of a program to the system of a walk."""
    for event in events:
        outs = places(walk, event.out.axes)
        rule = entrywise if event.name in ELEMENTWISE else RULES.get(event.name, fixed)
        forms = rule(walk, event, outs)
        for axis in {o.axis for o in outs}:
            # along one axis, either all places have a form or none has
            if forms.keys() < forms.keys() | {o for o in outs if o.axis == axis}:
                for form in on(forms, axis).values():
                    ex.fix(walk.system, form)
                forms = {o: f if o.axis != axis else {} for o, f in forms.items()}
        for o, form in forms.items():
            walk.forms[event.out.number, o] = form


def tie(walk: Walk, a: Value, b: Value) -> None:
    """Says that two values change alike: a loop makes them one."""
    ours, theirs = answers(walk, a), answers(walk, b)
    for axis in range(len(a.shape)):
        left, right = on(ours, axis), on(theirs, axis)
        both = pairs(left, right)
        for form in [] if both else [*left.values(), *right.values()]:
            ex.fix(walk.system, form)
        for pair in both or ():
            ex.equal(walk.system, pair)


def _dot(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    (lc, rc), (lb, rb) = event.params["dimension_numbers"]
    l, r = event.operands
    left, right = answers(walk, l), answers(walk, r)
    for i, j in zip(lc, rc, strict=True):
        _summed(walk, on(left, i), on(right, j))
    free = [i for i in range(len(l.shape)) if i not in (*lb, *lc)]
    of_left = {i: k for k, i in enumerate((*lb, *free))}
    first = len(of_left)
    free = [j for j in range(len(r.shape)) if j not in (*rb, *rc)]
    of_right = dict(zip(rb, range(len(rb)), strict=True))
    of_right |= {j: first + k for k, j in enumerate(free)}
    each = []
    for forms, axes in ((left, of_left), (right, of_right)):
        given = [(Occurrence(axes[o.axis], o.steps), 0, f)
                 for o, f in forms.items() if o.axis in axes]  # fmt: skip
        each.append(passed(walk, given, outs))
    return _times(walk, *each)


def _times(walk: Walk, a: Forms, b: Forms) -> Forms:
    """Both operands, entry by entry along the axes that they share."""
    out = a | b
    for o in a.keys() & b.keys():
        out[o] = ex.product(walk.system, a[o], b[o])
    return out


def _summed(walk: Walk, left: Forms, right: Forms) -> None:
    """A contraction over an axis that has these forms in the two operands."""
    both = pairs(left, right) if left and right else None
    for a, b in both or ():
        ex.inner(walk.system, a, b)
    for form in () if both else (*left.values(), *right.values()):
        alone = not (left and right)
        ex.total(walk.system, form) if alone else ex.fix(walk.system, form)


def _conv(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """Channels in are groups x channels, which are summed; channels out pass."""
    numbers, (l, r) = event.params["dimension_numbers"], event.operands
    lhs, rhs, spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    left, right = answers(walk, l), answers(walk, r)
    groups, inside = event.params["feature_group_count"], r.shape[rhs[1]]
    spatial = [o for o in left if o.axis in lhs[2:]]
    spatial += [o for o in right if o.axis in rhs[2:]]
    major = {o: f for o, f in on(left, lhs[1]).items()
             if groups > 1 and spot(o.steps)[1] % inside == 0}  # fmt: skip
    if spatial or (major and inside * groups != r.shape[rhs[0]]):
        return fixed(walk, event, outs)
    within = (Factor((groups, inside), 1),) if groups > 1 else ()
    summed = {o._replace(steps=(*within, *o.steps)): f
              for o, f in on(right, rhs[1]).items()}  # fmt: skip
    minor = {o: f for o, f in on(left, lhs[1]).items() if o not in major}
    _summed(walk, minor, summed)
    at = lambda axis, forms: [(o._replace(axis=axis), 0, f) for o, f in forms.items()]
    made = at(spec[1], on(right, rhs[0])) + at(spec[0], on(left, lhs[0]))
    return _times(
        walk, passed(walk, made, outs), passed(walk, at(spec[1], major), outs)
    )


def _reduced(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """A sum is linear; an extreme commutes with positive factors of other axes."""
    gone, given = event.params["axes"], []
    for o, form in answers(walk, event.operands[0]).items():
        if o.axis in gone:
            last = ex.total if event.name == "reduce_sum" else ex.fix
            last(walk.system, form)
            continue
        if event.name in ("reduce_max", "reduce_min"):
            form = ex.positive(walk.system, form)
        elif event.name != "reduce_sum":
            form = ex.fix(walk.system, form)
        axis = o.axis - sum(k < o.axis for k in gone)
        given.append((Occurrence(axis, o.steps), 0, form))
    return passed(walk, given, outs)


def _windows(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    given = []
    for o, form in answers(walk, event.operands[0]).items():
        linear = event.name == "reduce_window_sum"
        form = form if linear else ex.positive(walk.system, form)
        given.append((o, 0, form))
    return passed(walk, given, outs)


def _carry(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """What a loop starts from; zeros may become anything."""
    (x,) = event.operands
    start: Forms = {o: {} for o in outs}
    if uniform(x) == 0:
        start = {o: {("carry", event.out.number, o): 1} for o in outs}
    return start | passed(walk, [(o, 0, f) for o, f in answers(walk, x).items()], outs)


RULES = MOVES | {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "carry": _carry,
    "reduce_window_sum": _windows,
    "reduce_window_max": _windows,
    "reduce_window_min": _windows,
}
RULES |= dict.fromkeys(REDUCE, _reduced)
