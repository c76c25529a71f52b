"""The formula of `trim_elect_merge`, of whole rows or of the blocks a kernel holds."""

from collections.abc import Iterable
import functools as ft
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

Elect = Literal["weighted", "raw"]
Divide = Literal["weight", "count", "none"]
TINY = 1e-8  # a smaller sum of weights divides by one, as in mergekit


class How(NamedTuple):
    """The static options."""

    elect: Elect
    divide: Divide


def agreement(
    how: How, rows: Iterable[Array], cutoffs: Any, weights: Any, *base: Array
) -> tuple[list[Array], list[Array], Array]:
    """Per model the trimmed row and where it agrees; the divisor. All in float32."""
    wide = [d.astype(jnp.float32) for d in rows]
    wide = [d - b.astype(jnp.float32) for d in wide for b in base] or wide
    kept = [jnp.where(jnp.abs(d) >= cutoffs[i], d, 0) for i, d in enumerate(wide)]
    raw = how.elect == "raw"
    votes = [d if raw else weights[i] * d for i, d in enumerate(kept)]
    plus = total(votes) >= 0
    agree = [(plus & (v > 0)) | (~plus & (v < 0)) for v in votes]
    one = jnp.ones(plus.shape, jnp.float32)
    if how.divide == "none":
        return kept, agree, one
    if how.divide == "count":
        return kept, agree, jnp.maximum(chosen(agree, [one] * len(kept)), one)
    sums = chosen(agree, [weights[i] * one for i in range(len(kept))])
    return kept, agree, jnp.where(jnp.abs(sums) < TINY, one, sums)


def merge_rows(
    how: How, rows: Iterable[Array], cutoffs: Any, weights: Any, *base: Array
) -> Float[Array, "*s"]:
    """The merged row, in float32."""
    kept, agree, below = agreement(how, rows, cutoffs, weights, *base)
    merged = chosen(agree, [weights[i] * d for i, d in enumerate(kept)]) / below
    return total([b.astype(jnp.float32) for b in base] + [merged])


def total(parts: list[Array]) -> Array:
    """The sum, in order."""
    return ft.reduce(jnp.add, parts)


def chosen(where: list[Array], parts: list[Array]) -> Array:
    """The sum of the parts where chosen."""
    return total([jnp.where(a, p, 0) for a, p in zip(where, parts, strict=True)])
