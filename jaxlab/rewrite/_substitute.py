"""The operations on selected leaves, done by rules: adapters, masks, quantisers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from .. import tree
from ..types import Params
from ._control import Hook, Key, Results, Stats
from ._interpret import result, traced
from ._matrix import Use
from ._rows import output, place, project, rows
from ._sites import Site, by_level, seen

Rule = Callable[[Any, Array, Any, "Operation"], Any]


class Operation(NamedTuple):
    """The operation that a rule stands for: `op(x, w)`, and what it is made of."""

    use: Use
    """How it uses the leaf, and the leaf's path."""
    call: Callable[[Any, Any], Any]
    """`(x, w) -> y`; so is calling the operation itself."""
    view: Callable[[Array], Array]
    """A leaf, `stacked` axes sliced away, as `w` is: transposed, reshaped, cast."""
    rows: Callable[[Any], Array]
    """`x` as `[*batch, rows, n]`: what `capture` reduces."""
    project: Callable[[Any, Array], Array]
    """`(x, a [*batch, n, r]) -> rows(x) @ a`, without forming patches or one-hot."""
    place: Callable[[Array], Array]
    """`[*batch, rows, m]` as `y` is."""
    output: Callable[[Array], Array]
    """The inverse of `place`."""

    def __call__(self, x: Any, w: Any) -> Any:
        """The operation as the program has it."""
        return self.call(x, w)


def substitute(
    apply: Callable[..., Any], rules: Mapping[str, Rule]
) -> Callable[..., Any]:
    r"""The same function with the operations on selected leaves done by rules.

    $y = \mathrm{op}(x, w)$ becomes $y = \mathrm{rule}(x, w, s, \mathrm{op})$.
    An adapter of rank r, of any dense, convolutional, per-expert or embedding weight,
    in or out of a scan, is `op(x, w) + op.place(op.project(x, a) @ b)` for the update
    `from_matrix(a @ b, op.use, leaf)`; `op(x, jnp.where(op.view(mask), w, 0))` prunes,
    and any function of w quantises.

    Args:
      apply: the function `apply(params, *inputs)`.
      rules: `rule(x, w, state, op) -> y` by path or `tree.glob` pattern. `x` and `w`
        are as the program has them (cast, transposed); x is None where the operation
        has no other operand, a tuple where it has several. What is returned is cast to
        the dtype that the program expects.

    Returns:
      A function `(params, state, *inputs) -> output`, where `state` maps paths to
      pytrees; a path that it lacks has state None. Where `scan` slices the leaf, every
      array of its state has the leaf's `stacked` axes in front and is sliced alike.

    Raises:
      ValueError: no rules; from the function: a pattern matches no leaf, or none that
        is used; two match one leaf; `state` has a path without a rule, or the wrong
        leading axes; a rule returns another shape; a loop changes a leaf, or a leaf
        comes out of one (names leaf and primitive).

    Degenerate inputs:
      A rule that returns `op(x, w)` leaves the function as it is, to the bit.

    Example:
      >>> apply = lambda p, x: x @ p["w"]
      >>> low_rank = lambda x, w, s, op: op(x, w) + op.place(op.project(x, s[0]) @ s[1])
      >>> tuned = substitute(apply, {"w": low_rank})
      >>> state = {"w": (jnp.ones((2, 1)), jnp.ones((1, 3)))}
      >>> tuned({"w": jnp.zeros((2, 3))}, state, jnp.ones((1, 2))).tolist()
      [[2.0, 2.0, 2.0]]
    """
    if not rules:
        raise ValueError("substitute needs at least one rule")

    def substituted(params: Params, state: Mapping[str, Any], *inputs: Any) -> Any:
        patterns = _matched(rules, params)
        call = traced(apply, params, inputs, patterns)
        _check(rules, patterns, call.sites, state)
        by_path = {path: rules[pattern] for path, pattern in patterns.items()}

        def visit(sites: Any, bind: Any, args: Any, state: Any) -> Results:
            return _returned(sites[0], _ruled(sites, bind, args, state, by_path)), {}

        hook = Hook(lambda _: True, visit, False)
        return result(call, hook, _levels(state, call.sites))[0]

    return substituted


