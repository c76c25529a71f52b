"""LoKr: Edalati et al., 2022; Yeh et al., 2023."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like, rows
from ._rank import check_rank, plus, scaling, wide
from ._structured import is_plain


def lokr(
    *,
    rank: int,
    alpha: float | None = None,
    factor: int = -1,
    decompose_both: bool = False,
) -> Adapter:
    r"""A Kronecker product beside each weight, one of its factors of low rank.

    $W' = W + \frac{\alpha}{r} C \otimes D$ with $C [n_1, m_1]$ and
    $D [n_2, m_2]$, where $n = n_1 n_2$ and $m = m_1 m_2$. D is a product of rank r
    where r is below half its longer side, and whole otherwise; so is C with
    `decompose_both`. A dense layer multiplies by neither's product: its input is
    reshaped to $[n_1, n_2]$, and the two factors act on the two axes.

    Args:
      rank: r, at least 1.
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      factor: the size wanted of $n_1$ and $m_1$: it where it divides the side, else
        the largest divisor below it and below the side's root; -1 for the root.
      decompose_both: also C as a product of rank r.

    Returns:
      An adapter with state `c [n1, m1]` or `c_a [n1, r], c_b [r, m1]`, and likewise
      `d` or `d_a, d_b`.

    Raises:
      ValueError: a rank below 1, or a factor that is neither positive nor -1.

    Degenerate inputs:
      Fresh, C = 0: the layer is unchanged. A side that is prime has a factor of 1.

    References:
      Edalati et al., 2022, "KronA: Parameter Efficient Tuning with Kronecker
      Adapter", https://arxiv.org/abs/2212.10650, equation 4. Yeh et al., 2023,
      "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
      Evaluation", https://arxiv.org/abs/2309.14859, section 3.3, for the sizes. The
      scale stays $\alpha / r$ where both factors are whole, as in PEFT.

    Example:
      >>> adapter = lokr(rank=2)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((64, 6)))
      >>> {name: v.shape for name, v in s.items()}
      {'c': (8, 2), 'd_a': (8, 2), 'd_b': (2, 3)}
    """
    check_rank(rank)
    if factor < 1 and factor != -1:
        raise ValueError(f"factor must be positive, or -1, got {factor}")
    scale = scaling(rank, alpha)

    def init(key: Array, w: Array) -> dict[str, Any]:
        (n1, n2), (m1, m2) = (kronecker_sides(size, factor) for size in w.shape)
        dtype, keys = wide(w), jax.random.split(key, 3)

        def drawn(i: int, shape: tuple[int, int], fan: int) -> Array:
            limit = 1 / math.sqrt(fan)
            return jax.random.uniform(keys[i], shape, dtype, -limit, limit)

        s: dict[str, Any] = {}
        if decompose_both and rank < max(n1, m1) / 2:
            s["c_a"] = drawn(0, (n1, rank), n1)
            s["c_b"] = jnp.zeros((rank, m1), dtype)
        else:
            s["c"] = jnp.zeros((n1, m1), dtype)
        if rank < max(n2, m2) / 2:
            return s | {
                "d_a": drawn(1, (n2, rank), n2),
                "d_b": drawn(2, (rank, m2), rank),
            }
        return s | {"d": drawn(1, (n2, m2), n2)}

    def factors(s: dict[str, Any]) -> tuple[Array, Array]:
        whole = lambda f: s[f] if f in s else s[f"{f}_a"] @ s[f"{f}_b"]
        return scale * whole("c"), whole("d")

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        c, d = factors(s)
        if not is_plain(x):
            return plus(x @ w, x @ like(jnp.kron(c, d), x))
        y = x @ w
        return plus(y, _multiplied(rows(x), like(c, x), like(d, x)).reshape(y.shape))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, jnp.kron(*factors(s)))

    options = (("rank", rank), ("scale", scale), ("factor", factor))
    both = ("decompose_both", decompose_both)
    return Adapter(init, apply, merge, config=("lokr", *options, both))


def _multiplied(x: Array, c: Array, d: Array) -> Array:
    """`x [..., n1 n2]` times the Kronecker product, in the cheaper order."""
    (n1, m1), (n2, m2) = c.shape, d.shape
    x = x.reshape(*x.shape[:-1], n1, n2)
    if n1 * m2 * (n2 + m1) < n2 * m1 * (n1 + m2):
        return jnp.einsum("...ik,il->...lk", x @ d, c)
    return jnp.einsum("...ij,il->...lj", x, c) @ d


def kronecker_sides(size: int, factor: int) -> tuple[int, int]:
    """The sides of the first and the second factor."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    side = next(d for d in range(most, 0, -1) if size % d == 0)
    return side, size // side
