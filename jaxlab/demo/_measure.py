"""What the demo measures: accuracies, the way to a merged model, sign conflicts."""

import functools as ft
from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from .. import tree
from ..types import Apply, Params, Stacked

SHARE = 0.2  # the entries that count as large


class Conflict(NamedTuple):
    """Sign conflicts of one weight, one number per pair of experts `[pairs]`."""

    name: str  # its layer and shape
    every: np.ndarray  # share of all entries with opposite signs
    large: np.ndarray  # the same among entries large in both


@ft.partial(jax.jit, static_argnames="apply")
def accuracy(
    models: Stacked, x: Float[Array, "t n d"], y: Int[Array, " n"], *, apply: Apply
) -> Float[Array, "k t"]:
    """The accuracy of every stacked model on every task."""
    one = lambda params, x: jnp.mean(jnp.argmax(apply(params, x), -1) == y)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(models, x)


@jax.jit
def between(base: Params, model: Params, steps: Float[Array, " l"]) -> Stacked:
    """The models `base + step (model - base)`, stacked over the steps."""
    at = lambda step: jax.tree.map(lambda b, m: b + step * (m - b), base, model)
    return jax.vmap(at)(steps)


def conflicts(deltas: Stacked) -> list[Conflict]:
    """How often the experts' changes pull an entry both ways, weight by weight."""
    flat = dict(zip(tree.paths(deltas), jax.tree.leaves(deltas), strict=True))
    return [_conflict(path, np.asarray(x)) for path, x in flat.items() if x.ndim > 2]


def _conflict(path: str, delta: np.ndarray) -> Conflict:
    rows = delta.reshape(len(delta), -1)
    large = [np.abs(r) >= np.quantile(np.abs(r), 1 - SHARE) for r in rows]
    every, both = [], []
    for i, j in combinations(range(len(rows)), 2):
        against = rows[i] * rows[j] < 0
        every.append(against.mean())
        both.append(against[large[i] & large[j]].mean())
    name = f"{path.removesuffix('/value')}\n{' x '.join(map(str, delta.shape[1:]))}"
    return Conflict(name, np.array(every), np.array(both))
