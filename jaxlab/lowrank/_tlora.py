"""TLoRA: Tao et al., 2025."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, is_float, like, rows
from ._rank import check_rank, plus, wide


def tlora(
    *, rank: int, transform_rank: int, order: int = 2, train: bool = False
) -> Adapter:
    r"""A full-rank transform of the inputs, and a low-rank residual, both in cores.

    $y = (x T) W + x \Delta$. With $n = \prod_d n_d$, $m = \prod_d m_d$ and an index i
    the digits $(i_1, \dots, i_D)$, T is a tensor-ring matrix and $\Delta$ a tensor
    ring: $T_{ij} = \operatorname{tr}(\mathbf{A}^1[i_1, j_1] \cdots
    \mathbf{A}^D[i_D, j_D])$ and $\Delta_{ij} = \operatorname{tr}(\mathbf{B}^1[i_1]
    \cdots \mathbf{B}^D[i_D] \mathbf{C}^1[j_1] \cdots \mathbf{C}^D[j_D])$.
    Neither T nor $\Delta$ is formed.

    Args:
      rank: R of the residual, whose rank is at most R squared.
      transform_rank: R of the transform.
      order: D, the number of digits; n and m are split as evenly as their divisors
        allow.
      train: close T as a train, its first and last ranks 1 (a tensor-train matrix), in
        place of a ring.

    Returns:
      An adapter with states `t0`.. `[n_d, n_d, R, R]`, `b0`.. `[n_d, R, R]` and `c0`..
      `[m_d, R, R]`.

    Raises:
      ValueError: a rank below 1, an order below 1.

    Degenerate inputs:
      Fresh, T = 1 and $\mathbf{B}^1 = 0$: the layer is unchanged. A prime n is one
      digit, and T then a full matrix.

    References:
      Tao et al., 2025, "Transformed Low-rank Adaptation via Tensor Decomposition and
      Its Applications to Text-to-image Models", https://arxiv.org/abs/2501.08727,
      section 3 and proposition 1; the first digit counts slowest here.

    Example:
      >>> adapter = tlora(rank=2, transform_rank=3)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((12, 8)))
      >>> s["t0"].shape, s["b1"].shape, s["c0"].shape
      ((3, 3, 3, 3), (4, 2, 2), (2, 2, 2))
    """
    check_rank(rank)
    check_rank(transform_rank)
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        dtype, out = wide(w), {}
        ends = [0, order] if train else []
        keys = iter(jax.random.split(key, 2 * order))
        for d, size in enumerate(_digits(w.shape[0], order)):
            left, right = (1 if e in ends else transform_rank for e in (d, d + 1))
            share = _share(transform_rank, order, train)
            eye = share * jnp.eye(size, dtype=dtype)[:, :, None, None]
            out[f"t{d}"] = jnp.tile(eye, (1, 1, left, right))
        for letter, side in zip("bc", w.shape, strict=True):
            for d, size in enumerate(_digits(side, order)):
                shape, sigma = (size, rank, rank), 1 / (size * math.sqrt(rank))
                drawn = sigma * jax.random.normal(next(keys), shape, dtype)
                out[f"{letter}{d}"] = drawn
        return out | {"b0": jnp.zeros_like(out["b0"])}

    def residual(s: dict[str, Any]) -> tuple[Array, Array]:
        """The residual as `[n, R^2] @ [R^2, m]`."""
        b = _chain([s[f"b{d}"] for d in range(order)])
        c = _chain([s[f"c{d}"] for d in range(order)])
        return b.reshape(b.shape[0], -1), c.transpose(2, 1, 0).reshape(-1, c.shape[0])

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        matrix = dense(w)
        if not is_float(x if isinstance(x, Array) else x.x):  # a look-up
            return x @ merge(matrix, s)
        inputs = rows(x)
        cores = [like(s[f"t{d}"], inputs) for d in range(order)]
        b, c = (like(v, inputs) for v in residual(s))
        return plus(_transformed(inputs, cores) @ like(matrix, inputs), (x @ b) @ c)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        cores = [s[f"t{d}"].swapaxes(0, 1) for d in range(order)]
        b, c = residual(s)
        turned = _transformed(w.astype(wide(w, b)).T, cores).T
        return (turned + b @ c).astype(w.dtype)

    options = (("rank", rank), ("transform_rank", transform_rank))
    options += (("order", order), ("train", train))
    return Adapter(init, apply, merge, config=("tlora", *options))


def tlora_identity(s: dict[str, Any]) -> Array:
    r"""How far the transform is from the identity, by its cores.

    $\mathcal{R}_I = \sum_d \sum_{r, r'} \|\mathbf{A}^d[:, :, r, r'] - I / R\|_F$.

    Args:
      s: a state of `tlora`, its transform a ring.

    Returns:
      A scalar; its slope is 0 where a norm is.

    References:
      Tao et al., 2025, https://arxiv.org/abs/2501.08727, section 3; it served them
      better than `tlora_orthogonal`.

    Example:
      >>> s = tlora(rank=1, transform_rank=2).init(jax.random.key(0), jnp.ones((4, 4)))
      >>> float(tlora_identity(s))
      0.0
    """
    return _distance(_cores(s))


def tlora_orthogonal(s: dict[str, Any]) -> Array:
    r"""How far the transform is from an orthogonal matrix, by its cores.

    $T T^\top$ is the ring of $\mathbf{C}^d[i, j] = \sum_l \mathbf{A}^d[i, l] \otimes
    \mathbf{A}^d[j, l]$ (proposition 2), whose distance from the identity's cores
    `tlora_identity` measures.

    Args:
      s: a state of `tlora`, its transform a ring.

    Returns:
      A scalar; its slope is 0 where a norm is.

    References:
      Tao et al., 2025, https://arxiv.org/abs/2501.08727, section 3.

    Example:
      >>> s = tlora(rank=1, transform_rank=2).init(jax.random.key(0), jnp.ones((4, 4)))
      >>> float(tlora_orthogonal(s))
      0.0
    """
    squared = []
    for a in _cores(s):
        c = jnp.einsum("ilrs,jlpq->ijrpsq", a, a)
        squared.append(c.reshape(*c.shape[:2], a.shape[2] ** 2, a.shape[3] ** 2))
    return _distance(squared)


def _cores(s: dict[str, Any]) -> list[Array]:
    return [v for name, v in sorted(s.items()) if name[0] == "t"]


def _distance(cores: list[Array]) -> Array:
    total = jnp.zeros((), cores[0].dtype)
    for a in cores:
        eye = jnp.eye(a.shape[0], dtype=a.dtype)[:, :, None, None] / a.shape[-1]
        squares = jnp.sum((a - eye) ** 2, axis=(0, 1))
        positive = squares > 0
        total += jnp.sum(
            jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
        )
    return total


def _transformed(x: Array, cores: list[Array]) -> Array:
    """`x [..., n]` times the matrix of the cores, in the cheapest order."""
    letters = iter("abcdefghijklmnopqrstuvwxyABCDEFGHIJKLMNOPQRSTUVWXY")
    take = lambda: [next(letters) for _ in cores]
    rows, columns, ranks = take(), take(), take()
    around = zip(rows, columns, ranks, ranks[1:] + ranks[:1], strict=True)
    terms = ["z" + "".join(rows), *("".join(t) for t in around)]
    digits = x.reshape(-1, *(core.shape[0] for core in cores))
    result = "z" + "".join(columns)
    y = jnp.einsum(f"{','.join(terms)}->{result}", digits, *cores, optimize="optimal")
    return y.reshape(x.shape)


def _chain(cores: list[Array]) -> Array:
    """The products of one slice of each core, `[size, R, R]`."""
    out = cores[0]
    for core in cores[1:]:
        product = jnp.einsum("irs,jst->ijrt", out, core)
        out = product.reshape(-1, *product.shape[2:])
    return out


def _share(rank: int, order: int, train: bool) -> float:
    """What of the identity each slice holds, for all paths to add up to it."""
    return rank ** (-(order - 1) / order) if train else 1 / rank


def _digits(size: int, order: int) -> list[int]:
    """Factors of a side, each the largest divisor up to the root of what is left."""
    out = []
    for left in range(order, 0, -1):
        near = math.floor(size ** (1 / left) + 1e-9)
        digit = next(d for d in range(near, 0, -1) if size % d == 0)
        out.append(size if left == 1 else digit)
        size //= out[-1]
    return out
