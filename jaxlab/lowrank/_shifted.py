"""Low-rank updates that start at a part of the weight itself: PiSSA and its kin."""

from collections.abc import Callable
import inspect
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._randomized import exact_svd, product, randomized_svd
from ._rank import check_rank, plus, scaling, wide

Factors = tuple[Array, Array]


def shifted(
    name: str,
    start: Callable[..., Factors],
    *options: tuple[str, Any],
    rank: int,
    alpha: float | None,
    rslora: bool,
) -> Adapter:
    r"""The update $s (A B - A_0 B_0)$ that starts at $A = A_0, B = B_0$.

    `start(key, w, scale, *statistic)` gives the first factors; a copy of them is kept
    fixed, so the base stays as it is, and fresh the two products cancel to the bit.
    """
    check_rank(rank)
    scale = scaling(rank, alpha, rslora=rslora)
    if scale <= 0:
        raise ValueError(f"alpha must be above 0 for {name}, got {alpha}")

    def first(key: Array, w: Array, *statistic: Array) -> dict[str, Any]:
        check_rank(rank, w)
        dtype = wide(w)
        a, b = start(key, w.astype(dtype), scale, *statistic)
        a, b = a.astype(dtype), b.astype(dtype)
        return {"a": a, "b": b, "a0": a, "b0": b}

    def init(key: Array, w: Array) -> dict[str, Any]:
        return first(key, w)

    def init_from(key: Array, w: Array, statistic: Any = None) -> dict[str, Any]:
        return first(key, w, statistic)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = pair(s)
        return plus(x @ w, scale * ((x @ like(a, x)) @ like(b, x)))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, scale * (product(s["a"], s["b"]) - product(s["a0"], s["b0"])))

    config = (("rank", rank), ("scale", scale), ("rslora", rslora), *options)
    from_data = len(inspect.signature(start).parameters) > 3
    begin = init_from if from_data else init
    return Adapter(begin, apply, merge, fixed=("a0", "b0"), config=(name, *config))


def pair(s: dict[str, Any]) -> Factors:
    """The factors of the whole update, of rank 2 r: `[A, A0]` and `[B; -B0]`."""
    a = jnp.concatenate([s["a"], s["a0"]], -1)
    return a, jnp.concatenate([s["b"], -s["b0"]], -2)


def top_svd(
    key: Array, w: Array, rank: int, niter: int | None
) -> tuple[Array, Array, Array]:
    r"""The leading singular triplets of a matrix: `u [n, r]`, `s [r]`, `vt [r, m]`.

    Exact without `niter`; else by that many subspace iterations on a random sketch of
    the rank and 10 more.
    """
    if niter is None:
        u, s, vt = exact_svd(w)
    else:
        sketch = (w.shape[1], min(rank + 10, *w.shape))
        u, s, vt = randomized_svd(w, jax.random.normal(key, sketch, w.dtype), niter)
    return u[:, :rank], s[:rank], vt[:rank]
