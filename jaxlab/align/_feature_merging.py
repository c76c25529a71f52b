"""Iterative Feature Merging (Chen et al., 2023)."""

from collections.abc import Iterable, Mapping
import itertools as it
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from .. import rewrite, tree
from ..rewrite import Group, Member, Symmetries
from ..types import Params
from ._descent import Leaves, by_path
from ._features import Uses
from ._tables import Tables, placed
from ._weight_matching import check_groups
from ._widen import roles

Roles = Mapping[tuple[str, Member], frozenset[str]]


class Features(NamedTuple):
    """A model whose units that did the same are one.

    Attributes:
      params: the narrower model.
      complexity: by group name, how many units are left of each.
      clusters: int `[*counts, n]` by group name: which new unit each unit became.
    """

    params: Params
    complexity: dict[str, int]
    clusters: dict[str, Int[np.ndarray, "..."]]


def merge_features(
    params: Params,
    symmetries: Symmetries,
    uses: Uses,
    *,
    threshold: float = 0.1,
    sizes: Mapping[str, int] | None = None,
) -> Features:
    r"""Merges units of one model whose weights are alike, without data.

    Again and again the two units $i, j$ at the least distance $d_{ij} = \|w_i -
    w_j\|^2$ of their incoming and outgoing weights become one, while $\min d \le
    \beta\max d$; $w$ of a merged unit is the mean of what it stands for. In the end a
    unit has the mean of the incoming weights and the sum of the outgoing ones. How many
    are left is the feature complexity.

    Args:
      params: the model.
      symmetries: of it, from `rewrite.symmetries`.
      uses: of it, from `rewrite.uses`: which weights a unit comes from and goes to.
      threshold: $\beta$, from 0 to 1.
      sizes: how many units to leave, by group name; only these groups are merged, and
        the threshold is not used.

    Returns:
      `(params, complexity, clusters)`. A group that depends on others is merged for
      each index apart, to the largest size that any of them needs.

    Raises:
      ValueError: a threshold or a size out of range, a name of no group, one whose
        units no weight reads, or one that a weight both reads and makes, or may: a
        matrix that is scaled before it is used.

    Degenerate inputs:
      Units with equal weights are merged at any threshold, also 0, and the function
      stays. If all units are equal one is left. Without `sizes` groups that no weight
      reads, as the dimensions of queries and keys, or that `sizes` refuses, stay whole.

    References:
      Chen et al., 2023, "Going Beyond Neural Network Feature Similarity",
      https://arxiv.org/abs/2310.06756, Algorithm 1. Leaves of one axis are merged but,
      as in the authors' code, count for no distance. Deviations: each group is merged
      to its end in turn, rather than all by one pair in turn; incoming weights are
      averaged and outgoing ones summed, where their code sums and averages: so the
      function stays whatever follows the unit, provided it acts on each unit alone.

    Example:
      >>> apply = lambda p, x: jnp.tanh(x @ p["u"]) @ p["v"]
      >>> params = {"u": jnp.array([[1.0, 1.0, 2.0]]), "v": jnp.ones((3, 1))}
      >>> x = jnp.ones((1, 1))
      >>> found = rewrite.symmetries(apply, params, x)
      >>> merge_features(params, found, rewrite.uses(apply, params, x)).complexity
      {'u:1': 2}
    """
    check_groups(params, symmetries)
    sides = roles(uses, params, symmetries)
    goals = _goals(symmetries, sides, threshold, sizes)
    leaves = by_path(params)
    labels: dict[str, np.ndarray] = {}
    for group in symmetries.groups:
        table = np.broadcast_to(np.arange(group.size), (*group.counts, group.size))
        labels[group.name] = table
        if group.name in goals:
            mine = {m: sides[group.name, m] for m in group.members}
            table = _cluster(leaves, group, mine, threshold, goals[group.name])
            for m, side in mine.items():
                leaves[m.path] = _merged(leaves[m.path], m, group, table, side)
            labels[group.name] = table
    units = _kept(symmetries, labels)
    whole = tree.path_map(lambda p, _: leaves[p], params)
    narrow = rewrite.select(whole, symmetries, units)
    complexity = {n: t.shape[-1] for n, t in units.items()}
    return Features(narrow, complexity, labels)


