"""Which operations consume which params leaves, from the jaxpr."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from .. import tree
from ..types import Params
from ._matrix import Use
from ._sites import Site, opaque, site
from ._views import Axis, View, follow, peeled, restacked, whole

CALLS = frozenset(
    {
        "jit", "pjit", "closed_call", "core_call", "call", "custom_jvp_call",
        "custom_vjp_call", "custom_vjp_call_jaxpr", "remat2", "checkpoint", "remat",
    }
)  # fmt: skip
Views = list[View | None]


def uses(apply: Callable[..., Any], params: Params, *inputs: Any) -> dict[str, Any]:
    """Every operation that consumes a params leaf, found in the program.

    A leaf is followed through casts, transposes, reshapes that split or merge its axes,
    broadcasts, calls, `jax.checkpoint`, custom derivatives, `cond`, `while` and `scan`,
    which may slice it.

    Args:
      apply: the function `apply(params, *inputs)`.
      params: its parameters; `ShapeDtypeStruct`s will do.
      *inputs: its inputs, likewise.

    Returns:
      `{path: (Use, ...)}` in program order: paths by their first use, then those that
      are not used, each with its uses. A tied leaf has several uses.

    Example:
      >>> import jax.numpy as jnp
      >>> apply = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
      >>> params = {"w": jnp.zeros((4, 3))}
      >>> [u.contracted for u in uses(apply, params, jnp.zeros((1, 4)))["w"]]
      [(0,), (1,)]
    """
    closed = jax.make_jaxpr(apply)(params, *inputs)
    views = leaves(params, closed)
    out: dict[str, list[Use]] = {}
    for found in walk(closed.jaxpr, views)[1]:
        out.setdefault(found.use.path, []).append(found.use)
    for path in tree.paths(params):
        out.setdefault(path, [])
    return {path: tuple(found) for path, found in out.items()}


def leaves(params: Params, closed: Any) -> Views:
    """The view that each argument of a traced function is: of a leaf, or none."""
    paths = tree.paths(params)
    variables = closed.jaxpr.invars
    known = zip(paths, variables, strict=False)
    views: Views = [whole(path, v.aval.shape) for path, v in known]
    return views + [None] * (len(variables) - len(paths))


def walk(jaxpr: Any, views: Sequence[View | None]) -> tuple[Views, list[Site]]:
    """The views that a jaxpr's results are, and the sites in it, in order."""
    known: dict[Any, View] = {}
    note(known, jaxpr.invars, views)
    sites: list[Site] = []
    for eqn in jaxpr.eqns:
        ins = look(known, eqn.invars)
        if any(ins):
            outs, found = step(eqn, ins)
            sites += found
            note(known, eqn.outvars, outs)
    return look(known, jaxpr.outvars), sites


def step(eqn: Any, views: Views) -> tuple[Views, list[Site]]:
    """The views that an equation's results are, and the sites in it."""
    name = eqn.primitive.name
    if name in CALLS:
        return walk(body(eqn)[0], views)
    if name == "scan":
        return _scan(eqn, views)
    if name == "while":
        return _while(eqn, views)
    if name == "cond" and not eqn.params.get("branches_platforms"):
        return _cond(eqn, views)
    outs = follow(eqn, views)
    if outs is not None:
        return outs, []
    found = [site(eqn, i, view) for i, view in enumerate(views) if view is not None]
    return [None] * len(eqn.outvars), found


def look(known: dict[Any, View], atoms: Sequence[Any]) -> Views:
    """The views of variables and literals."""
    return [None if isinstance(a, jex.Literal) else known.get(a) for a in atoms]


def note(known: dict[Any, View], variables: Sequence[Any], views: Any) -> None:
    """Remembers the views of variables."""
    pairs = zip(variables, views, strict=True)
    known.update({v: view for v, view in pairs if view is not None})


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants, of one that may or may not be closed."""
    if isinstance(jaxpr, jex.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def body(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr that a call runs."""
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return opened(next(eqn.params[k] for k in keys if k in eqn.params))


