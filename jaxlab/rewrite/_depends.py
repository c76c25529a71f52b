"""Which leaves of the terms a leaf may depend on: those that are always beside it."""

from collections.abc import Iterable
from itertools import product as cartesian
from typing import Any

from ._terms import LEAF, SUM, Term, find


def dependence(records: Iterable[Any], free: Iterable[Term]) -> dict[Term, set[Term]]:
    """For each leaf, those that occur beside it, exactly once, wherever it occurs."""
    free, cache = set(free), {}
    sure: dict[Term, frozenset[Term]] = {}
    perhaps: dict[Term, frozenset[Term]] = {}
    beside: dict[Term, set[Term]] = {}
    for axes, looked_up, layers in _distinct(records):
        pieces = [_segments(t, cache) for t in axes]
        for t in (*axes, *looked_up, *layers):
            if t not in sure:
                each = [set(s) for s in _segments(t, cache)]
                sure[t] = frozenset(set.intersection(*each))
                perhaps[t] = frozenset(set.union(*each)) - sure[t]
        for i, segments in enumerate(pieces):
            rest = [*axes[:i], *axes[i + 1 :], *looked_up, *layers]
            others = [x for t in rest for x in sure[t]]
            unsure = {x for t in rest for x in perhaps[t]}
            for segment in segments:
                hit = [x for x in segment if x in free]
                if not hit:
                    continue
                near = [*others, *segment]
                once = {x for x in near if near.count(x) == 1 and x.size > 1} - unsure
                for x in hit:
                    beside[x] = beside[x] & once if x in beside else set(once)
    return {x: near - {x} for x, near in beside.items()}


def _segments(term: Term, cache: dict[Term, list[tuple[Term, ...]]]) -> list[tuple]:
    """The leaves that occur together at a position, for each piece of a term."""
    term = find(term)
    if term in cache:
        return cache[term]
    if term.kind == LEAF:
        out = [(term,) if term.size > 1 else ()]
    elif term.kind == SUM:
        out = [s for k in term.kids for s in _segments(k, cache)]
    else:
        each = [_segments(k, cache) for k in term.kids]
        out = [tuple(x for s in combo for x in s) for combo in cartesian(*each)]
    cache[term] = out = list(dict.fromkeys(out))
    return out


def _distinct(records: Iterable[Any]) -> dict[Any, None]:
    """The records, with bound terms replaced, each once."""
    out: dict[Any, None] = {}
    for axes, looked_up, layers in records:
        key = (
            tuple(map(find, axes)),
            tuple(map(find, looked_up)),
            tuple(map(find, layers)),
        )
        out[key] = None
    return out
