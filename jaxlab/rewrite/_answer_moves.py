"""What operations that move, cut and join axes do to the exponents of a group."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from . import _exponents as ex
from ._answers import Forms, Walk, answers, fixed, on, passed, spot
from ._constants import uniform
from ._groups import Factor
from ._members import Occurrence
from ._values import Event, Value

Rule = Callable[[Walk, Event, Sequence[Occurrence]], Forms]


def _moving(axis_of: Callable[[Event, int], int | None]) -> Rule:
    """The rule of an operation that moves whole axes of its operands."""

    def rule(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
        each = []
        for x in event.operands:
            given = []
            for o, form in answers(walk, x).items():
                axis = axis_of(event, o.axis)
                if axis is None:
                    ex.fix(walk.system, form)
                else:
                    given.append((Occurrence(axis, o.steps), 0, form))
            each.append(passed(walk, given, outs))
        return _alike(walk, event.operands, each, outs)

    return rule


def _alike(
    walk: Walk,
    operands: Sequence[Any],
    each: Sequence[Forms],
    outs: Sequence[Occurrence],
) -> Forms:
    """Operands that lie side by side; one of zeros changes as the others do."""
    found = {}
    for o in outs:
        forms = [f.get(o) for x, f in zip(operands, each, strict=True)
                 if uniform(x) != 0]  # fmt: skip
        if any(f is not None for f in forms):
            found[o] = ex.equal(walk.system, [f or {} for f in forms])
    return found


def _reshape(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """Splits and merges keep the order of entries: places along one long axis."""
    (x, *_), out = event.operands, event.out
    flat = lambda o, shape: Occurrence(0, (Factor(shape, o.axis), *o.steps))
    given = [(flat(o, x.shape), 0, f) for o, f in answers(walk, x).items()]
    long = {flat(o, out.shape): o for o in outs}
    return {long[o]: f for o, f in passed(walk, given, long).items()}


def _reordered(walk: Walk, event: Event, outs: Sequence[Occurrence], axis: int) -> dict:
    """The entries of one axis in another order: all that is on it is alike."""
    forms = answers(walk, event.operands[0])
    given = [(o, 0, f) for o, f in forms.items() if o.axis != axis]
    found = passed(walk, given, [o for o in outs if o.axis != axis])
    here = [f for o, f in forms.items() if o.axis == axis]
    if here:
        form = ex.equal(walk.system, here)
        found |= {o: form for o in outs if o.axis == axis}
    return found


def _reverse(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    if len(event.params["dimensions"]) != 1:
        return fixed(walk, event, outs)
    return _reordered(walk, event, outs, event.params["dimensions"][0])


def _concatenate(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    axis, xs = event.params["dimension"], event.operands
    if not isinstance(xs[0], Value):  # slices that make up their whole again
        whole = event._replace(operands=[xs[0].base])
        return _reordered(walk, whole, outs, axis)
    starts = accumulate((x.shape[axis] for x in xs[:-1]), initial=0)
    along, across = [], []
    for x, start in zip(xs, starts, strict=True):
        forms = answers(walk, x)
        along += [(o, start, f) for o, f in forms.items() if o.axis == axis]
        given = [(o, 0, f) for o, f in forms.items() if o.axis != axis]
        across.append(passed(walk, given, [o for o in outs if o.axis != axis]))
    here = passed(walk, along, [o for o in outs if o.axis == axis])
    return here | _alike(walk, xs, across, [o for o in outs if o.axis != axis])


def _cut(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    axis, start = event.params["axis"], event.params["start"]
    given = [(o, -start if o.axis == axis else 0, f)
             for o, f in answers(walk, event.operands[0]).items()]  # fmt: skip
    return passed(walk, given, outs)


def _slice(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    starts, given = event.params["start_indices"], []
    strides = event.params["strides"] or (1,) * len(starts)
    for o, form in answers(walk, event.operands[0]).items():
        if strides[o.axis] == 1:
            given.append((o, -starts[o.axis], form))
        else:
            ex.fix(walk.system, form)
    found = passed(walk, given, outs)
    return {o: {} for o in outs if strides[o.axis] != 1} | found


def _pad(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """Zeros change as anything does: alone, they get an exponent of their own."""
    x, padding = event.operands[:2]
    if uniform(padding) != 0:
        return fixed(walk, event, outs)
    low = [config[0] for config in event.params["padding_config"]]
    forms = answers(walk, x)
    new: Forms = {}
    for o in outs:
        inside = 0 <= spot(o.steps)[0] - low[o.axis] < x.shape[o.axis]
        if not inside and not on(forms, o.axis):
            new[o] = {("pad", event.out.number, o): 1}
    return new | passed(walk, [(o, low[o.axis], f) for o, f in forms.items()], outs)


def _dynamic_slice(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """Of axes that stay whole; the others are at places that are not known."""
    x, given = event.operands[0], []
    for o, form in answers(walk, x).items():
        if x.shape[o.axis] == event.out.shape[o.axis]:
            given.append((o, 0, form))
        else:
            ex.fix(walk.system, form)
    cut = [k for k, n in enumerate(event.out.shape) if n != x.shape[k]]
    return passed(walk, given, outs) | {o: {} for o in outs if o.axis in cut}


def _dynamic_update(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    both = event.operands[:2]
    each = [passed(walk, [(o, 0, f) for o, f in answers(walk, x).items()], outs)
            for x in both]  # fmt: skip
    return _alike(walk, both, each, outs)


def _window_of(event: Event, axis: int) -> int | None:
    """The axis of a gather's result that is a whole axis of its operand."""
    numbers, shape = event.params["dimension_numbers"], event.operands[0].shape
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [k for k in range(len(shape)) if k not in gone]
    whole = event.params["slice_sizes"][axis] == shape[axis]
    return numbers.offset_dims[kept.index(axis)] if axis in kept and whole else None


def _gather(walk: Walk, event: Event, outs: Sequence[Occurrence]) -> Forms:
    """What is looked up stays; out of bounds there are zeros or NaN."""
    if not scales_with(event.params):
        return fixed(walk, event, outs)
    windows = [o for o in outs if o.axis in event.params["dimension_numbers"][0]]
    only = event._replace(operands=event.operands[:1])
    rest = {o: {} for o in outs if o not in windows}
    return rest | _moving(_window_of)(walk, only, windows)


def scales_with(params: Mapping[str, Any]) -> bool:
    """Is what a gather finds out of bounds 0 or NaN, as anything times it?"""
    value = params.get("fill_value")
    return value is None or value == 0 or value != value


def _kept(event: Event, axis: int) -> int | None:
    """The axis after some of length one are gone."""
    gone = [d % len(event.operands[0].shape) for d in event.params["dimensions"]]
    return None if axis in gone else axis - sum(d < axis for d in gone)


def _broadcast(event: Event, axis: int) -> int | None:
    to = event.params["broadcast_dimensions"][axis]
    return to if to >= 0 else None


MOVES: dict[str, Rule] = {
    "transpose": _moving(lambda e, k: list(e.params["permutation"]).index(k)),
    "broadcast_in_dim": _moving(_broadcast),
    "layer": _moving(_broadcast),
    "squeeze": _moving(_kept),
    "stack": _moving(lambda e, k: k + (k >= e.params["axis"])),
    "cumsum": _moving(lambda e, k: None if k == e.params["axis"] else k),
    "slice": _slice,
    "rev": _reverse,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "concatenate": _concatenate,
    "cut": _cut,
    "pad": _pad,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
}