def _goals(
    symmetries: Symmetries,
    sides: Roles,
    threshold: float,
    sizes: Mapping[str, int] | None,
) -> dict[str, int | None]:
    """The groups to merge, and to how many units; None where the threshold decides."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    groups = {g.name: g for g in symmetries.groups}
    every = {n: [sides[n, m] for m in g.members] for n, g in groups.items()}
    read = {n for n, found in every.items() if any(s == {"input"} for s in found)}
    mixed = {n for n, found in every.items() if any("mixed" in s for s in found)}
    if sizes is None:
        return dict.fromkeys((n for n in groups if n in read - mixed), None)
    for name, size in sizes.items():
        if name not in groups:
            raise ValueError(f"sizes names no group: {name!r} of {sorted(groups)}")
        if not 1 <= size <= groups[name].size:
            raise ValueError(
                f"sizes: {name!r} has {groups[name].size} units, cannot leave {size}"
            )
        if name not in read or name in mixed:
            why = "both reads and makes, or may," if name in mixed else "reads"
            some = "a weight" if name in mixed else "no weight"
            raise ValueError(f"sizes: {some} {why} the units of {name!r}")
    return dict(sizes)


def _cluster(
    leaves: Leaves,
    group: Group,
    mine: Iterable[Member],
    threshold: float,
    goal: int | None,
) -> np.ndarray:
    """The cluster of each unit `[*counts, n]`, as many for each index."""
    gram = np.zeros((*group.counts, *[group.size] * 2))
    for m in mine:
        x = leaves[m.path]
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        rows = np.asarray(rewrite.unfold(tree.widen(x), m, group), np.float64)
        gram += rows @ np.swapaxes(rows, -1, -2)
    out = np.empty((*group.counts, group.size), np.int32)
    orders = {
        index: _agglomerate(gram[index], threshold, goal)
        for index in it.product(*map(range, group.counts))
    }
    steps = min(len(order) for order in orders.values())
    for index, order in orders.items():
        label = np.arange(group.size)
        for i, j in order[:steps]:
            label[label == label[j]] = label[i]
        out[index] = np.unique(label, return_inverse=True)[1]
    return out


def _agglomerate(
    gram: np.ndarray, threshold: float, goal: int | None
) -> list[tuple[int, int]]:
    """The pairs that are merged, in order, from inner products of the units' weights.

    Inner products of means follow from those of what they are means of, so that a step
    costs one row.
    """
    gram, n, pairs = gram.copy(), len(gram), []
    count, alive = np.ones(n), np.ones(n, bool)
    own = gram.diagonal()
    far = np.maximum(own[:, None] + own[None] - 2 * gram, 0.0)
    noise = 1e-12 * own.max(initial=0)
    np.fill_diagonal(far, np.inf)
    while len(pairs) < n - (1 if goal is None else goal):
        i, j = sorted(map(int, np.unravel_index(far.argmin(), far.shape)))
        largest = far.max(initial=0, where=np.isfinite(far))
        if goal is None and far[i, j] > max(threshold * largest, noise):
            break
        pairs.append((i, j))
        p, q = count[[i, j]] / (count[i] + count[j])
        gram[i] = p * gram[i] + q * gram[j]
        gram[:, i] = p * gram[:, i] + q * gram[:, j]
        count[i] += count[j]
        alive[j] = False
        own = gram.diagonal()
        row = np.maximum(own + own[i] - 2 * gram[i], 0.0)
        row[~alive] = row[i] = np.inf
        far[i] = far[:, i] = row
        far[j] = far[:, j] = np.inf
    return pairs


def _merged(
    leaf: Array, member: Member, group: Group, label: np.ndarray, side: frozenset[str]
) -> Array:
    """The leaf with each unit replaced by the mean, or the sum, of its cluster."""
    same = label[..., :, None] == label[..., None, :]
    total = np.ones(same.shape[:-1]) if side == {"input"} else same.sum(-1)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    rows = rewrite.unfold(tree.widen(leaf), member, group)
    mix = jnp.asarray(same / total[..., None], rows.dtype)
    mixed = jnp.einsum("...ij,...jr->...ir", mix, rows, precision="highest")
    return rewrite.fold(leaf, member, group, mixed.astype(leaf.dtype))


def _kept(symmetries: Symmetries, labels: Mapping[str, np.ndarray]) -> Tables:
    """The first unit of each cluster, for `rewrite.select`."""
    units: Tables = {}
    for g in symmetries.groups:
        label = labels[g.name]
        table = np.stack(
            [np.argmax(label == c, -1) for c in range(int(label.max()) + 1)], -1
        )
        for outer in symmetries.groups:
            if outer.name in g.per:
                index, axis = placed(units[outer.name], outer, g)
                table = np.take_along_axis(table, index, axis)
        units[g.name] = table
    return units
