"""What the symmetries of a program know of its values, and what they record."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from jax.core import Tracer
import numpy as np

from ._constants import Facts, facts, terms
from ._terms import Term, chain, fresh, pin, take, unify

Axes = tuple[Term | None, ...]  # None: the value does not vary along that axis


class Index(NamedTuple):
    """Says that the entries of a value are positions of a term."""

    term: Term
    token: Hashable  # which value: equal tokens, equal entries
    safe: bool  # False: only while nothing uses the entries


class Mark(NamedTuple):
    """Says that a value was looked up, at an index into a term."""

    term: Term
    token: Hashable
    axes: tuple[int, ...]  # of the value: the axes of the index


class Value(NamedTuple):
    """An array that depends on params or inputs."""

    shape: tuple[int, ...]
    axes: Axes
    index: Index | None = None
    marks: tuple[Mark, ...] = ()
    origin: tuple[str, Any, Sequence[Any]] | None = None  # primitive, params, operands
    number: int = 0  # of the event that made it


class Sliced(NamedTuple):
    """A slice of one axis that nothing but a concatenation has used yet."""

    shape: tuple[int, ...]
    base: Value
    axis: int
    start: int


class Pieces(NamedTuple):
    """A concatenation whose pieces are still told apart."""

    shape: tuple[int, ...]
    axis: int
    values: tuple[Value, ...]


Operand = np.ndarray | Value | Sliced | Pieces


class Event(NamedTuple):
    """One operation as it was read: what it was given, and the value it made."""

    name: str
    params: Any
    operands: Sequence[Any]
    out: Value


class Trace(NamedTuple):
    """What is found while a program is read."""

    records: dict[Any, None]  # axes that occur in one value, and the scans around it
    layers: list[Term]  # the lengths of the scans around
    place: list[int]  # the number of the equation, in each of the calls around
    splits: dict[Any, Term]  # the major factor that each reshape made
    cuts: dict[Any, tuple[int, ...]]  # where to cut the axis that a reshape splits
    known: dict[int, tuple[np.ndarray, Facts]]  # facts of constants, by identity
    events: list[Event]
    same: list[tuple[Value, Value]]  # values that a loop makes one


def record(
    trace: Trace, axes: Iterable[Term | None], marks: Sequence[Mark] = ()
) -> None:
    """Notes which terms occur together in one value."""
    found = tuple(t for t in axes if t is not None)
    looked_up = tuple(m.term for m in marks)
    trace.records[found, looked_up, tuple(trace.layers)] = None


def emit(
    trace: Trace, name: str, params: Any, operands: Sequence[Any], out: Value
) -> Value:
    """Notes what one value was made of, and which terms occur in it."""
    record(trace, out.axes, out.marks)
    out = out._replace(origin=(name, params, operands), number=len(trace.events) + 1)
    trace.events.append(Event(name, params, operands, out))
    return out


def pinned(shape: Sequence[int], why: str = "") -> Value:
    """A value of which nothing may be permuted."""
    axes = tuple(fresh(n, pinned=True, why=why) if n != 1 else None for n in shape)
    return Value(tuple(shape), axes)


def use(trace: Trace, x: Any) -> Value:
    """An operand as a value; a constant gets new terms for each use."""
    if type(x) is Value:
        return x
    if isinstance(x, np.ndarray):
        if id(x) not in trace.known:
            trace.known[id(x)] = x, facts(x)
        return Value(x.shape, terms(trace.known[id(x)][1], x.shape))
    if isinstance(x, Sliced):
        length = x.shape[x.axis]
        axes = list(x.base.axes)
        axes[x.axis] = slice_axis(axes[x.axis], x.start, x.start + length)
        cut = {"axis": x.axis, "start": x.start}
        return emit(trace, "cut", cut, [x.base], Value(x.shape, tuple(axes)))
    assert isinstance(x, Pieces)
    return join(trace, x.values, x.axis)


def plain(trace: Trace, x: Any) -> Value:
    """An operand as a value whose entries are no positions."""
    x = use(trace, x)
    if x.index is not None:
        pin(x.index.term)
        x = x._replace(index=None)
    return x


def positions(index: Index) -> Term:
    """The term that an index points into; fixed where it is only safe unused."""
    if not index.safe:
        pin(index.term)
    return index.term


def slice_axis(term: Term | None, start: int, stop: int) -> Term | None:
    """The term of a slice; where its factors do not allow it, both are pinned."""
    if term is None or stop - start < 2:
        if term is not None and stop > start:
            _isolate(term, start)
        return None
    part = take(term, start, stop)
    if part is None:
        pin(term)
        return fresh(stop - start, pinned=True)
    return part


def _isolate(term: Term, position: int) -> None:
    """Says that one position of a term is read alone."""
    if take(term, position, position + 1) is None:
        pin(term)


def join(trace: Trace, values: Sequence[Value], axis: int) -> Value:
    """The concatenation of values."""
    first = values[0]
    axes = list(first.axes)
    for v in values[1:]:
        for k, term in enumerate(v.axes):
            if k != axis:
                axes[k] = meet(axes[k], term)
    ends = [v.axes[axis] or fresh(v.shape[axis]) for v in values]
    size = sum(v.shape[axis] for v in values)
    axes[axis] = chain(ends) if size != 1 else None
    shape = (*first.shape[:axis], size, *first.shape[axis + 1 :])
    out = Value(shape, tuple(axes))
    return emit(trace, "concatenate", {"dimension": axis}, values, out)


def meet(a: Term | None, b: Term | None) -> Term | None:
    """The axis of two operands that are combined entry by entry."""
    if a is None:
        return b
    if b is not None and a is not b:
        unify(a, b)
    return a


def is_key(x: Any) -> bool:
    """Is it a typed random key, or a tracer of another trace: no constant?"""
    dtype = getattr(x, "dtype", None)
    extended = dtype is not None and not isinstance(dtype, np.dtype)
    return extended or isinstance(x, Tracer)
