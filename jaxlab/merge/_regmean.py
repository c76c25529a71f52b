"""RegMean (Jin et al., 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from .. import rewrite, tree
from ..types import Params, PerModel, Stacked
from ._coefficients import lift, mix, narrow, normalised, rows, spread, wide

Uses = Mapping[str, Sequence[rewrite.Use]]


def regmean(
    models: Stacked,
    grams: Mapping[str, Array],
    *,
    uses: Uses,
    off_diagonal: PerModel = 0.9,
    weights: PerModel = 1.0,
    ridge: PerModel = 1e-6,
) -> Params:
    r"""Merges weights so that the outputs on each model's own inputs change least.

    $W = \big(\sum_k w_k G_k\big)^{-1}\sum_k w_k G_k W_k$ minimises
    $\sum_k w_k\|X_kW - X_kW_k\|_F^2$ for $G_k = X_k^\top X_k$. The entries of $G_k$ off
    the diagonal are multiplied by $\alpha$ first. Leaves without a Gram are averaged.

    Args:
      models: `[k, *leaf]` models, whose weights are the $W_k$.
      grams: `{path: [k, *stacked, *batch, n, n]}` the $G_k$, each of model k on its own
        data, stacked: what `measure.gram` gives, divided by the number of rows if the
        tasks should count alike.
      uses: `rewrite.uses(apply, params, *inputs)`: which axes of a leaf are the n.
      off_diagonal: $\alpha$ in [0, 1]; 1 leaves the Gram as it is. A scalar, or a tree
        of scalars by leaf. May be traced.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      ridge: $\rho\ge 0$, which adds $\rho\,\bar d\,\|W - \bar W\|_F^2$, with $\bar d$
        the mean diagonal of $\sum_k w_kG_k$ and $\bar W$ the average: directions that
        no input has stay with the average. A scalar, or a tree of scalars by leaf. May
        be traced.

    Returns:
      `[*leaf]` the merged model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: a Gram of another shape or of no leaf, a leaf that no product
        uses or that two use differently, or an option out of range.

    Degenerate inputs:
      A feature that is always 0, and a Gram of zeros, give the average by `weights`.
      Another singular sum of Grams, as from fewer rows than features, needs a positive
      ridge or $\alpha < 1$. One model, and equal models, give themselves.

    References:
      Jin et al., 2022, "Dataless Knowledge Fusion by Merging Weights of Language
      Models", https://arxiv.org/abs/2212.09849, Section 3.2. The authors do without the
      ridge, as FusionBench; `ridge=0` agrees with both.

    Example:
      >>> model, w = lambda w, x: x @ w, jnp.array([[[1.0]], [[4.0]]])
      >>> used = rewrite.uses(model, w[0], jnp.ones(1))
      >>> regmean(w, {"": jnp.array([[[2.0]], [[1.0]]])}, uses=used, ridge=0.0)
      Array([[2.]], dtype=float32)
    """
    x = wide(models, name="models")
    _known(grams, tree.paths(models))
    w = normalised(spread(weights, x, name="weights"), x)
    alpha = _spread(off_diagonal, x, "off_diagonal", 1)
    rho = _spread(ridge, x, "ridge", np.inf)

    def leaf(path: str, v: Array, c: Any, alpha: Any, rho: Any) -> Array:
        mean = mix(rows(c, v), v)
        if path not in grams:
            return mean
        use = product(uses, path)
        matrices = jax.vmap(lambda m: rewrite.as_matrix(m, use))(v)
        g = _checked(path, jnp.asarray(grams[path]), matrices)
        g = _damped(tree.widen(g).astype(v.dtype), alpha.astype(v.dtype))
        g = g * lift(jnp.stack([jnp.asarray(a) for a in rows(c, v)]), g)
        center = rewrite.as_matrix(mean, use)
        step = _solve(g, matrices - center[None], rho.astype(v.dtype))
        return rewrite.from_matrix(center + step, use, mean)

    return narrow(tree.path_map(leaf, x, w, alpha, rho), models)


def product(uses: Uses, path: str) -> rewrite.Use:
    """The one way in which a leaf is multiplied; raises where there is another."""
    every = [u for u in uses.get(path, ()) if u.contracted]
    found = [u for u in every if u.primitive != "gather"] or every
    kinds = {u._replace(primitive="") for u in found}
    if len(kinds) != 1:
        raise ValueError(
            f"{path!r} has a Gram matrix, but {len(kinds)} ways in which it is "
            f"multiplied; leave it out, or leave one in uses: {uses.get(path, ())}"
        )
    return found[0]


def _solve(
    g: Float[Array, "k ... n n"], deltas: Float[Array, "k ... n m"], rho: Any
) -> Float[Array, "... n m"]:
    """The regression on what the models differ by from their average."""
    exact = jax.lax.Precision.HIGHEST
    right = jnp.einsum("k...ij,k...jm->...im", g, deltas, precision=exact)
    left = jnp.sum(g, 0)
    diagonal = jnp.diagonal(left, axis1=-2, axis2=-1)
    least = rho * jnp.mean(diagonal, -1, keepdims=True)
    empty = diagonal + least <= 0
    added = jnp.where(empty, jnp.ones_like(diagonal), least)
    return jnp.linalg.solve(left + added[..., None] * _eye(left), right)


def _damped(g: Float[Array, "... n n"], alpha: Any) -> Float[Array, "... n n"]:
    """The Gram with everything off its diagonal multiplied by alpha."""
    eye = _eye(g)
    return g * (eye + (1 - eye) * alpha)


def _eye(g: Float[Array, "... n n"]) -> Float[Array, "... n n"]:
    """The identity, with the leading axes of length 1."""
    eye = jnp.eye(g.shape[-1], dtype=g.dtype)
    return eye.reshape((1,) * (g.ndim - 2) + eye.shape)


def _spread(value: PerModel, x: Stacked, name: str, top: float) -> Params:
    """An option by leaf, checked where it is concrete."""
    valid = lambda v: (v >= 0) & (v <= top) & np.isfinite(v)
    expected = f"in [0, {top}]" if np.isfinite(top) else "at least 0"
    return spread(value, x, name=name, valid=valid, expected=expected, per_model=False)


def _known(grams: Mapping[str, Array], paths: Sequence[str]) -> None:
    """Raises where a Gram belongs to no leaf."""
    for path in grams:
        if path not in paths:
            raise ValueError(f"grams has {path!r}, which is no leaf of the models")


def _checked(path: str, g: Array, matrices: Array) -> Array:
    """The Gram, with the shape that the weights call for."""
    want = (*matrices.shape[:-1], matrices.shape[-2])
    if g.shape != want:
        raise ValueError(f"grams differs at {path!r}: shape {g.shape}, expected {want}")
    return g
