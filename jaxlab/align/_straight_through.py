"""Straight-through matching (Ainsworth et al., 2022)."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .. import tree
from ..rewrite import Symmetries, permute
from ..types import Params
from ._features import as_inputs
from ._tables import Permutations, compose
from ._weight_matching import weight_matching

if TYPE_CHECKING:
    import optax


def straight_through_matching(
    loss: Callable[..., Array],
    params_a: Params,
    params_b: Params,
    symmetries: Symmetries,
    batches: Iterable[Any],
    *,
    key: PRNGKeyArray,
    optimiser: "optax.GradientTransformation | None" = None,
    start: Permutations | None = None,
) -> dict[str, Array]:
    r"""The permutations that lower the loss half-way between two models, learned.

    $\min_{\tilde\theta_B} L\big(\tfrac12(\theta_A +
    \mathrm{proj}(\tilde\theta_B))\big)$ where proj is the permutation of $\theta_B$
    nearest to $\tilde\theta_B$, which starts at $\theta_A$. The gradient passes
    straight through the projection, so it is half that at the midpoint. Each step
    projects on the host, by `weight_matching` from the last permutations, and then
    takes one jitted optimiser step.

    Args:
      loss: a scalar of `(params, *batch)`.
      params_a: the model that stays.
      params_b: the model whose permutations are sought.
      symmetries: of both, from `rewrite.symmetries`.
      batches: tuples for `loss`, or single arrays, of one shape; one step each.
      key: consumed; the order in which groups are visited.
      optimiser: of $\tilde\theta_B$; momentum 0.9 at a rate of 0.01 without.
      start: permutations to warm-start the first projection; the identity without.

    Returns:
      int32 `[*counts, size]` by group name: those of the step whose midpoint lost
      least on its batch.

    Raises:
      ValueError: the models differ, or a leaf is not floating-point.

    Degenerate inputs:
      Without batches: the projection of $\theta_A$, which is weight matching. A loss
      that is not finite is never the least.

    References:
      Ainsworth et al., 2022, "Git Re-Basin", https://arxiv.org/abs/2209.04836,
      Section 3.3 and Algorithm 3.

    Example:
      >>> from jaxlab.rewrite import Group, Member, Place, Symmetries
      >>> hidden = Symmetries((Group("u:0", 2, (Member("u", Place(0)),)),))
      >>> a, b = {"u": jnp.array([1.0, 2.0])}, {"u": jnp.array([2.0, 1.0])}
      >>> loss = lambda p, x: jnp.sum((p["u"] - x) ** 2)
      >>> straight_through_matching(
      ...     loss, a, b, hidden, [a["u"]], key=jax.random.key(0))
      {'u:0': Array([1, 0], dtype=int32)}
    """
    import optax  # slow to import

    chosen = optax.sgd(1e-2, 0.9) if optimiser is None else optimiser
    for path, x in zip(tree.paths(params_a), jax.tree.leaves(params_a), strict=True):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise ValueError(
                f"leaf {path!r} of dtype {jnp.result_type(x)} has no slope"
            )

    @jax.jit
    def step(free: Params, state: Any, b: Params, *inputs: Any) -> Any:
        middle = jax.tree.map(_midpoint, params_a, b)
        value, slope = jax.value_and_grad(loss)(middle, *inputs)
        half = jax.tree.map(lambda g: g / 2, slope)
        updates, state = chosen.update(half, state, free)
        return optax.apply_updates(free, updates), state, value

    free = jax.tree.map(jnp.asarray, params_a)
    state = chosen.init(free)
    project = lambda x, i, tables: weight_matching(
        x, params_b, symmetries, key=jax.random.fold_in(key, i), start=tables
    )
    found: Permutations = compose(symmetries, start or {}, {})
    best, least = None, jnp.inf
    for i, batch in enumerate(batches):
        found = project(free, i, found)
        near = permute(params_b, symmetries, dict(found))
        free, state, value = step(free, state, near, *as_inputs(batch))
        if float(value) < least:
            best, least = found, float(value)
    if best is None:
        best = project(params_a, 0, found)
    return jax.tree.map(jnp.asarray, dict(best))


def _midpoint(a: Array, b: Array) -> Array:
    """Half-way between two leaves, in the dtype of the first."""
    return ((tree.widen(jnp.asarray(a)) + tree.widen(b)) / 2).astype(a.dtype)