def _ruled(
    sites: Sequence[Site],
    bind: Callable[[Sequence[Any]], Sequence[Any]],
    args: Sequence[Any],
    state: Mapping[Key, Any],
    rules: Mapping[str, Rule],
) -> Sequence[Any]:
    """One equation by the rule of its first site, around those of the others."""
    if not sites:
        return bind(args)
    site, *rest = sites
    i, many = site.operand, site.eqn.primitive.multiple_results
    others = [*args[:i], *args[i + 1 :]]
    x: Any = others[0] if len(others) == 1 else (tuple(others) or None)

    def call(x: Any, w: Any) -> Any:
        given = [x] if len(others) == 1 else list(x or ())
        again = [*given[:i], w, *given[i:]]
        outs = _ruled(rest, bind, again, state, rules)
        return list(outs) if many else outs[0]

    w = args[i]
    op = Operation(
        site.use,
        call,
        lambda leaf: seen(leaf, site, w.dtype),
        lambda x: rows(site, x),
        lambda x, a: project(site, x, a),
        lambda y: place(site, y),
        lambda y: output(site, y),
    )
    y = rules[site.use.path](x, w, state[site.key], op)
    return y if many else [y]


def _returned(site: Site, outs: Sequence[Any]) -> list[Array]:
    """What a rule returned, in the program's dtypes; raises where the shapes differ."""
    avals = [v.aval for v in site.eqn.outvars]
    got, want = [jnp.shape(y) for y in outs], [a.shape for a in avals]
    if got != want:
        raise ValueError(
            f"the rule for {site.use.path!r} ({site.use.primitive}) returned shape "
            f"{got}, expected {want}"
        )
    return [jnp.asarray(y).astype(a.dtype) for y, a in zip(outs, avals, strict=True)]


def _matched(rules: Mapping[str, Rule], params: Params) -> dict[str, str]:
    """The pattern of each leaf that has one."""
    out: dict[str, str] = {}
    paths = tree.paths(params)
    for pattern in rules:
        if pattern in paths:
            mine = [pattern]
        else:
            hit = jax.tree.leaves(tree.path_map(tree.glob(pattern), params))
            mine = [path for path, yes in zip(paths, hit, strict=True) if yes]
        if not mine:
            raise ValueError(f"rule {pattern!r} matches no leaf of {paths[:5]}...")
        for path in mine:
            if path in out:
                raise ValueError(f"{path!r} has two rules: {out[path]!r}, {pattern!r}")
            out[path] = pattern
    return out


def _check(
    rules: Mapping[str, Rule],
    patterns: Mapping[str, str],
    sites: Sequence[Site],
    state: Mapping[str, Any],
) -> None:
    """Raises where a rule never applies, or state is for no rule."""
    used = {patterns[s.use.path] for s in sites}
    for pattern in rules:
        if pattern not in used:
            raise ValueError(f"rule {pattern!r} never applies: no operation uses it")
    for path in state:
        if path not in patterns:
            raise ValueError(f"state has {path!r}, which has no rule")
    for site in sites:
        if site.use.primitive in ("scan", "while", "cond"):
            raise ValueError(
                f"{site.use.path!r} is changed by, or comes out of, "
                f"{site.use.primitive!r}, which is not followed"
            )


def _levels(state: Mapping[str, Any], sites: Sequence[Site]) -> Stats:
    """State by leaf and scans around it, one leading axis per scan."""
    out: Stats = {}
    for site in sites:
        use = site.use
        want = tuple(use.shape[a] for a in use.stacked)

        def lead(x: Any, site: Site = site, want: Any = want) -> Array:
            shape = jnp.shape(x)
            if shape[: len(want)] != want:
                raise ValueError(
                    f"state[{site.use.path!r}] has an array of shape {shape}, expected "
                    f"the leading axes {want}: a scan slices the leaf"
                )
            return by_level(jnp.asarray(x), site)

        out[site.key] = jax.tree.map(lead, state.get(use.path))
    return out
