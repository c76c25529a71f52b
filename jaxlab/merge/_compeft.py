"""ComPEFT: sparse ternary task vectors (Yadav et al., 2023)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from ..types import PerModel, Stacked
from . import _bits
from ._coefficients import lift, narrow, spread, total, wide
from ._gram import root
from ._trim import Per, trim


class Ternary(NamedTuple):
    """Task vectors as two bits per entry and a number per leaf.

    Attributes:
      positive: `[k, *lead, words]` uint32: 32 entries to a word along the last axis of
        each leaf, 1 where the entry is the scale.
      negative: likewise, 1 where the entry is minus the scale.
      scale: `[k]` for each leaf.
    """

    positive: Stacked
    negative: Stacked
    scale: Stacked


def compeft(
    deltas: Stacked, *, density: PerModel, alpha: PerModel = 1.0, per: Per = "tree"
) -> Stacked:
    r"""Keeps the signs of the largest entries, all with one magnitude.

    $\tilde\tau = \alpha\,\sigma(\tau) \odot \mathrm{sgn}(\mathrm{top}_d\,\tau)$, with
    $\sigma$ the standard deviation of all entries. `io.save` writes it to a `.compeft`
    file at about its entropy.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau$.
      density: $d$, the fraction kept, in (0, 1]: a scalar or `[k]`; with `per="leaf"`
        also a tree of either by leaf. May be traced. The paper tries 0.05 to 0.5.
      alpha: $\alpha$: a scalar or `[k]`; with `per="leaf"` also a tree of either by
        leaf. May be traced. The paper tries 0.5 to 10; 1 suits large models.
      per: "tree" ranks and measures the entries of a model together (the paper), "leaf"
        those of each leaf alone.

    Returns:
      `[k, *leaf]` task vectors of the values -s, 0 and s, in the dtypes of `deltas`.

    Raises:
      ValueError: an option out of range, or a tree by leaf with `per="tree"`.

    Degenerate inputs:
      Equal entries have $\sigma = 0$ and give 0, as does a single entry. An entry of 0
      stays 0. Entries as large as the last one kept are kept too.

    References:
      Yadav et al., 2023, "ComPEFT", https://arxiv.org/abs/2311.13171, Algorithm 1;
      $\sigma$ with n - 1 as in the authors' code, which keeps one entry more.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[3.0, -3.0, 1.0, -1.0, 0.0, 0.0]])}
      >>> compeft(x, density=0.4)["w"]
      Array([[ 2., -2.,  0.,  0.,  0.,  0.]], dtype=float32)
    """
    signs, scale = _ternary(deltas, density, alpha, per)
    grow = lambda s, c: s * lift(c, s)
    return narrow(jax.tree.map(grow, signs, scale), deltas)


def ternary(
    deltas: Stacked, *, density: PerModel, alpha: PerModel = 1.0, per: Per = "tree"
) -> Ternary:
    r"""The result of `compeft` as two bits per entry.

    Args:
      deltas: `[k, *leaf]` task vectors.
      density: as in `compeft`.
      alpha: as in `compeft`.
      per: as in `compeft`.

    Returns:
      `(positive, negative, scale)`: uint32 words of 32 entries along the last axis, and
      `[k]` scales in at least float32, a $\alpha\sigma$ for each leaf.

    Raises:
      ValueError: as `compeft`.

    Degenerate inputs:
      As `compeft`.

    References:
      Yadav et al., 2023, https://arxiv.org/abs/2311.13171, Section 2.2, "two binary
      masks".

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[3.0, -3.0, 1.0, -1.0, 0.0, 0.0]])}
      >>> ternary(x, density=0.4).negative["w"]
      Array([[2]], dtype=uint32)
    """
    signs, scale = _ternary(deltas, density, alpha, per)
    positive = jax.tree.map(lambda s: _bits.planes(s > 0), signs)
    negative = jax.tree.map(lambda s: _bits.planes(s < 0), signs)
    return Ternary(positive, negative, scale)


def _ternary(
    deltas: Stacked, density: PerModel, alpha: PerModel, per: Per
) -> tuple[Stacked, Stacked]:
    """The signs that stay, and the magnitude of each model in each leaf."""
    x = wide(deltas, name="deltas")
    signs = jax.tree.map(jnp.sign, trim(x, density=density, per=per))
    factor = spread(alpha, x, name="alpha")
    leaves = jax.tree.leaves(factor)
    if per == "tree" and any(a is not leaves[0] for a in leaves):
        raise ValueError("an alpha by leaf needs per='leaf'")
    if per == "leaf":
        sigma = jax.tree.map(lambda v: _deviation([v]), x)
    else:
        whole = _deviation(jax.tree.leaves(x)) if leaves else None
        sigma = jax.tree.map(lambda _: whole, x)

    def grow(s: Float[Array, " k"], a: Any) -> Float[Array, " k"]:
        return s * jnp.broadcast_to(a.astype(s.dtype), s.shape)

    return signs, jax.tree.map(grow, sigma, factor)


def _deviation(leaves: list[Float[Array, "k ..."]]) -> Float[Array, " k"]:
    """The standard deviation of each model's entries, over n - 1."""
    dtype = np.result_type(*(v.dtype for v in leaves))
    rows = [v.reshape(v.shape[0], -1).astype(dtype) for v in leaves]
    n = sum(r.shape[1] for r in rows)
    mean = total([jnp.sum(r, 1) for r in rows]) / n
    squares = [jnp.sum(jnp.square(r - mean[:, None]), 1) for r in rows]
    return root(total(squares) / max(n - 1, 1))
