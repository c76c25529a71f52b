"""Control flow around operations that a hook does: emitted again, statistics added.

Statistics leave a scan stacked where it slices the leaf, else summed; state enters it
likewise. They leave a loop summed, and a branch that is not taken as zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend import core as jex
import jax.numpy as jnp
import numpy as np

from ._sites import Site
from ._uses import (
    CALLS,
    Views,
    body,
    opened,
    scan_sizes,
    scan_views,
    sliced,
    walk,
    while_views,
)

Key = tuple[str, tuple[Any, ...]]  # a leaf, and what scans have sliced away
Stats = dict[Key, Any]
Results = tuple[Sequence[Any], Stats]


class Hook(NamedTuple):
    """What to do at which sites."""

    select: Callable[[Site], bool]
    visit: Callable[..., Results]  # (sites, bind, args, state)
    sums: bool  # does `visit` return statistics? then there is no state


class Frame(NamedTuple):
    """What an equation with selected sites is run with."""

    views: Views
    sites: Sequence[Site]
    state: Mapping[Key, Any]
    hook: Hook
    run: Callable[..., Results]  # (jaxpr, consts, args, views, state)


def added(a: Stats, b: Stats) -> Stats:
    """Sums statistics by leaf."""
    both = {k: jax.tree.map(jnp.add, a[k], b[k]) for k in a.keys() & b.keys()}
    return a | b | both


def _call(eqn: Any, args: Sequence[Any], frame: Frame) -> Results:
    """Inlines a call under its name; its own derivative rule, if any, is lost."""
    p = eqn.params
    args = _constrained(args, p.get("in_shardings"))
    with jax.named_scope(str(p.get("name") or eqn.primitive.name)):
        outs, stats = frame.run(*body(eqn), args, frame.views, frame.state)
    return _constrained(outs, p.get("out_shardings")), stats


def _constrained(xs: Sequence[Any], shardings: Any) -> list[Any]:
    """Keeps the shardings that a jitted function asks for."""
    if shardings is None:
        return list(xs)
    fixed = lambda s: isinstance(s, jax.sharding.Sharding)
    pin = jax.lax.with_sharding_constraint
    pairs = zip(xs, shardings, strict=True)
    return [pin(x, s) if fixed(s) else x for x, s in pairs]


def _remat(eqn: Any, args: Sequence[Any], frame: Frame) -> Results:
    again = jax.checkpoint(
        lambda args, state: frame.run(*body(eqn), args, frame.views, state),
        policy=eqn.params["policy"],
        prevent_cse=eqn.params["prevent_cse"],
    )
    return again(_typed(eqn, args), dict(frame.state))


def _scan(eqn: Any, args: Sequence[Any], frame: Frame) -> Results:
    consts, carry = scan_sizes(eqn.params)
    start = consts + carry
    inner, _ = scan_views(eqn, frame.views)
    jaxpr, closed = opened(eqn.params["jaxpr"])
    args = _typed(eqn, args)
    new = sliced(frame.views, inner)
    by_layer = lambda k: any((k[0], k[1][:d]) in new for d in range(1, len(k[1]) + 1))
    shared = {k: s for k, s in frame.state.items() if not by_layer(k)}
    slices = {k: s for k, s in frame.state.items() if by_layer(k)}

    def once(values: Any, x: Any) -> Results:
        operands = [*args[:consts], *values, *x[0]]
        return frame.run(jaxpr, closed, operands, inner, shared | x[1])

    def iteration(loop: Any, x: Any) -> Any:
        outs, stats = once(loop[0], x)
        stacked = {k: s for k, s in stats.items() if by_layer(k)}
        rest = {k: s for k, s in stats.items() if not by_layer(k)}
        return (outs[:carry], added(loop[1], rest)), (outs[carry:], stacked)

    init, xs = args[consts:start], (args[start:], slices)
    sums: Stats = {}
    if frame.hook.sums and not all(by_layer(s.key) for s in frame.sites):
        one = [v.aval for v in jaxpr.invars[start:]]
        shapes = jax.eval_shape(once, init, (one, slices))[1]
        sums = _zeros({k: s for k, s in shapes.items() if not by_layer(k)})
    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    (last, sums), (ys, stacked) = jax.lax.scan(iteration, (init, sums), xs, **options)
    return [*last, *ys], sums | stacked


def _while(eqn: Any, args: Sequence[Any], frame: Frame) -> Results:
    split, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    args = _typed(eqn, args)
    test, inner, _ = while_views(eqn, frame.views)
    test_jaxpr = opened(eqn.params["cond_jaxpr"])
    body_jaxpr = opened(eqn.params["body_jaxpr"])
    for found in walk(test_jaxpr[0], test)[1] if frame.hook.sums else ():
        if frame.hook.select(found):
            raise ValueError(f"{found.use.path!r} is used in the condition of 'while'")
    fixed = args[split : split + consts]

    def going(loop: Any) -> Any:
        operands = [*args[:split], *loop[0]]
        return frame.run(*test_jaxpr, operands, test, frame.state)[0][0]

    def once(values: Any) -> Results:
        return frame.run(*body_jaxpr, [*fixed, *values], inner, frame.state)

    def iteration(loop: Any) -> Any:
        outs, stats = once(loop[0])
        return outs, added(loop[1], stats)

    init = args[split + consts :]
    sums = _zeros(jax.eval_shape(once, init)[1]) if frame.hook.sums else {}
    return jax.lax.while_loop(going, iteration, (init, sums))


def _cond(eqn: Any, args: Sequence[Any], frame: Frame) -> Results:
    index, *operands = _typed(eqn, args)

    def branch(jaxpr: Any) -> Callable[..., Results]:
        return lambda *xs: frame.run(*opened(jaxpr), xs, frame.views[1:], frame.state)

    branches = [branch(b) for b in eqn.params["branches"]]
    none: Stats = {}
    for f in branches if frame.hook.sums else ():
        none |= _zeros(jax.eval_shape(f, *operands)[1])

    def padded(f: Callable[..., Results]) -> Callable[..., Results]:
        def whole(*xs: Any) -> Results:
            outs, stats = f(*xs)
            return outs, none | stats

        return whole

    number = jnp.asarray(index, jnp.int32)
    return jax.lax.switch(number, [padded(f) for f in branches], *operands)


def _typed(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Operands, literals in the dtype that the program gives them."""
    pairs = zip(eqn.invars, args, strict=True)
    literal = lambda a: isinstance(a, jex.Literal)
    return [np.asarray(x, a.aval.dtype) if literal(a) else x for a, x in pairs]


def _zeros(shapes: Any) -> Any:
    """Zeros that vary over the axes of a `shard_map` as what is added to them does."""

    def leaf(like: Any) -> Array:
        varying = tuple(getattr(like.manual_axis_type, "varying", ()))
        zeros = jnp.zeros(like.shape, like.dtype)
        return jax.lax.pcast(zeros, varying, to="varying") if varying else zeros

    return jax.tree.map(leaf, shapes)


ENTER: dict[str, Callable[[Any, Sequence[Any], Frame], Results]] = {
    **dict.fromkeys(CALLS, _call),
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
