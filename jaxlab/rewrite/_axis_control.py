"""The equations of a program, one after the other; calls, loops and branches."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex
import numpy as np

from . import (
    _axis_contract as contract,
    _axis_elementwise as by_entry,
    _axis_index as lookup,
    _axis_join as joining,
    _axis_shape as shaping,
)
from ._constants import fold, uniform
from ._terms import fresh, unify
from ._values import (
    Operand,
    Pieces,
    Sliced,
    Trace,
    Value,
    emit,
    is_key,
    meet,
    pinned,
    plain,
    record,
    use,
)

CALLS = frozenset(
    """jit pjit closed_call core_call custom_jvp_call custom_vjp_call
    custom_vjp_call_jaxpr remat remat2 checkpoint composite""".split()
)
Rule = Callable[[Trace, dict, list, list], list[Operand]]
_RULES: dict[str, Rule] = {
    "transpose": shaping.transpose,
    "broadcast_in_dim": shaping.broadcast,
    "squeeze": shaping.squeeze,
    "reshape": shaping.reshape,
    "expand_dims": shaping.reshape,
    "dot_general": contract.dot_general,
    "conv_general_dilated": contract.conv,
    "rev": joining.reverse,
    "stack": joining.stack,
    "pad": joining.pad,
    "top_k": contract.top_k,
    "argmax": contract.extreme,
    "argmin": contract.extreme,
    "iota": lookup.iota,
}
_RULES |= dict.fromkeys(contract.REDUCE, contract.reduce)
_RULES |= dict.fromkeys(contract.WINDOWS, contract.windows)
_RULES |= dict.fromkeys(contract.CUMULATIVE, contract.cumulative)
_KEEP_INDEX = frozenset(
    ["transpose", "broadcast_in_dim", "squeeze", "reshape", "expand_dims", "rev"]
)
_SEE_PIECES = frozenset(["concatenate", "slice", "split", "unstack"])
_RAW: dict[str, Rule] = {  # these see constants, slices and pieces as they are
    "concatenate": joining.concatenate,
    "slice": joining.slice_,
    "split": joining.split,
    "unstack": joining.unstack,
    "gather": lookup.gather,
    "dynamic_slice": lookup.dynamic_slice,
    "dynamic_update_slice": lookup.dynamic_update_slice,
    "sort": contract.sort,
}
_PIECEWISE = by_entry.ELEMENTWISE | {
    "transpose", "broadcast_in_dim", "squeeze", "reduce_sum", "reduce_max",
    "reduce_min",
}  # fmt: skip


def run(
    trace: Trace, jaxpr: Any, consts: Sequence[Any], args: Sequence[Operand]
) -> list[Operand]:
    """The results of a jaxpr, from what is known of its arguments."""
    env: dict[Any, Operand] = {}
    env.update(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))
    trace.place.append(0)
    for number, eqn in enumerate(jaxpr.eqns):
        trace.place[-1] = number
        xs = [_literal(a) if type(a) is jex.Literal else env[a] for a in eqn.invars]
        env.update(zip(eqn.outvars, _equation(trace, eqn, xs), strict=True))
    trace.place.pop()
    return [_literal(a) if type(a) is jex.Literal else env[a] for a in jaxpr.outvars]


def constant(x: Any) -> Operand:
    """A value known when the program was traced."""
    return pinned(np.shape(x)) if is_key(x) else np.asarray(x)


def _literal(atom: Any) -> np.ndarray:
    return np.asarray(atom.val, atom.aval.dtype)


def _equation(trace: Trace, eqn: Any, xs: list[Operand]) -> Sequence[Operand]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        body = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
        return _call(trace, body, xs)
    if name in _CONTROL:
        return _CONTROL[name](trace, params, xs)
    if not eqn.outvars:  # it prints, or checks
        return []
    if all(isinstance(x, np.ndarray) for x in xs) and not eqn.effects:
        known = fold(eqn, [x for x in xs if isinstance(x, np.ndarray)])
        if known is not None:
            return known
    shapes = [v.aval.shape for v in eqn.outvars]
    if any(type(x) is Pieces for x in xs) and name in _PIECEWISE:
        parts = joining.piecewise(trace, name, params, xs, shapes[0])
        if parts is not None:
            axis, operands, each = parts
            values = tuple(
                use(trace, _apply(trace, name, params, args, [shape])[0])
                for args, shape in zip(operands, each, strict=True)
            )
            return [Pieces(shapes[0], axis, values)]
    return _apply(trace, name, params, xs, shapes)


def _apply(
    trace: Trace, name: str, params: dict, xs: list[Operand], shapes: list[tuple]
) -> list[Operand]:
    """The results of one operation, recorded, and with where they come from."""
    if name == "optimization_barrier":
        return xs
    if name in by_entry.ELEMENTWISE:
        xs = [x if isinstance(x, np.ndarray) else use(trace, x) for x in xs]
        outs = [by_entry.elementwise(trace, name, params, xs, shapes[0])]
    elif name in _RAW:
        if name not in _SEE_PIECES:
            xs = [x if isinstance(x, np.ndarray) else use(trace, x) for x in xs]
        elif name != "concatenate":
            xs = [use(trace, x) if type(x) is Sliced else x for x in xs]
        outs = _RAW[name](trace, params, xs, shapes)
    else:
        as_value = use if name in _KEEP_INDEX else plain
        values = [as_value(trace, x) for x in xs]
        rule = _RULES.get(name)
        if rule is None:
            outs = contract.pin_all(trace, name, values, shapes)
        else:
            outs = rule(trace, params, list(values), shapes)
        xs = [v if uniform(x) is None else x for x, v in zip(xs, values, strict=True)]
    for i, (out, shape) in enumerate(zip(outs, shapes, strict=True)):
        assert out.shape == shape, (name, out.shape, shape)
        if type(out) is Value and not out.number:
            outs[i] = emit(trace, name, params, xs, out)
    return outs


def _call(trace: Trace, body: Any, xs: Sequence[Operand]) -> list[Operand]:
    if isinstance(body, jex.ClosedJaxpr):
        return run(trace, body.jaxpr, body.consts, xs)
    return run(trace, body, (), xs)


def _carry(trace: Trace, x: Operand) -> Value:
    """A value that a loop replaces: no axis of it is known to be uniform."""
    value = plain(trace, x)
    axes = tuple(fresh(n) if t is None and n != 1 else t
                 for t, n in zip(value.axes, value.shape, strict=True))  # fmt: skip
    start = value if uniform(x) is None else x
    return emit(trace, "carry", {}, [start], Value(value.shape, axes))


def _same(trace: Trace, a: Value, b: Operand) -> None:
    b = plain(trace, b)
    trace.same.append((a, b))
    for s, t in zip(a.axes, b.axes, strict=True):
        unify(s, t)


def _cond(trace: Trace, params: dict, xs: Sequence[Operand]) -> Sequence[Operand]:
    """A branch that is known, or all of them: their results are one."""
    which, branches = uniform(xs[0]), params["branches"]
    if which is not None:
        return _call(
            trace, branches[min(max(int(which), 0), len(branches) - 1)], xs[1:]
        )
    plain(trace, xs[0])
    results = [_call(trace, b, xs[1:]) for b in branches]
    outs = []
    for cases in zip(*results, strict=True):
        values = [plain(trace, x) for x in cases]
        axes = values[0].axes
        for x in values[1:]:
            axes = tuple(map(meet, axes, x.axes))
        outs.append(emit(trace, "add", {}, values, Value(values[0].shape, axes)))
    return outs


def _while(trace: Trace, params: dict, xs: Sequence[Operand]) -> Sequence[Operand]:
    test, body = params["cond_nconsts"], params["body_nconsts"]
    carry = [_carry(trace, x) for x in xs[test + body :]]
    for x in _call(trace, params["cond_jaxpr"], [*xs[:test], *carry]):
        plain(trace, x)
    outs = _call(trace, params["body_jaxpr"], [*xs[test : test + body], *carry])
    for a, b in zip(carry, outs, strict=True):
        _same(trace, a, b)
    return carry


def _scan(trace: Trace, params: dict, xs: Sequence[Operand]) -> Sequence[Operand]:
    """What is scanned over is an axis of everything inside; a carry orders it."""
    if "num_carry" in params:
        consts, carried = params["num_consts"], params["num_carry"]
    else:
        consts, carried = [len(t) for t in params["ft_in"].unpack()][:2]
    carry = [_carry(trace, x) for x in xs[consts : consts + carried]]
    length = fresh(params["length"], pinned=carried > 0)
    slices = []
    for x in xs[consts + carried :]:
        x = plain(trace, x)
        unify(x.axes[0], length)
        slices.append(x)
    trace.layers.append(length)
    dims = lambda x: {"broadcast_dimensions": range(-1, len(x.shape) - 1)}
    slices = [emit(trace, "layer", dims(x), [x], Value(x.shape[1:], x.axes[1:]))
              for x in slices]  # fmt: skip
    for x in carry:
        record(trace, x.axes)
    args = [*xs[:consts], *carry, *slices]
    outs = [plain(trace, x) for x in _call(trace, params["jaxpr"], args)]
    trace.layers.pop()
    for a, b in zip(carry, outs[:carried], strict=True):
        _same(trace, a, b)
    many = length if length.size != 1 else None
    stacked = []
    for x in outs[carried:]:
        out = Value((length.size, *x.shape), (many, *x.axes))
        up = {"broadcast_dimensions": range(1, len(x.shape) + 1)}
        stacked.append(emit(trace, "broadcast_in_dim", up, [x], out))
    return [*carry, *stacked]


_CONTROL: dict[str, Callable[..., Sequence[Operand]]] = {
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
