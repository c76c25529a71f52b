"""TinyLoRA: Morris et al., 2026."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._principal import principal
from ._rank import check_rank, plus, wide


def tinylora(*, rank: int = 2, size: int = 64, groups: int | None = None) -> Adapter:
    r"""A few trained numbers per weight, or in all: $\Delta W = A R^\top B$.

    $R = \sum_{i=1}^u v_i P_i$, $A\,B$ is the best approximation of W of rank r with its
    singular values split evenly, and the $P_i$ are random and fixed.

    Args:
      rank: r, from 1 to min(n, m).
      size: u, how many numbers a vector v has; down to 1.
      groups: how many vectors v there are, each shared by the weights of a group, drawn
        by the key; None gives every weight its own.

    Returns:
      An adapter with state `v [u]`, or `v [groups, u]` that all leaves share, and the
      fixed `a [n, r]`, `b [r, m]`, `p [u, r, r]` and, with groups, `group []`.

    Raises:
      ValueError: a size or number of groups below 1; a rank below 1, or (from `init`)
        above min(n, m).

    Degenerate inputs:
      Fresh, v = 0: the layer is unchanged.

    References:
      Morris et al., 2026, "Learning to Reason in 13 Parameters",
      https://arxiv.org/abs/2602.04118. The split of the singular values and
      $P_i \sim N(0, 1/r)$ are those of the implementation in PEFT, where groups are of
      neighbouring layers.

    Example:
      >>> s = tinylora(size=3).init(jax.random.key(0), jnp.ones((4, 5)))
      >>> s["v"].shape, s["p"].shape
      ((3,), (3, 2, 2))
    """
    check_rank(rank)
    if size < 1 or (groups is not None and groups < 1):
        raise ValueError(f"size {size} and groups {groups} must be at least 1")

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_rank(rank, w)
        a, d, b = principal(w)
        root, dtype = jnp.sqrt(d[:rank]), wide(w)
        drawn, chosen = jax.random.split(key)
        s = {"a": a[:, :rank] * root[None], "b": root[:, None] * b[:rank]}
        s["p"] = jax.random.normal(drawn, (size, rank, rank), dtype) * rank**-0.5
        if groups is None:
            return s | {"v": jnp.zeros(size, dtype)}
        return s | {"group": jax.random.randint(chosen, (), 0, groups)}

    def core(s: dict[str, Any]) -> Array:
        v = s["v"] if groups is None else s["v"][s["group"]]
        return jnp.einsum("i,ijk->kj", v, s["p"])

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b, c = (like(v, x) for v in (s["a"], s["b"], core(s)))
        return plus(x @ w, ((x @ a) @ c) @ b)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, s["a"] @ core(s) @ s["b"])

    shared: Callable[..., dict[str, Any]] | None = None
    if groups is not None:
        shared = lambda *_: {"v": jnp.zeros((groups, size))}
    return Adapter(
        init,
        apply,
        merge,
        fixed=("a", "b", "p", *(() if groups is None else ("group",))),
        shared=shared,
        config=("tinylora", ("rank", rank), ("size", size), ("groups", groups)),
    )
