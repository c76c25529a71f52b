"""AdaLoRA: Zhang et al., 2023."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._places import method
from ._randomized import product
from ._rank import check_rank, plus, scaling, wide
from ._state import Entries, State


class Importance(NamedTuple):
    """What each trained number has mattered so far, by path and entry."""

    sensitivity: Entries
    r"""The mean $\bar{I}$ of $|\theta \, \partial L / \partial \theta|$."""
    uncertainty: Entries
    r"""The mean $\bar{U}$ of its deviation from $\bar{I}$."""


class Allocator(NamedTuple):
    """How a budget of ranks is spent while training."""

    init: Callable[[State], Importance]
    """`(state) -> importance`, all zero."""
    observe: Callable[[Importance, State, State, Any], Importance]
    """`(importance, state, slopes, step) -> importance`, after each backward pass."""
    prune: Callable[[State, Importance, Any], State]
    """`(state, importance, step) -> state`, after each step of the optimiser."""


def adalora(*, rank: int, alpha: float | None = None) -> Adapter:
    r"""An update in the form of an SVD, whose singular values may be pruned.

    $W' = W + s P \Lambda Q$ with a diagonal $\Lambda$ from zero, $P, Q$ from
    $N(0, 0.02^2)$ and $s = \alpha / r$.

    Args:
      rank: r, the rank before pruning, from 1 to min(n, m).
      alpha: the scale's numerator; `rank` by default, a scale of 1.

    Returns:
      An adapter with state `a [n, r]` ($P$), `diag [r]` ($\Lambda$), `b [r, m]`
      ($Q$). Train it with `adalora_penalty` and `adalora_allocator`.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, $\Lambda = 0$: the layer is unchanged.

    References:
      Zhang et al., 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient
      Fine-Tuning", https://arxiv.org/abs/2303.10512, section 3.1; the authors' code
      divides by r + 1e-5.

    Example:
      >>> s = adalora(rank=2).init(jax.random.key(0), jnp.ones((4, 3)))
      >>> {n: v.shape for n, v in s.items()}
      {'a': (4, 2), 'diag': (2,), 'b': (2, 3)}
    """
    check_rank(rank)
    scale = scaling(rank, alpha)

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank, w)
        left, right = jax.random.split(key)
        drawn = lambda key, *shape: 0.02 * jax.random.normal(key, shape, wide(w))
        a, b = drawn(left, w.shape[0], rank), drawn(right, rank, w.shape[1])
        return {"a": a, "diag": jnp.zeros(rank, a.dtype), "b": b}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a = like(scale * s["a"] * s["diag"][None], x)
        return plus(x @ w, (x @ a) @ like(s["b"], x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, product(scale * s["a"] * s["diag"][None], s["b"]))

    return Adapter(
        init, apply, merge, config=("adalora", ("rank", rank), ("scale", scale))
    )


def adalora_penalty(state: State) -> Array:
    r"""How far AdaLoRA's $P$ and $Q$ are from orthonormal, for the loss.

    The mean over all $P^\top$ and $Q$ of $\|Q Q^\top - I\|_F$.

    Args:
      state: of an adapted model, some of whose adapters are `adalora`.

    Returns:
      A number, to be added to the loss by a weight of 0.1 to 0.5.

    Raises:
      ValueError: no adapter is `adalora`.

    Degenerate inputs:
      Exactly orthonormal factors have slope 0.

    References:
      Zhang et al., 2023, https://arxiv.org/abs/2303.10512, section 3.1; as in the
      authors' code the norm is not squared, and the mean is taken.

    Example:
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> _, state = lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     adalora(rank=1), x, where="w", key=jax.random.key(0))
      >>> bool(jnp.abs(adalora_penalty(state) - 1) < 0.1)
      True
    """
    norms = [skew(s["a"], s["b"]) for s in leaves_of(state, "adalora").values()]
    return jnp.mean(jnp.concatenate([v.ravel() for v in norms]))


def adalora_allocator(
    *,
    target: int,
    total: int,
    warmup: int = 0,
    final: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Allocator:
    r"""The schedule that prunes AdaLoRA's singular values to a budget, over all leaves.

    The importance of triplet i of a matrix is
    $S_i = s(\lambda_i) + \frac{1}{n} \sum_j s(P_{ji}) + \frac{1}{m} \sum_j s(Q_{ij})$
    with $s = \bar{I} \bar{U}$. The $b_t$ most important of all leaves are kept, the
    other $\lambda_i$ set to zero, with
    $b_t = b_T + (b_0 - b_T) (1 - \frac{t - t_i}{T - t_f - t_i})^3$ from all triplets
    $b_0$ to `target` per matrix $b_T$.

    Args:
      target: the mean rank per matrix at the end, from 1 to that at the start.
      total: T, all steps of training.
      warmup: $t_i$, the first steps, without pruning.
      final: $t_f$, the last steps, with the final budget and no new importance.
      interval: steps between prunings before those.
      beta1: the memory of the mean sensitivity, in (0, 1).
      beta2: the memory of its uncertainty, in (0, 1).

    Returns:
      An `Allocator(init, observe, prune)` of pure functions; the step may be traced.

    Raises:
      ValueError: an option out of its range; from the functions, no adapter is
        `adalora`, or the target is above what there is.

    Degenerate inputs:
      Of equal importance, the triplets of earlier leaves are kept, so that the budget
      is met exactly.

    References:
      Zhang et al., 2023, https://arxiv.org/abs/2303.10512, section 3, and
      https://github.com/QingruZhang/AdaLoRA.

    Example:
      >>> allocator = adalora_allocator(target=2, total=100, warmup=10, final=20)
      >>> allocator._fields
      ('init', 'observe', 'prune')
    """
    if target < 1 or interval < 1 or total <= warmup + final:
        raise ValueError(
            f"adalora_allocator needs target and interval >= 1 and total > warmup + "
            f"final, got {target}, {interval}, {total}, {warmup}, {final}"
        )
    if not (0 < beta1 < 1 and 0 < beta2 < 1):
        raise ValueError(f"beta1 and beta2 must be in (0, 1), got {beta1}, {beta2}")

    def init(state: State) -> Importance:
        zeros = jax.tree.map(jnp.zeros_like, leaves_of(state, "adalora"))
        return Importance(zeros, zeros)

    def observe(
        importance: Importance, state: State, slopes: State, step: Any
    ) -> Importance:
        mine, theirs = leaves_of(state, "adalora"), leaves_of(slopes, "adalora")
        now = jax.tree.map(lambda v, g: jnp.abs(v * g), mine, theirs)
        blend = lambda beta: lambda old, new: beta * old + (1 - beta) * new
        mean = jax.tree.map(blend(beta1), importance.sensitivity, now)
        apart = jax.tree.map(lambda v, u: jnp.abs(v - u), now, mean)
        spread = jax.tree.map(blend(beta2), importance.uncertainty, apart)
        latest = lambda new, old: jnp.where(step < total - final, new, old)
        return jax.tree.map(latest, Importance(mean, spread), importance)

    def prune(state: State, importance: Importance, step: Any) -> State:
        values = [s["diag"] for s in leaves_of(state, "adalora").values()]
        first = sum(v.size for v in values)
        last = target * sum(v.size // v.shape[-1] for v in values)
        if last > first:
            raise ValueError(f"target {target} is above the mean rank of the state")
        t = jnp.asarray(step).astype(jnp.float32)
        left = 1 - (t - warmup) / (total - final - warmup)
        over = t > total - final
        budget = last + jnp.floor((first - last) * jnp.where(over, 0, left) ** 3)
        prunes = (t > warmup) & (over | (t % interval == 0))
        return _keep(state, importance, jnp.where(prunes, budget, first))

    return Allocator(init, observe, prune)


def _keep(state: State, importance: Importance, budget: Array) -> State:
    """The state with as many triplets as a budget says, the most important ones."""
    leaves = leaves_of(state, "adalora")
    scores = {path: _scores(importance, path) for path in leaves}
    flat = jnp.concatenate([v.ravel() for v in scores.values()])
    place = jnp.argsort(jnp.argsort(-flat))
    kept, pruned = place < budget.astype(place.dtype), dict(state.leaves)
    for path, v in scores.items():
        mine, kept = jnp.split(kept, [v.size])
        diag = jnp.where(mine.reshape(v.shape), leaves[path]["diag"], 0)
        pruned[path] = leaves[path] | {"diag": diag}
    return state.replace(leaves=pruned)


def leaves_of(state: State, name: str) -> Entries:
    """The entries of the leaves of one method; raises where there is none."""
    places = [p.path for p in state.spec.places if method(p.adapter) == name]
    if not places:
        raise ValueError(f"no adapter of the state is {name}")
    return {path: state.leaves[path] for path in places}


def skew(a: Array, b: Array) -> Array:
    r"""$\|A^\top A - I\|_F$ and $\|B B^\top - I\|_F$, of stacked factors too."""
    grams = jnp.stack([product(a.mT, a), product(b, b.mT)])
    apart = grams - jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), grams.shape)
    square = jnp.sum(jnp.square(apart), (-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _scores(importance: Importance, path: str) -> Array:
    """The importance of each triplet of a leaf."""
    mean, spread = importance.sensitivity[path], importance.uncertainty[path]
    s = {name: mean[name] * spread[name] for name in ("a", "b", "diag")}
    return s["diag"] + s["a"].mean(-2) + s["b"].mean(-1)
