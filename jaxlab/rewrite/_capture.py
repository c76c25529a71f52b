"""Statistics of what goes into, or comes out of, the operations on selected leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp

from .. import tree
from ..types import Params, Where
from ._control import Hook, Key, Stats, added
from ._interpret import result, traced
from ._matrix import Use
from ._rows import output, rows
from ._sites import Site, by_axis


def capture(
    apply: Callable[..., Any],
    *,
    where: Where,
    reduce: Callable[[Array], Any],
    of: Literal["input", "output"] = "input",
    only: Callable[[Use], bool] | None = None,
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    r"""The same function, with a statistic of the input of each selected weight.

    $(\theta, x) \mapsto (y, \{p: \sum_u \mathrm{reduce}(X_{p,u})\})$ over the uses $u$
    of a leaf, where $Y_u = X_u W_p$ with `as_matrix`. It is reduced on the spot, so
    memory does not grow with depth; what no selected leaf needs is run as it is.

    Args:
      apply: the function `apply(params, *inputs)`.
      where: which leaves; `tree.glob` is the usual way to make one.
      reduce: from `[*batch, rows, n]` (m for outputs), all positions flattened into
        rows, to a pytree of arrays that may be summed: `x.T @ x`, `(x * x).sum(0)`...
        The input of a convolution is its patches, n in the order of `as_matrix`; that
        of a look-up is one-hot; that of an elementwise operation (a bias, the scale of
        a norm) has one feature per entry of the leaf.
      of: "input" or "output" of the operation.
      only: which uses of the selected leaves count; by default those that are matrix
        products, or where a leaf has none, the elementwise ones. Choose among the uses
        of tied embeddings with `lambda use: use.primitive == "dot_general"`.

    Returns:
      A function `(params, *inputs) -> (output, {path: statistic})`. Where `scan` slices
      the leaf, a statistic has its `stacked` axes in front; where it does not, or in a
      `while`, iterations are summed; a branch of `cond` that is not taken adds zero.

    Raises:
      ValueError: an unknown `of`; from the function: `where` selects nothing, a
        selected leaf is used only in ways that are not followed (names leaf and
        primitive), or in ways whose statistics have no sum.

    Degenerate inputs:
      Without rows a statistic is what `reduce` gives for none, usually zero.

    Example:
      >>> apply = lambda p, x: x @ p["w"]
      >>> grams = capture(apply, where=tree.glob("w"), reduce=lambda x: x.T @ x)
      >>> grams({"w": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0]]))[1]["w"].tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    if of not in ("input", "output"):
        raise ValueError(f"of must be 'input' or 'output', got {of!r}")

    def visit(
        sites: Sequence[Site], bind: Any, args: Any, state: Any
    ) -> tuple[Sequence[Any], Stats]:
        del state
        outs, stats = bind(args), {}
        for site in sites:
            side = args[1 - site.operand]
            x = rows(site, side) if of == "input" else output(site, outs[0])
            stats = added(stats, {site.key: jax.tree.map(jnp.asarray, reduce(x))})
        return outs, stats

    def captured(params: Params, *inputs: Any) -> tuple[Any, dict[str, Any]]:
        picked = tree.partition(params, where)[0]
        chosen = frozenset(tree.paths(picked))
        call = traced(apply, params, inputs, chosen)
        sites = _chosen(chosen, call.sites, only)
        allowed = {site.use for site in sites.values()}
        follows = lambda s: s.inputs is not None and s.use in allowed
        out, stats = result(call, Hook(follows, visit, True), {})
        return out, _named(stats, sites)

    return captured


def _chosen(
    paths: frozenset[str], found: Sequence[Site], only: Callable[[Use], bool] | None
) -> dict[Key, Site]:
    """The sites to capture, one of each kind; raises where a path has none."""
    out: dict[Key, Site] = {}
    for path in sorted(paths):
        every = [s for s in found if s.use.path == path]
        mine = [s for s in every if s.inputs is not None]
        if only is not None:
            mine = [s for s in mine if only(s.use)]
        else:
            mine = [s for s in mine if _matrix(s.use)] or mine
        if not mine:
            names = ", ".join(sorted({repr(s.use.primitive) for s in every}))
            raise ValueError(
                f"{path!r} is selected but has no use that can be captured: it is used "
                f"by {names or 'no operation'}"
            )
        kinds = {s.use._replace(primitive="") for s in mine}
        if len(kinds) > 1:
            names = ", ".join(str(s.use) for s in mine)
            raise ValueError(
                f"{path!r} has uses whose statistics have no sum; pick with `only` "
                f"among: {names}"
            )
        out |= {s.key: s for s in mine}
    return out


def _matrix(use: Use) -> bool:
    return bool(use.contracted or use.free or use.batch)


def _named(stats: Stats, sites: Mapping[Key, Site]) -> dict[str, Any]:
    """Statistics by path, their leading axes as in the leaf."""
    out: Stats = {}
    for key, value in stats.items():
        turned = jax.tree.map(lambda x, s=sites[key]: by_axis(x, s), value)
        out = added(out, {(key[0], ()): turned})
    return {path: value for (path, _), value in sorted(out.items())}