def scan_sizes(params: Any) -> tuple[int, int]:
    """How many constants and how many carried values a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = (len(part) for part in params["ft_in"].unpack())
    return consts, carry


def carried(run: Callable[[Views], Views], views: Views) -> tuple[Views, list[int]]:
    """The carried values that are the same leaf in every iteration, and the others.

    `run` gives the views that a body returns for those it is given.
    """
    views, lost = list(views), []
    while True:
        after = run(views)
        changed = [i for i, v in enumerate(views) if v is not None and after[i] != v]
        if not changed:
            return views, sorted(lost)
        for i in changed:
            views[i] = None
        lost += changed


def scan_views(eqn: Any, views: Views) -> tuple[Views, list[int]]:
    """The views inside a scan, and which operands it carries but changes."""
    consts, carry = scan_sizes(eqn.params)
    jaxpr, _ = opened(eqn.params["jaxpr"])
    fixed = views[:consts]
    sliced = [v if v is None else peeled(v) for v in views[consts + carry :]]
    run = lambda kept: walk(jaxpr, [*fixed, *kept, *sliced])[0][:carry]
    kept, lost = carried(run, views[consts : consts + carry])
    return [*fixed, *kept, *sliced], [consts + i for i in lost]


def sliced(outer: Views, inner: Views) -> set[tuple[str, tuple[Axis, ...]]]:
    """The leaves that a scan slices, with all that scans have sliced away by then."""
    pairs = zip(outer, inner, strict=True)
    both = ((u, v) for u, v in pairs if u is not None and v is not None)
    return {(v.path, v.levels) for u, v in both if u.levels != v.levels}


def _scan(eqn: Any, views: Views) -> tuple[Views, list[Site]]:
    consts, carry = scan_sizes(eqn.params)
    inner, lost = scan_views(eqn, views)
    outs, sites = walk(opened(eqn.params["jaxpr"])[0], inner)
    kept = inner[consts : consts + carry]
    sites += _escaped(eqn, kept, outs[:carry])
    new, length = sliced(views, inner), eqn.params["length"]
    stack = lambda v: restacked(v, (v.path, v.levels) in new, length)
    rest = [v if v is None else stack(v) for v in outs[carry:]]
    return kept + rest, _lost(eqn, views, lost) + sites


def while_views(eqn: Any, views: Views) -> tuple[Views, Views, list[int]]:
    """The views in the condition and the body of a loop; operands that change."""
    test, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    jaxpr, _ = opened(eqn.params["body_jaxpr"])
    fixed = views[test : test + consts]
    run = lambda kept: walk(jaxpr, [*fixed, *kept])[0]
    kept, lost = carried(run, views[test + consts :])
    return [*views[:test], *kept], [*fixed, *kept], [test + consts + i for i in lost]


def _while(eqn: Any, views: Views) -> tuple[Views, list[Site]]:
    test, inner, lost = while_views(eqn, views)
    first = walk(opened(eqn.params["cond_jaxpr"])[0], test)[1]
    outs, sites = walk(opened(eqn.params["body_jaxpr"])[0], inner)
    kept = inner[eqn.params["body_nconsts"] :]
    sites += _escaped(eqn, kept, outs)
    return kept, _lost(eqn, views, lost) + first + sites


def _cond(eqn: Any, views: Views) -> tuple[Views, list[Site]]:
    branches = [walk(opened(b)[0], views[1:]) for b in eqn.params["branches"]]
    sites = [s for _, found in branches for s in found]
    ends = [outs for outs, _ in branches]
    kept = [
        same[0] if len(set(same)) == 1 else None for same in zip(*ends, strict=True)
    ]
    for outs in ends:
        sites += _escaped(eqn, kept, outs)
    return kept, sites


def _escaped(eqn: Any, kept: Views, outs: Views) -> list[Site]:
    """Leaves that leave a body other than as they are kept track of."""
    pairs = zip(kept, outs, strict=True)
    return [opaque(eqn, 0, v) for k, v in pairs if v is not None and v != k]


def _lost(eqn: Any, views: Views, operands: Sequence[int]) -> list[Site]:
    """Leaves that a loop carries and changes."""
    pairs = [(i, views[i]) for i in operands]
    return [opaque(eqn, i, view) for i, view in pairs if view is not None]
