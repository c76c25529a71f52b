"""The least squares of one product of matrices in a merged model."""

import jax.numpy as jnp
from jaxtyping import Array
import numpy as np

from .. import rewrite
from ..rewrite import Symmetries, Use
from ._features import numbers
from ._widen import Sides, Wide, sides


def solve(
    wide: Wide,
    uses: tuple[Use, Use],
    gram: np.ndarray,
    leaves: tuple[Array, Array],
    start: Array,
    *,
    ridge: float,
) -> Array:
    """The weights that map merged inputs to merged outputs, from those to start from.

    `uses` are those of the leaf in the models and in the merged one, `gram` the inner
    products `[blocks, 2 n, 2 n]` of the inputs of A and B, `leaves` their weights.
    """
    before, after = uses
    n, shape = gram.shape[-1] // 2, np.shape(start)
    ours, theirs = (matrices(x, before) for x in leaves)
    source = {}
    for side in ("input", "output"):
        ids = numbers(before, leaves[0].shape, side)
        source[side] = matrices(_selected(wide, before.path, ids), after)
    read, made = (sides(wide, before.path, shape, s) for s in ("input", "output"))
    out = matrices(start, after)
    for i, w in enumerate(out):
        rows, columns = source["input"][i][:, 0], source["output"][i][0]
        block, columns = rows[0] // n, columns % ours.shape[-1]
        ins = Sides(*(matrices(s, after)[i][:, 0] for s in read))
        outs = Sides(*(matrices(s, after)[i][0] for s in made))
        mix = np.zeros((len(rows), 2 * n))
        a, b = halved(ins)
        mix[np.arange(len(rows)), rows % n] = a
        mix[np.arange(len(rows)), n + rows % n] = b
        a, b = halved(outs)
        targets = [ours[block][:, columns] * a, theirs[block][:, columns] * b]
        seen = mix @ gram[block].astype(np.float64)
        out[i] = nearest(
            (seen @ mix.T, seen @ np.concatenate(targets)), w, ins, outs, ridge=ridge
        )
    return rewrite.from_matrix(jnp.asarray(out), after, start)


def nearest(
    normal: tuple[np.ndarray, np.ndarray],
    w: np.ndarray,
    ins: Sides,
    outs: Sides,
    *,
    ridge: float,
) -> np.ndarray:
    r"""The solution of normal equations nearest to w: A's outputs see no input of B.

    $(G + \lambda I)(W - W_0) = C - G W_0$, with $\lambda$ the ridge times the mean of
    G's diagonal; without a ridge, the one of least norm.
    """
    left, right = normal
    out = w.copy()
    for here, seen in (
        (outs.a & outs.b, ins.a | ins.b),
        (outs.a & ~outs.b, ins.a),
        (~outs.a & outs.b, ins.b),
    ):
        if not here.any() or not seen.any():
            continue
        square = left[np.ix_(seen, seen)]
        rest = right[np.ix_(seen, here)] - square @ w[np.ix_(seen, here)]
        pull = ridge * square.diagonal().mean()
        if pull > 0:
            step = np.linalg.solve(square + pull * np.eye(len(square)), rest)
        else:
            step = np.linalg.lstsq(square, rest, rcond=None)[0]
        out[np.ix_(seen, here)] += step
    return out


def halved(own: Sides) -> tuple[np.ndarray, np.ndarray]:
    """What each model contributes: half where a unit is of both."""
    share = np.where(own.a & own.b, 0.5, 1.0)
    return share * own.a, share * own.b


def matrices(leaf: Array | np.ndarray, use: Use) -> np.ndarray:
    """The matrices `[blocks, n, m]` of a leaf, on the host; floats in float64."""
    found = np.asarray(rewrite.as_matrix(jnp.asarray(leaf), use))
    found = found.reshape(-1, *found.shape[-2:])
    return found if found.dtype.kind in "bi" else found.astype(np.float64)


def _selected(wide: Wide, path: str, leaf: np.ndarray) -> Array:
    """One leaf of the models, as it is in the merged one."""
    groups = tuple(
        g._replace(members=tuple(m for m in g.members if m.path == path))
        for g in wide.symmetries.groups
    )
    return rewrite.select({path: leaf}, Symmetries(groups), wide.units)[path]
