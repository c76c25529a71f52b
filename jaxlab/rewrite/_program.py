"""A jaxpr as a flat list of operations: calls inlined, constants named."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex
import numpy as np

CONTROL = frozenset({"scan", "while", "cond", "shard_map"})


class Op(NamedTuple):
    """One operation: a primitive applied to values that are known by number."""

    name: str
    bind: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    multiple: bool  # does `bind` return a list?


class Program(NamedTuple):
    """A function of arrays as straight-line code over numbered values."""

    ops: tuple[Op, ...]
    params: tuple[dict[str, Any], ...]  # of each op's primitive
    avals: dict[int, Any]  # shape and dtype of every value
    consts: dict[int, Any]  # values known when the function was traced
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def program(
    fn: Callable[..., Any], *avals: Any, keep: Sequence[str] = ()
) -> tuple[Program, Any]:
    """Traces `fn` and flattens every call in it, except those named in `keep`.

    Returns the program, and the structure of the function's result.
    """
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*avals)
    build = _Builder([], [], {}, {})
    inputs = tuple(_fresh(build, v.aval) for v in closed.jaxpr.invars)
    outputs = _inline(build, closed, inputs, frozenset(keep))
    done = Program(
        tuple(build.ops), tuple(build.params), build.avals, build.consts, inputs,
        tuple(outputs),
    )  # fmt: skip
    return done, jax.tree.structure(shape)


class _Builder(NamedTuple):
    ops: list[Op]
    params: list[dict[str, Any]]
    avals: dict[int, Any]
    consts: dict[int, Any]


def _fresh(build: _Builder, aval: Any) -> int:
    build.avals[len(build.avals)] = aval
    return len(build.avals) - 1


def _constant(build: _Builder, value: Any, aval: Any) -> int:
    number = _fresh(build, aval)
    typed = not isinstance(aval.dtype, np.dtype)  # a key is no numpy array
    build.consts[number] = value if typed else np.asarray(value, aval.dtype)
    return number


def _inline(
    build: _Builder, closed: Any, inputs: Sequence[int], keep: frozenset[str]
) -> list[int]:
    """Appends the operations of a jaxpr; returns the numbers of its results."""
    jaxpr = closed.jaxpr
    number: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, value in zip(jaxpr.constvars, closed.consts, strict=True):
        number[var] = _constant(build, value, var.aval)

    def read(atom: Any) -> int:
        if isinstance(atom, jex.Literal):
            return _constant(build, atom.val, atom.aval)
        return number[atom]

    for eqn in jaxpr.eqns:
        args = [read(a) for a in eqn.invars]
        body = _body(eqn)
        if body is not None and eqn.params.get("name") not in keep:
            outs = _inline(build, body, args[-len(body.jaxpr.invars) :], keep)
        else:
            outs = [_fresh(build, v.aval) for v in eqn.outvars]
            name = eqn.params["name"] if body is not None else eqn.primitive.name
            multiple = eqn.primitive.multiple_results
            op = Op(name, eqn.primitive.bind, tuple(args), tuple(outs), multiple)
            build.ops.append(op)
            build.params.append(dict(eqn.params))
        number.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _body(eqn: Any) -> Any:
    """The jaxpr that a call runs once, or None where it is no plain call."""
    if eqn.primitive.name in CONTROL:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = eqn.params.get(key)
        if isinstance(body, jex.ClosedJaxpr):
            return body
        if isinstance(body, jex.Jaxpr):
            return jex.ClosedJaxpr(body, ())
    return None
