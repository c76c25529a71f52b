"""Experts Weights Averaging (Huang et al., 2023): a MoE that trains, an FFN that runs.

While training, tokens are dealt to experts at random and the experts are averaged a
little each step; afterwards their mean is one network, at no cost.
"""

from collections.abc import Callable

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .. import tree
from ..types import Params, Stacked, Where


def random_partition(
    tokens: int, experts: int, *, key: PRNGKeyArray
) -> tuple[Int[Array, "e c"], Bool[Array, "e c"]]:
    """Deals tokens to experts uniformly at random, in parts of equal size.

    Args:
      tokens: how many.
      experts: e, from 1 to `tokens`.
      key: consumed.

    Returns:
      The tokens of each expert `[e, c]`, c = ceil(tokens / e), and which of them count:
      where e does not divide the tokens, some experts get one less.

    Raises:
      ValueError: no expert, or more experts than tokens.

    Degenerate inputs:
      One expert gets all tokens.

    References:
      Huang et al., 2023, "Experts Weights Averaging", https://arxiv.org/abs/2308.06093.

    Example:
      >>> parts, counts = random_partition(5, 2, key=jax.random.key(0))
      >>> sorted(parts[counts].tolist()), counts.sum(1).tolist()
      ([0, 1, 2, 3, 4], [3, 2])
    """
    if not 1 <= experts <= tokens:
        raise ValueError(f"experts must be from 1 to {tokens} tokens, got {experts}")
    each = -(-tokens // experts)
    slots = jnp.arange(each * experts).reshape(each, experts).T
    order = jax.random.permutation(key, tokens)
    return order[jnp.minimum(slots, tokens - 1)], slots < tokens


def partition_experts(
    expert: Callable[[Params, Array], Array],
    experts: Stacked,
    x: Float[Array, "*b n"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, "*b m"]:
    r"""Runs every token through one expert, drawn by random uniform partition.

    $y_i = E_{\pi(i)}(x_i)$ with $\pi$ a balanced random assignment: no router, no
    balancing loss, and each expert multiplies only its share of the tokens.

    Args:
      expert: $E$: `expert(params, tokens)`, `[c, n]` to `[c, m]`, token by token.
      experts: `[e, *leaf]` the weights of the experts.
      x: tokens, any leading axes.
      key: consumed.

    Returns:
      `[*b, m]`, in the order of `x`.

    Raises:
      ValueError: fewer tokens than experts.

    Degenerate inputs:
      Equal experts give what one of them gives.

    References:
      Huang et al., 2023, https://arxiv.org/abs/2308.06093.

    Example:
      >>> x = jnp.arange(4.0)[:, None]
      >>> partition_experts(jnp.add, jnp.ones(2), x, key=jax.random.key(0))[:, 0]
      Array([1., 2., 3., 4.], dtype=float32)
    """
    flat = x.reshape(-1, x.shape[-1])
    count = jax.tree.leaves(experts)[0].shape[0]
    parts, counts = random_partition(flat.shape[0], count, key=key)
    y = jax.vmap(expert)(experts, flat[parts])
    target = jnp.where(counts, parts, flat.shape[0])  # out of range: dropped
    out = jnp.zeros((flat.shape[0], y.shape[-1]), y.dtype)
    return out.at[target].set(y, mode="drop").reshape(*x.shape[:-1], -1)


def average_experts(params: Params, *, where: Where, rate: float) -> Params:
    r"""Moves each expert towards the mean of all.

    $W_i \leftarrow (1-\beta)W_i + \beta\frac1e\sum_j W_j$.

    Args:
      params: the model, after an optimiser's step.
      where: which leaves are stacked experts `[e, *leaf]`; `tree.glob` makes one.
      rate: $\beta$, the share rate, in [0, 1]. May be traced, e.g. a schedule.

    Returns:
      The model with those leaves averaged, in their dtypes, rounded once.

    Raises:
      ValueError: no leaf selected, a scalar or integer leaf, or a rate out of range.

    Degenerate inputs:
      Rate 0 leaves the experts, rate 1 makes all their mean; equal experts stay.

    References:
      Huang et al., 2023, https://arxiv.org/abs/2308.06093. An average over the e - 1
      others by a share b is this one with $\beta = b\,e/(e-1)$.

    Example:
      >>> average_experts({"w": jnp.array([[0.0], [4.0]])}, where=tree.glob("w"),
      ...     rate=0.5)["w"].tolist()
      [[1.0], [3.0]]
    """
    if not isinstance(rate, Tracer) and not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")

    def leaf(x: Float[Array, "e ..."]) -> Float[Array, "e ..."]:
        wide = tree.widen(x)
        pull = jnp.mean(wide, axis=0, keepdims=True) - wide
        return (wide + jnp.asarray(rate, wide.dtype) * pull).astype(x.dtype)

    return _selected(leaf, params, where)


def to_ffn(params: Params, *, where: Where) -> Params:
    """Turns the experts of a trained model into one network each: their mean.

    Args:
      params: the model.
      where: which leaves are stacked experts `[e, *leaf]`.

    Returns:
      The model with those leaves `[*leaf]`, in their dtypes, rounded once.

    Raises:
      ValueError: no leaf selected, or a scalar or integer leaf.

    Degenerate inputs:
      Equal experts convert exactly: the network is the same function.

    References:
      Huang et al., 2023, https://arxiv.org/abs/2308.06093.

    Example:
      >>> to_ffn({"w": jnp.array([[0.0], [4.0]])}, where=tree.glob("w"))["w"].tolist()
      [2.0]
    """
    mean = lambda x: jnp.mean(tree.widen(x), axis=0).astype(x.dtype)
    return _selected(mean, params, where)


def to_experts(params: Params, *, where: Where, experts: int) -> Params:
    """Copies networks into experts: the start of a fine-tuning with averaging.

    Args:
      params: the model.
      where: which leaves become stacked experts.
      experts: e, at least 1.

    Returns:
      The model with those leaves `[e, *leaf]`; `to_ffn` undoes it.

    Raises:
      ValueError: no leaf selected, or no expert.

    Degenerate inputs:
      One expert is the network with an axis of length 1.

    References:
      Huang et al., 2023, https://arxiv.org/abs/2308.06093.

    Example:
      >>> to_experts({"w": jnp.zeros(3)}, where=tree.glob("w"), experts=2)["w"].shape
      (2, 3)
    """
    if experts < 1:
        raise ValueError(f"experts must be at least 1, got {experts}")
    copy = lambda x: jnp.broadcast_to(x[None], (experts, *x.shape))
    chosen, rest = tree.partition(params, where)
    return tree.combine(jax.tree.map(copy, chosen), rest)


def _selected(fn: Callable[[Array], Array], params: Params, where: Where) -> Params:
    """A function of the selected leaves, which must be stacked; the others stay."""

    def leaf(path: str, x: Array) -> Array:
        if not jnp.ndim(x):
            raise ValueError(f"{path!r} is a scalar, expected stacked experts [e, ...]")
        return fn(x)

    chosen, rest = tree.partition(params, where)
    return tree.combine(tree.path_map(leaf, chosen), rest)
