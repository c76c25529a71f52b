"""Sums of low-rank updates, without error."""

from collections.abc import Sequence
import functools as ft
from typing import Any

from jax import Array
import jax.numpy as jnp

from ._factors import Factors, Update, check_paths


def linear(updates: Sequence[Update], *, weights: Any = 1.0) -> Update:
    r"""The exact linear combination of updates: $\sum_k w_k \Delta W_k$.

    $A = [A_1, \dots, A_K]$ and $B = [w_1 B_1; \dots; w_K B_K]$, of rank $\sum_k r_k$.

    Args:
      updates: from `factors`, of any ranks.
      weights: $w_k$, a number or `[k]`; may be traced. With 1, the sum.

    Returns:
      `{path: Factors}`; `compress` gives it a smaller rank.

    Raises:
      ValueError: no updates, of other leaves, or a weight for each of another number.

    Degenerate inputs:
      One update with the weight 1 is itself.

    Example:
      >>> one = {"w": Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
      >>> linear([one, one], weights=jnp.array([0.5, 2.0]))["w"].b[:, 0].tolist()
      [0.5, 2.0]
    """
    updates = list(updates)
    check_alike(updates)
    w = jnp.broadcast_to(jnp.asarray(weights), (len(updates),))
    return {p: _sum([u[p] for u in updates], w) for p in updates[0]}


def check_alike(updates: Sequence[Update]) -> None:
    """Raises unless the updates are of the same leaves."""
    if not updates:
        raise ValueError("there are no updates")
    for update in updates[1:]:
        check_paths(update, updates[0], "an update")


def _sum(parts: Sequence[Factors], weights: Array) -> Factors:
    """The linear combination of one leaf."""
    w = [weights[i] for i in range(len(parts))]
    rest = [
        _total([getattr(f, name) for f in parts], w) for name in Factors._fields[2:]
    ]
    if parts[0].a is None:
        return Factors(None, None, *rest)
    b = [c.astype(f.b.dtype) * f.b for c, f in zip(w, parts, strict=True)]
    a = jnp.concatenate([f.a for f in parts], -1)
    return Factors(a, jnp.concatenate(b, -2), *rest)


def _total(values: Sequence[Array | None], weights: Sequence[Array]) -> Array | None:
    """The weighted sum of those that are there."""
    pairs = zip(values, weights, strict=True)
    terms = [c.astype(v.dtype) * v for v, c in pairs if v is not None]
    return ft.reduce(jnp.add, terms) if terms else None
