"""PST: Li et al., 2022."""

import dataclasses
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import ArrayLike

from .. import tree
from ..types import Adapter
from ._adapted import Adapted
from ._rank import check_rank, wide


def pst(
    *,
    rank: int,
    score_rank: int | None = None,
    sparsity: float = 0.0,
    scale: float = 1.0,
    low_rank: float = 1.0,
    structure: float = 1.0,
) -> Adapter:
    r"""Prunes a weight while it is adapted, by importances in small factors.

    $W' = W + \beta U V$, its importance $S = |W'| + \alpha_1 A B + \alpha_2 (R 1^\top
    + 1 C^\top)$, and the layer's weight $W' \odot M$ where M drops the
    $\lfloor s\, n m \rfloor$ entries of least importance. The slope of M is that of S
    (straight through), so the data decide what the magnitudes leave open.

    Args:
      rank: of U V, from 1 to min(n, m).
      score_rank: of A B; `rank` by default.
      sparsity: s of a fresh state, in [0, 1); `prune_to` changes it.
      scale: $\beta$.
      low_rank: $\alpha_1$.
      structure: $\alpha_2$.

    Returns:
      An adapter with states `u [n, r]`, `v [r, m]`, `score_a [n, r]`, `score_b [r, m]`,
      `score_in [n]` and `score_out [m]`, and fixed `sparsity`, a scalar.

    Raises:
      ValueError: a rank below 1 or, from `init`, above min(n, m); sparsity outside
        [0, 1).

    Degenerate inputs:
      Fresh, V = B = R = C = 0: with sparsity 0 the layer is unchanged, else it is
      pruned by magnitude. Of equal importances the earlier entries are kept.

    References:
      Li et al., 2022, "Parameter-Efficient Sparsity for Large Language Models
      Fine-Tuning", https://arxiv.org/abs/2205.11005, section 3; as in the authors' code
      the magnitudes are those of $W'$, and their slopes count too.

    Example:
      >>> adapter = pst(rank=1, sparsity=0.5)
      >>> w = jnp.array([[3.0, 1.0], [2.0, 4.0]])
      >>> adapter.merge(w, adapter.init(jax.random.key(0), w)).tolist()
      [[3.0, 0.0], [0.0, 4.0]]
    """
    second = rank if score_rank is None else score_rank
    check_rank(rank)
    check_rank(second)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        (n, m), dtype = w.shape, wide(w)
        check_rank(max(rank, second), w)
        keys = jax.random.split(key)
        return {
            "u": jax.random.normal(keys[0], (n, rank), dtype),
            "v": jnp.zeros((rank, m), dtype),
            "score_a": jax.random.normal(keys[1], (n, second), dtype),
            "score_b": jnp.zeros((second, m), dtype),
            "score_in": jnp.zeros(n, dtype),
            "score_out": jnp.zeros(m, dtype),
            "sparsity": jnp.asarray(sparsity, dtype),
        }

    def merge(w: Array, s: dict[str, Any]) -> Array:
        moved = w.astype(wide(w, s["u"])) + scale * (s["u"] @ s["v"])
        scores = jnp.abs(moved) + low_rank * (s["score_a"] @ s["score_b"])
        scores += structure * (s["score_in"][:, None] + s["score_out"][None])
        return (moved * _kept(scores, s["sparsity"])).astype(w.dtype)

    options = (("rank", rank), ("score_rank", second), ("sparsity", sparsity))
    options += (("scale", scale), ("low_rank", low_rank), ("structure", structure))
    return Adapter(init, None, merge, fixed=("sparsity",), config=("pst", *options))


def prune_to(adapted: Adapted, sparsity: ArrayLike) -> Adapted:
    """The adapted model with its `pst` adapters at another sparsity.

    Args:
      adapted: what `attach` gave.
      sparsity: in [0, 1); may be traced.

    Returns:
      The adapted model; its `fixed` is what has changed.

    Raises:
      ValueError: no adapter has a sparsity.

    Example:
      >>> from jaxlab import lowrank
      >>> p, x, key = {"w": jnp.ones((4, 4))}, jnp.ones((1, 4)), jax.random.key(0)
      >>> apply, adapter = (lambda p, x: x @ p["w"]), pst(rank=1)
      >>> model, s = lowrank.attach(apply, p, adapter, x, where="w", key=key)
      >>> prune_to(model, 0.5)(p, s, x).tolist()
      [[2.0, 2.0, 2.0, 2.0]]
    """
    changed = {
        path: s | {"sparsity": jnp.full_like(s["sparsity"], sparsity)}
        for path, s in adapted.fixed.items()
        if "sparsity" in s
    }
    if not changed:
        raise ValueError("no adapter of this model has a sparsity")
    return dataclasses.replace(adapted, fixed=adapted.fixed | changed)


def sparsity_schedule(
    step: ArrayLike,
    *,
    steps: int,
    final: float,
    initial: float = 0.0,
    warmup: float = 0.1,
    cooldown: float = 0.3,
) -> Array:
    r"""The sparsity of a training step: flat, a cubic rise, flat.

    $s_t = s_f + (s_i - s_f) (1 - p)^3$, p the fraction of the rise that is done.

    Args:
      step: t, from 0; may be traced.
      steps: how many there are.
      final: $s_f$.
      initial: $s_i$.
      warmup: the fraction of the steps before the rise.
      cooldown: the fraction after it.

    Returns:
      A scalar in float32.

    Raises:
      ValueError: warm-up and cool-down leave no step for the rise.

    References:
      Li et al., 2022, https://arxiv.org/abs/2205.11005, section 4.1. Zhu and Gupta,
      2017, "To prune, or not to prune", https://arxiv.org/abs/1710.01878, equation 1.

    Example:
      >>> times = (0, 10, 40, 70, 100)
      >>> [float(sparsity_schedule(t, steps=100, final=0.8)) for t in times]
      [0.0, 0.0, 0.699999988079071, 0.800000011920929, 0.800000011920929]
    """
    rise = (1 - warmup - cooldown) * steps
    if rise <= 0:
        raise ValueError(f"warmup {warmup} and cooldown {cooldown} leave no steps")
    time = jnp.asarray(step, jnp.float32)
    done = jnp.clip((time - warmup * steps) / rise, 0, 1)
    return final + (initial - final) * (1 - done) ** 3


@jax.custom_vjp
def _kept(scores: Array, sparsity: Array) -> Array:
    """1 at the entries of most importance, 0 at the others; straight through."""
    pruned = jnp.floor(sparsity * scores.size).astype(jnp.int32)
    mask = _largest(scores.ravel(), scores.size - pruned)
    return mask.reshape(scores.shape).astype(scores.dtype)


def _largest(flat: Array, count: Array) -> Array:
    """The `count` largest, of equal ones the first, without a sort."""
    total = flat.size
    above = tree.kth_largest(jnp.maximum(flat, 0), count)
    below = -tree.kth_largest(jnp.maximum(-flat, 0), total - count + 1)
    least = jnp.where(above > 0, above, below)
    more, equal = flat > least, flat == least
    left = count - jnp.sum(more, dtype=jnp.int32)
    return more | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= left))


def _forward(scores: Array, sparsity: Array) -> tuple[Array, Array]:
    return _kept(scores, sparsity), jnp.zeros_like(sparsity)


def _backward(nothing: Array, slope: Array) -> tuple[Array, Array]:
    return slope, nothing


_kept.defvjp(_forward, _backward)
