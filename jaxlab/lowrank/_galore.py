"""GaLore and Fira: an optimiser's state in the subspace of the gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Params
from ._rank import check_rank

if TYPE_CHECKING:
    import optax


class ProjectedState(NamedTuple):
    """The state of `galore` and `fira`."""

    count: Array
    """Steps taken."""
    projections: Params
    """Per matrix `[..., small side, r]`; empty for other leaves."""
    inner: Any
    """The state of the optimiser inside, of the projected gradients."""
    norms: Params
    """Fira's norms of the last residual, one per matrix."""


def galore(
    inner: "optax.GradientTransformation",
    *,
    rank: int,
    period: int = 200,
    scale: float = 0.25,
) -> "optax.GradientTransformationExtraArgs":
    r"""Runs an optimiser on gradients projected to rank r: its moments are r wide.

    With $n \ge m$: every `period` steps $P$ becomes the r leading right singular
    vectors of the gradient $G\,[n, m]$; $R = G P$, $N = \mathrm{inner}(R)$ and the
    update is $\alpha N P^\top$. With $n < m$ the left ones, likewise. Weight decay and
    the learning rate come after it in a chain.

    Args:
      inner: what sees the projected gradients, such as `optax.scale_by_adam()`. It gets
        no params.
      rank: r. Leaves with fewer than two axes, or a side of at most r, are left whole;
        axes before the last two count matrices (layers).
      period: T, the steps between two subspaces.
      scale: alpha.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a rank or a period below 1.

    Degenerate inputs:
      A zero gradient at the time of a projection gives an arbitrary subspace, and a
      zero update.

    References:
      Zhao et al., 2024, "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection", https://arxiv.org/abs/2403.03507, algorithm 2. The moments are kept
      when the subspace changes, as in the authors' code.

    Example:
      >>> import optax
      >>> tx = galore(optax.scale_by_adam(), rank=2)
      >>> state = tx.init({"w": jnp.zeros((8, 6))})
      >>> state.inner.mu["w"].shape
      (8, 2)
    """
    transformation = _projected(inner, rank, period)

    def finish(grads: Any, state: ProjectedState, lows: Any, updates: Any) -> Any:
        del lows
        back = lambda g, u, p: scale * _back(u, p, g) if p.size else u
        return jax.tree.map(back, grads, updates, state.projections), state.norms

    return transformation(finish)


def fira(
    inner: "optax.GradientTransformation",
    *,
    rank: int,
    period: int = 200,
    scale: float = 0.25,
    growth: float = 1.01,
) -> "optax.GradientTransformationExtraArgs":
    r"""GaLore, and the rest of the gradient scaled as the optimiser scaled its part.

    With $R = P^\top G$, $N = \mathrm{inner}(R)$ and columns i (those along r):
    $\phi_i = \|N_i\| / \|R_i\|$, $S = \phi \odot (G - \alpha P R)$, and the update is
    $\alpha P N + S$. The norm of $S$ may grow by `growth` a step at most; above, S is
    scaled down to that.

    Args:
      inner: what sees the projected gradients, such as `optax.scale_by_adam()`.
      rank: r. Leaves with fewer than two axes, or a side of at most r, are left whole;
        axes before the last two count matrices (layers).
      period: T, the steps between two subspaces.
      scale: alpha.
      growth: gamma, the norm-growth limiter.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a rank or a period below 1.

    Degenerate inputs:
      A column with no projected gradient has phi = 0.

    References:
      Chen et al., 2024, "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint?", https://arxiv.org/abs/2410.01623, algorithm 1, with 1e-8 under the
      norms as in the authors' code; there Adam's bias correction is part of the step
      size, after the limiter, here of `inner`.

    Example:
      >>> import optax
      >>> tx = fira(optax.trace(0.9), rank=2)
      >>> grads = {"w": jnp.eye(8)[:, :6]}
      >>> tx.update(grads, tx.init(grads))[0]["w"].shape
      (8, 6)
    """
    transformation = _projected(inner, rank, period)

    def one(g: Array, r: Array, u: Array, p: Array, last: Array) -> tuple[Array, Array]:
        if not p.size:
            return u, last
        along = -1 if g.shape[-2] >= g.shape[-1] else -2
        size = lambda v: jnp.linalg.norm(v, axis=along, keepdims=True)
        rest = (g - scale * _back(r, p, g)) * (size(u) / (size(r) + 1e-8))
        norm = jnp.linalg.norm(rest, axis=(-2, -1), keepdims=True)
        first = last < 0
        limiter = jnp.maximum(norm / (last + 1e-8), growth) / growth
        limiter = jnp.where(first, 1.0, limiter)
        return scale * _back(u, p, g) + rest / limiter, norm / limiter

    def finish(grads: Any, state: ProjectedState, lows: Any, updates: Any) -> Any:
        flat, treedef = jax.tree.flatten(grads)
        others = (lows, updates, state.projections, state.norms)
        pairs = [
            one(*xs) for xs in zip(flat, *map(jax.tree.leaves, others), strict=True)
        ]
        return tuple(jax.tree.unflatten(treedef, x) for x in zip(*pairs, strict=True))

    return transformation(finish)


def _projected(
    inner: "optax.GradientTransformation", rank: int, period: int
) -> "Callable[[Callable[..., Any]], optax.GradientTransformationExtraArgs]":
    """What GaLore and Fira share, but for how the update is put together."""
    import optax

    check_rank(rank)
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")

    def empty(g: Array) -> Array:
        if g.ndim < 2 or min(g.shape[-2:]) <= rank:
            return jnp.zeros((0,), g.dtype)
        return jnp.zeros((*g.shape[:-2], min(g.shape[-2:]), rank), g.dtype)

    def init(params: Params) -> ProjectedState:
        projections = jax.tree.map(empty, params)
        norm = lambda g: jnp.full((*g.shape[:-2], 1, 1), -1.0, g.dtype)
        lows = jax.tree.map(_down, params, projections)
        norms = jax.tree.map(norm, params)
        return ProjectedState(jnp.int32(0), projections, inner.init(lows), norms)

    def transformation(
        finish: Callable[..., Any],
    ) -> "optax.GradientTransformationExtraArgs":
        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            del params, extra
            grads = updates
            again = state.count % period == 0
            new = lambda g, p: p if not p.size else _subspace(g, p, again)
            state = state._replace(
                projections=jax.tree.map(new, grads, state.projections)
            )
            lows = jax.tree.map(_down, grads, state.projections)
            steps, moments = inner.update(lows, state.inner)
            out, norms = finish(grads, state, lows, steps)
            count: Any = optax.safe_increment(state.count)
            return out, ProjectedState(count, state.projections, moments, norms)

        return optax.GradientTransformationExtraArgs(init, update)

    return transformation


def _subspace(g: Array, old: Array, again: Array) -> Array:
    """The leading singular vectors of the smaller side, where it is time."""

    def leading(g: Array) -> Array:
        tall = g.shape[-2] >= g.shape[-1]
        u, _, vt = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
        return (vt.mT if tall else u)[..., : old.shape[-1]].astype(old.dtype)

    return jax.lax.cond(again, leading, lambda _: old, g)


def _down(g: Array, p: Array) -> Array:
    """A gradient in the subspace."""
    if not p.size:
        return g
    return g @ p if g.shape[-2] >= g.shape[-1] else p.mT @ g


def _back(r: Array, p: Array, g: Array) -> Array:
    """What is in the subspace, in the shape of the gradient."""
    return r @ p.mT if g.shape[-2] >= g.shape[-1] else p @ r
