"""Fisher-weighted averaging (Matena & Raffel, 2021)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, rows, slices, spread, total, wide
from ._gram import root


def fisher(
    models: Stacked,
    fishers: Stacked,
    *,
    weights: PerModel = 1.0,
    floor: PerModel = 1e-6,
    normalize: bool = False,
) -> Params:
    r"""Averages every parameter by how precisely each model knows it.

    $\theta_j = \frac{\sum_k \lambda_k(F_{kj} + \epsilon_k)\theta_{kj}}
    {\sum_k \lambda_k(F_{kj} + \epsilon_k)}$.

    Args:
      models: `[k, *leaf]` models $\theta_k$.
      fishers: `[k, *leaf]` diagonal Fisher information $F_k \ge 0$ of each, for example
        of `measure.fisher` divided by the number of examples.
      weights: $\lambda_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      floor: $\epsilon_k$, what is added to the Fisher: a scalar, `[k]`, or a tree of
        either by leaf. `[1e-6, 0, 0]` leaves what no model knows to the first. May be
        traced.
      normalize: divide $\lambda_k$ by $\|F_k\|_2 + \epsilon_k$, the norm over all
        leaves, so that models of unlike scale count alike.

    Returns:
      `[*leaf]` the merged model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: the trees differ, a leaf is not floating-point (take integer leaves
        from one model), or a negative floor.

    Degenerate inputs:
      Where no model has information the floor decides: one floor for all gives the
      average by `weights`. Where the denominator is 0, as with a floor of 0, the result
      is the plain mean. Equal Fishers give the average by `weights`.

    References:
      Matena & Raffel, 2021, "Merging Models with Fisher-Weighted Averaging",
      https://arxiv.org/abs/2111.09832, Section 2.2. The floor is added, as FusionBench
      and MergeLM do, so that it is smooth; the authors' code takes the larger of both,
      for the first model alone. `normalize` is theirs and FusionBench's.

    Example:
      >>> import jax.numpy as jnp
      >>> models = {"w": jnp.array([[0.0], [4.0]])}
      >>> fisher(models, {"w": jnp.array([[1.0], [3.0]])}, floor=0.0)
      {'w': Array([3.], dtype=float32)}
    """
    x = wide(models, name="models")
    tree.check_like(fishers, models, name="fishers")
    f = wide(fishers, name="fishers")
    w = spread(weights, x, name="weights")
    at_least_0 = lambda v: v >= 0
    eps = spread(floor, x, name="floor", valid=at_least_0, expected="at least 0")
    norms = _norms(f) if normalize else None
    merged = jax.tree.map(lambda *leaf: _average(norms, *leaf), x, f, w, eps)
    return narrow(merged, models)


def _average(norms: Array | None, *leaf: Any) -> Array:
    """The merge of one leaf: models, Fishers, weights and floors."""
    x, f, w, eps = leaf
    floors = rows(eps, x)
    scale = [jnp.asarray(c) for c in rows(w, x)]
    if norms is not None:
        sizes = [n.astype(x.dtype) + e for n, e in zip(norms, floors, strict=True)]
        scale = [_ratio(c, n) for c, n in zip(scale, sizes, strict=True)]
    parts = zip(scale, slices(f.astype(x.dtype)), floors, strict=True)
    precision = [c * (v + e) for c, v, e in parts]
    below = total(precision)
    none = below == 0
    safe = jnp.where(none, jnp.ones_like(below), below)
    pairs = zip(precision, slices(x), strict=True)
    above = total([p / safe * v for p, v in pairs])
    return jnp.where(none, jnp.mean(x, 0), above)


def _norms(f: Stacked) -> Float[Array, " k"]:
    """The Euclidean norm of every model's Fisher, with gradient 0 at 0."""
    leaves = [v.reshape(v.shape[0], -1) for v in jax.tree.leaves(f)]
    dtype = jnp.result_type(*leaves)
    square = total([jnp.sum(jnp.square(v.astype(dtype)), 1) for v in leaves])
    return root(square)


def _ratio(a: Array, b: Array) -> Array:
    """The quotient, and `a` where `b` is 0."""
    return a / jnp.where(b == 0, jnp.ones_like(b), b)
