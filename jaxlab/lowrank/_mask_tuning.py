"""Regularised mask tuning: Zheng et al., 2023."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .. import tree
from ..types import Adapter, Params
from ._rank import wide


def mask_tuning(
    *, density: float = 1.0, threshold: float = 5e-3, start: float = 1e-2
) -> Adapter:
    r"""Trains which entries of a weight to keep.

    $W' = W \odot M^{bin}$ with $M^{bin} = \mathbb{1}[M > \alpha]$.
    The slope of the binary mask is given to the real M behind it (straight through).
    With `density` below 1 only the entries whose gradient is largest have a mask.

    Args:
      density: the fraction of the entries that has a mask, in (0, 1].
      threshold: $\alpha$.
      start: what M starts at.

    Returns:
      An adapter with state `mask [n, m]`; or, below a density of 1, `mask [k]` and
      fixed `indices [k]` into the flat weight, and an `init` that takes the loss's
      gradient `[n, m]` as statistic.

    Raises:
      ValueError: density outside (0, 1]; start at or below threshold; from `init`, a
        density below 1 without a gradient.

    Degenerate inputs:
      Fresh, every mask is 1: the layer is unchanged. A mask at the threshold is 0.

    References:
      Zheng et al., 2023, "Regularized Mask Tuning: Uncovering Hidden Knowledge in
      Pre-trained Vision-Language Models", https://arxiv.org/abs/2307.15049, equations
      3 to 5; the paper chooses layers by their gradients (attention), here also
      entries. `gradient_dropout` is its regularisation.

    Example:
      >>> adapter, w = mask_tuning(), jnp.array([[2.0, 3.0]])
      >>> adapter.merge(w, {"mask": jnp.array([[0.01, 0.004]])}).tolist()
      [[2.0, 0.0]]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if start <= threshold:
        raise ValueError(f"start {start} must be above the threshold {threshold}")
    some = density < 1

    def init(key: Array, w: Array, gradient: Array | None = None) -> dict[str, Any]:
        del key
        dtype = wide(w)
        if not some:
            return {"mask": jnp.full(w.shape, start, dtype)}
        if gradient is None:
            raise ValueError("mask_tuning(density < 1) needs the gradient as statistic")
        count = max(1, round(density * w.size))
        _, places = jax.lax.top_k(jnp.abs(gradient).ravel(), count)
        indices = jnp.sort(places).astype(jnp.int32)
        return {"mask": jnp.full(count, start, dtype), "indices": indices}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        kept = _binary(s["mask"], threshold)
        if some:
            every = jnp.ones(w.size, kept.dtype)
            kept = every.at[s["indices"]].set(kept).reshape(w.shape)
        return (w.astype(wide(w, kept)) * kept).astype(w.dtype)

    options = (("density", density), ("threshold", threshold), ("start", start))
    fixed = ("indices",) if some else ()
    return Adapter(init, None, merge, fixed=fixed, config=("mask_tuning", *options))


def gradient_dropout(
    task: Params, general: Params, *, key: PRNGKeyArray, strength: float = 1.0
) -> Params:
    r"""Drops the task's gradient where it goes against general knowledge.

    $g = (1 - \lambda + \lambda\, \mathbb{1}[\mathcal{P} > U])\, g_t$ with
    $\mathcal{P} = \frac12 \Big(1 + \operatorname{sgn}(g_t) \frac{g_t + g_g}{|g_t| +
    |g_g|}\Big)$ and U uniform in [0, 1): kept for sure where the two agree in sign.

    Args:
      task: $g_t$, of the task's loss: a tree of gradients.
      general: $g_g$, of `general_knowledge`, likewise.
      key: consumed; every leaf draws by its path.
      strength: $\lambda$, in [0, 1]; 0 drops nothing. May be traced.

    Returns:
      A tree like `task`.

    Raises:
      ValueError: the trees differ in structure or shapes.

    Degenerate inputs:
      Where both are 0 the result is.

    References:
      Zheng et al., 2023, https://arxiv.org/abs/2307.15049, equations 7 to 9.

    Example:
      >>> task, general = jnp.array([1.0, -2.0]), jnp.array([3.0, -1.0])
      >>> gradient_dropout(task, general, key=jax.random.key(0)).tolist()
      [1.0, -2.0]
    """
    tree.check_like(general, task, name="general")

    def one(own: PRNGKeyArray, t: Array, g: Array) -> Array:
        wide_t, wide_g = tree.widen(t), tree.widen(g)
        size = jnp.abs(wide_t) + jnp.abs(wide_g)
        agreed = jnp.sign(wide_t) * (wide_t + wide_g) / jnp.where(size > 0, size, 1)
        drawn = jax.random.uniform(own, t.shape, agreed.dtype)
        kept = ((1 + agreed) / 2 > drawn).astype(agreed.dtype)
        return ((1 - strength + strength * kept) * wide_t).astype(t.dtype)

    return jax.tree.map(one, tree.keys_like(key, task), task, general)


def general_knowledge(
    logits: Array, general: Array, *, temperature: float = 1.0
) -> Array:
    r"""How far answers are from those of the model before tuning.

    $-\frac{T^2}{b} \sum \operatorname{softmax}(z_g / T) \cdot
    \log \operatorname{softmax}(z / T)$: the Kullback-Leibler divergence but for a
    constant, so its gradient is the divergence's.

    Args:
      logits: z `[b, classes]`.
      general: $z_g$ `[b, classes]`, of the untuned model; no slope goes there.
      temperature: T, above 0.

    Returns:
      A scalar.

    References:
      Zheng et al., 2023, https://arxiv.org/abs/2307.15049, equation 6.

    Example:
      >>> z = jnp.zeros((1, 2))
      >>> round(float(general_knowledge(z, z)), 4)
      0.6931
    """
    ours = jax.nn.log_softmax(tree.widen(logits) / temperature)
    theirs = jax.nn.softmax(jax.lax.stop_gradient(tree.widen(general)) / temperature)
    return -(temperature**2) * jnp.mean(jnp.sum(theirs * ours, -1))


@jax.custom_jvp
def _binary(mask: Array, threshold: float) -> Array:
    return (mask > threshold).astype(mask.dtype)


@_binary.defjvp
def _straight_through(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _binary(*primals), tangents[0]
