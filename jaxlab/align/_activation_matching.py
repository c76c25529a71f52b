"""Activation matching (Ainsworth et al., 2022)."""

from collections.abc import Iterable, Mapping
import functools as ft
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
import numpy as np

from .. import rewrite, tree
from ..rewrite import Group, Member, Symmetries, unfold
from ..types import Apply, Params, Where
from ._descent import Leaves, Likeness, by_path, descend
from ._features import Reading, Side, Uses, numbers, peek, readings, stream, tells
from ._weight_matching import check_groups

By = Literal["product", "covariance", "correlation"]


def activation_matching(
    apply: Apply,
    params_a: Params,
    params_b: Params,
    symmetries: Symmetries,
    batches: Iterable[Any],
    *,
    key: PRNGKeyArray,
    by: By = "product",
    where: Where | None = None,
) -> dict[str, Array]:
    r"""The permutations of units that bring two models' activations close on data.

    $\arg\min_P \sum_x \|z_A(x) - P z_B(x)\|^2 = \arg\max_P \langle P, \sum_x z_A(x)
    z_B(x)^\top\rangle$ for each group, one linear assignment each. The activations of a
    unit are what the weights that read it are multiplied by; where no weight reads a
    group (the dimensions of queries and keys) they are what its weights put out.

    Args:
      apply: the function `apply(params, *inputs)` of both models.
      params_a: the model that stays.
      params_b: the model whose permutations are sought.
      symmetries: of both, from `rewrite.symmetries`.
      batches: tuples of inputs, or single inputs, of one shape; passed over once.
      key: consumed; the order in which groups are visited.
      by: "product" compares by the sum above, "covariance" after subtracting means,
        "correlation" after dividing by standard deviations too.
      where: which leaves to look at the activations of; all without. A leaf that is
        used twice is not looked at.

    Returns:
      int32 `[*counts, size]` by group name, for `rewrite.permute(params_b, ...)`.

    Raises:
      ValueError: the models differ, no batch, an unknown `by`, or a group that no
        leaf shows the activations of.

    Degenerate inputs:
      A unit that never varies correlates 0 with all. Units alike stay where they are.

    References:
      Ainsworth et al., 2022, "Git Re-Basin", https://arxiv.org/abs/2209.04836,
      Section 3.1; correlations as Li et al., 2015, "Convergent Learning",
      https://arxiv.org/abs/1511.07543. Of a convolution's input the middle tap counts.

    Example:
      >>> from jaxlab import rewrite
      >>> apply = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]
      >>> a = {"u": jnp.array([[1.0, 2.0]]), "v": jnp.array([[3.0], [4.0]])}
      >>> b, x = jax.tree.map(lambda v: v[::-1, ::-1], a), jnp.array([[0.1], [0.2]])
      >>> found = rewrite.symmetries(apply, a, x)
      >>> activation_matching(apply, a, b, found, [x], key=jax.random.key(0))
      {'u:1': Array([1, 0], dtype=int32)}
    """
    if by not in get_args(By):
        raise ValueError(f"by must be one of {get_args(By)}, got {by!r}")
    tree.check_like(params_b, params_a, name="params_b")
    check_groups(params_a, symmetries)
    first, batches = peek(batches)
    shown = _shown(rewrite.uses(apply, params_a, *first), params_a, symmetries, where)
    sums = stream(apply, params_a, params_b, batches, shown, _sums)
    totals = {name: _alike(m, by) for name, m in sums.items()}
    pseudo, ids = _as_leaves(symmetries, shown, by_path(params_a))
    scores = ft.partial(_scores, shown, totals)
    likeness = Likeness(ft.partial(scores, pairs=True), ft.partial(scores, pairs=False))
    found = descend(pseudo, ids, ids, likeness, key=key, iterations=100, start={})
    return jax.tree.map(jnp.asarray, found)


