"""Runs a function with some of its operations on params leaves done by a hook.

What holds no such operation is bound as it is, derivative rules included.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex, source_info_util as source
import jax.numpy as jnp

from ..types import Params
from ._control import ENTER, Frame, Hook, Key, Results, Stats, added
from ._sites import Site
from ._uses import Views, leaves, look, note, step, walk
from ._views import View


class Traced(NamedTuple):
    """A call of a function, with the leaves that are selected."""

    closed: Any
    result: Any  # its structure
    args: Sequence[Any]
    views: Views
    sites: Sequence[Site]  # of the selected leaves, in order


def traced(
    apply: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    selected: Mapping[str, Any] | frozenset[str],
) -> Traced:
    """Traces a call and finds the sites of the selected paths."""
    params, inputs = jax.tree.map(jnp.asarray, (params, tuple(inputs)))
    closed, shape = jax.make_jaxpr(apply, return_shape=True)(params, *inputs)
    every = leaves(params, closed)
    views = [v if v is not None and v.path in selected else None for v in every]
    args = jax.tree.leaves((params, inputs))
    sites = walk(closed.jaxpr, views)[1]
    return Traced(closed, jax.tree.structure(shape), args, views, sites)


def result(call: Traced, hook: Hook, state: Mapping[Key, Any]) -> tuple[Any, Stats]:
    """The result of a call, and its statistics."""
    jaxpr, consts = call.closed.jaxpr, call.closed.consts
    outs, stats = run(jaxpr, consts, call.args, call.views, hook, state)
    return jax.tree.unflatten(call.result, outs), stats


def run(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    views: Sequence[View | None],
    hook: Hook,
    state: Mapping[Key, Any],
) -> Results:
    """The results of a jaxpr, and the statistics by leaf and scans around it."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    known: dict[Any, View] = {}
    note(known, jaxpr.invars, views)
    last = _last_used(jaxpr)
    read = lambda a: a.val if isinstance(a, jex.Literal) else values[a]
    again = lambda jaxpr, consts, args, views, state: run(
        jaxpr, consts, args, views, hook, state
    )
    stats: Stats = {}
    for i, eqn in enumerate(jaxpr.eqns):
        given = [read(a) for a in eqn.invars]
        ins = look(known, eqn.invars)
        outs, sites = step(eqn, ins) if any(ins) else ((), [])
        mine = [s for s in sites if hook.select(s)]
        note(known, eqn.outvars[: len(outs)], outs)
        with _place(eqn), eqn.ctx.manager:
            if not mine:
                done = _bind(eqn, given)
            elif eqn.primitive.name in ENTER:
                frame = Frame(ins, mine, state, hook, again)
                done, new = ENTER[eqn.primitive.name](eqn, given, frame)
                stats = added(stats, new)
            else:
                bind = lambda given, eqn=eqn: _bind(eqn, given)
                done, new = hook.visit(mine, bind, given, state)
                stats = added(stats, new)
        values |= zip(eqn.outvars, done, strict=True)
        for variable in last[i]:
            values.pop(variable, None)
    return [read(a) for a in jaxpr.outvars], stats


def _bind(eqn: Any, args: Sequence[Any]) -> Sequence[Any]:
    """An equation's results for the given operands."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return out if eqn.primitive.multiple_results else [out]


def _place(eqn: Any) -> Any:
    """Where the program has the equation: its source line and its named scopes."""
    info = eqn.source_info
    stack = source.current_name_stack() + info.name_stack
    return source.user_context(info.traceback, name_stack=stack)


def _last_used(jaxpr: Any) -> list[list[Any]]:
    """The variables that no equation after each one needs."""
    out: list[list[Any]] = [[] for _ in jaxpr.eqns]
    needed = {a for a in jaxpr.outvars if not isinstance(a, jex.Literal)}
    for i, eqn in reversed(list(enumerate(jaxpr.eqns))):
        for a in (*eqn.outvars, *eqn.invars):
            if not isinstance(a, jex.Literal) and a not in needed:
                needed.add(a)
                out[i].append(a)
    return out
