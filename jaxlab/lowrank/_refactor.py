"""Weight refactorisation and momentum reset: Glentis et al., 2025."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from .. import tree
from ..types import Params

if TYPE_CHECKING:
    import optax


class PeriodicState(NamedTuple):
    """The state of `refactorize` and `reset_momentum`."""

    count: Array
    """Steps taken."""
    inner: Any
    """The state of the optimiser inside; empty for `refactorize`."""


def balance(a: Array, b: Array) -> tuple[Array, Array]:
    r"""The same product of balanced factors.

    $A B = U \Sigma V^\top$ becomes $(U \Sigma^{1/2}) (\Sigma^{1/2} V^\top)$, by a QR
    decomposition of each factor and the SVD of an r x r matrix: the product is never
    formed.

    Args:
      a: `[..., n, r]`.
      b: `[..., r, m]`, r at most min(n, m).

    Returns:
      `(a, b)` of the same shapes, with $A^\top A = B B^\top$ diagonal.

    Raises:
      ValueError: r is above n or m.

    Degenerate inputs:
      A zero product gives zero factors.

    References:
      Glentis et al., 2025, "Scalable Parameter and Memory Efficient Pretraining for
      LLM", https://arxiv.org/abs/2505.22922.

    Example:
      >>> a, b = balance(jnp.array([[8.0], [0.0]]), jnp.array([[0.0, 0.5]]))
      >>> float(jnp.abs(a).max()), float(jnp.abs(b).max())
      (2.0, 2.0)
    """
    n, r, m = a.shape[-2], a.shape[-1], b.shape[-1]
    if r > min(n, m):
        raise ValueError(f"factors of rank {r} of a [{n}, {m}] matrix: r > min(n, m)")
    left, x = jnp.linalg.qr(a)
    right, y = jnp.linalg.qr(b.mT)
    u, s, vt = jnp.linalg.svd(x @ y.mT, full_matrices=False)
    root = jnp.sqrt(s)
    return (left @ u) * root[..., None, :], root[..., :, None] * (right @ vt.mT).mT


def refactorize(*, period: int = 200) -> "optax.GradientTransformationExtraArgs":
    r"""Balances every pair of factors `a`, `b` every so many steps.

    After the update of a step that `period` divides, `(a, b)` becomes `balance(a, b)`:
    the product, and so the model, is what it was, but the factors are conditioned
    alike. It is the last of a chain, after the learning rate; with `reset_momentum`
    before it, whose period should be the same, since moments are of the old factors.

    Args:
      period: the steps between two refactorisations.

    Returns:
      A gradient transformation; its update needs params.

    Raises:
      ValueError: a period below 1; from the update: no params.

    Degenerate inputs:
      A fresh LoRA (b = 0) would lose its a; pairs with a zero product are left alone.

    References:
      Glentis et al., 2025, "Scalable Parameter and Memory Efficient Pretraining for
      LLM: Recent Algorithmic Advances and Benchmarking",
      https://arxiv.org/abs/2505.22922, weight refactorization.

    Example:
      >>> import optax
      >>> tx = optax.chain(optax.sgd(0.1), refactorize(period=1))
      >>> params = {"a": jnp.full((2, 1), 4.0), "b": jnp.full((1, 2), 0.25)}
      >>> zero = jax.tree.map(jnp.zeros_like, params)
      >>> updates, _ = tx.update(zero, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)
      >>> [round(float(jnp.abs(v).max()), 2) for v in new.values()]
      [1.0, 1.0]
    """
    import optax

    _check(period)

    def init(params: Params) -> PeriodicState:
        del params
        return PeriodicState(jnp.int32(0), ())

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if params is None:
            raise ValueError("refactorize needs params: update(grads, state, params)")
        count: Any = optax.safe_increment(state.count)
        same = lambda updates, _: updates
        now = count % period == 0
        out = jax.lax.cond(now, _balanced_updates, same, updates, params)
        return out, PeriodicState(count, ())

    return optax.GradientTransformationExtraArgs(init, update)


def reset_momentum(
    inner: "optax.GradientTransformation", *, period: int = 200
) -> "optax.GradientTransformationExtraArgs":
    """Starts an optimiser's state anew every so many steps.

    Args:
      inner: the optimiser, such as `optax.scale_by_adam()`. All of its state starts
        anew, the count of its bias correction too; a schedule belongs outside.
      period: the steps between two resets.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a period below 1.

    Degenerate inputs:
      A period of 1 keeps no momentum at all.

    References:
      Glentis et al., 2025, "Scalable Parameter and Memory Efficient Pretraining for
      LLM: Recent Algorithmic Advances and Benchmarking",
      https://arxiv.org/abs/2505.22922, momentum reset. Here the count is reset too, so
      that the new moments are unbiased.

    Example:
      >>> import optax
      >>> tx = reset_momentum(optax.trace(0.5), period=2)
      >>> g, state = jnp.array(1.0), tx.init(jnp.array(0.0))
      >>> for _ in range(3):
      ...     u, state = tx.update(g, state)
      >>> float(u)
      1.0
    """
    import optax

    _check(period)
    run = optax.with_extra_args_support(inner).update

    def init(params: Params) -> PeriodicState:
        return PeriodicState(jnp.int32(0), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        now = (state.count > 0) & (state.count % period == 0)
        fresh = inner.init(jax.tree.map(jnp.zeros_like, updates))
        pick = lambda new, old: jnp.where(now, new, old)
        start = jax.tree.map(pick, fresh, state.inner)
        out, after = run(updates, start, params, **extra)
        count: Any = optax.safe_increment(state.count)
        return out, PeriodicState(count, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(period: int) -> None:
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")


def _balanced_updates(updates: Any, params: Any) -> Any:
    """The updates that end at balanced factors."""
    import optax

    paths, treedef = tree.paths(params), jax.tree.structure(params)
    old = dict(zip(paths, jax.tree.leaves(params), strict=True))
    new = dict(
        zip(paths, jax.tree.leaves(optax.apply_updates(params, updates)), strict=True)
    )
    for path in paths:
        parent, _, name = path.rpartition("/")
        other = f"{parent}/b" if parent else "b"
        if name != "a" or other not in new:
            continue
        a, b = balance(new[path], new[other])
        alive = jnp.any(b != 0, axis=(-2, -1), keepdims=True)
        new[path] = jnp.where(alive, a, new[path])
        new[other] = jnp.where(alive, b, new[other])
    return jax.tree.unflatten(treedef, [new[p] - old[p] for p in paths])