def _shown(
    uses: Uses, params: Params, symmetries: Symmetries, where: Where | None
) -> dict[str, Reading]:
    """What to look at: inputs, and outputs for groups that are in no input."""
    leaves = by_path(params)
    on = lambda side: {
        p: r
        for p, r in readings(uses, params, symmetries, side).items()
        if where is None or where(p, leaves[p])
    }
    sides: dict[Side, dict[str, Reading]] = {"input": on("input"), "output": {}}
    outputs = on("output")
    for group in symmetries.groups:
        if _members(group, sides["input"], leaves):
            continue
        found = _members(group, outputs, leaves)
        if not found:
            raise ValueError(
                f"no leaf shows the activations of group {group.name!r}: leave it out "
                f"of the symmetries, or match its weights"
            )
        sides["output"] |= {m.path: outputs[m.path] for m in found}
    return {f"{p} {side}": r for side, x in sides.items() for p, r in x.items()}


def _members(
    group: Group, found: Mapping[str, Reading], leaves: Leaves
) -> tuple[Member, ...]:
    """The members whose units are told apart by the features of a reading."""
    ids = lambda r: numbers(r.use, leaves[r.use.path].shape, r.side)
    mine = [m for m in group.members if m.path in found]
    return tuple(m for m in mine if tells(ids(found[m.path]), m, group))


def _as_leaves(
    symmetries: Symmetries, shown: Mapping[str, Reading], leaves: Leaves
) -> tuple[Symmetries, Leaves]:
    """The features as leaves that hold their numbers, and the groups of those."""
    groups = []
    for group in symmetries.groups:
        members: list[Member] = []
        for key, reading in shown.items():
            found = _members(group, {reading.use.path: reading}, leaves)
            members += [m._replace(path=key) for m in found]
        groups.append(group._replace(members=tuple(members)))
    ids = {
        key: jnp.asarray(numbers(r.use, leaves[r.use.path].shape, r.side))
        for key, r in shown.items()
    }
    return Symmetries(tuple(groups)), ids


def _scores(
    shown: Mapping[str, Reading],
    totals: Mapping[str, np.ndarray],
    group: Group,
    a: Leaves,
    b: Leaves,
    *,
    pairs: bool,
) -> np.ndarray:
    """The likeness of units of a and b, from the likeness of their features."""
    out = np.zeros((*group.counts, group.size, *(group.size,) * pairs), np.float32)
    for member in group.members:
        reading, alike = shown[member.path], totals[member.path]
        slots = np.full(reading.features, -1)
        slots[list(reading.kept)] = np.arange(len(reading.kept))
        ids = [np.asarray(unfold(x[member.path], member, group)) for x in (a, b)]
        _, places = np.unique(ids[0][(0,) * (ids[0].ndim - 1)], return_index=True)
        for place in places:
            x, y = (i[..., place] for i in ids)
            block, x, y = (
                x // reading.features,
                *(slots[i % reading.features] for i in (x, y)),
            )
            if x.min() < 0:
                continue
            if pairs:
                block, x, y = block[..., None], x[..., None], y[..., None, :]
            out += alike[block, x, y]
    return out


def _sums(x: Array, y: Array) -> dict[str, Array]:
    """Sums over rows, of `[blocks, rows, features]` of two models."""
    return {
        "xy": jnp.einsum("prn,prm->pnm", x, y, precision="highest"),
        "x": x.sum(1),
        "y": y.sum(1),
        "xx": jnp.square(x).sum(1),
        "yy": jnp.square(y).sum(1),
        "rows": jnp.float32(x.shape[1]),
    }


def _alike(sums: Mapping[str, Array], by: By) -> np.ndarray:
    """How alike the features of two models are, `[blocks, n, n]`."""
    s = {n: np.asarray(v, np.float64) / float(sums["rows"]) for n, v in sums.items()}
    out = s["xy"]
    if by != "product":
        out = out - s["x"][..., None] * s["y"][:, None]
    if by == "correlation":
        x, y = s["xx"] - s["x"] ** 2, s["yy"] - s["y"] ** 2
        scale = np.sqrt(np.maximum(x, 0)[..., None] * np.maximum(y, 0)[:, None])
        out = np.divide(out, scale, out=np.zeros_like(out), where=scale > 0)
    return out.astype(np.float32)
