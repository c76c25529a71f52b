"""RandLoRA: Albert et al., 2025."""

import math
from typing import Any, Literal

from jax import Array
import jax.numpy as jnp
import numpy as np

from ..types import Adapter
from ._rank import check_rank, plus, wide
from ._torch_random import torch_random

Bases = Literal["dense", "sparse", "very_sparse"]
_FIXED = ("basis_a", "basis_b")
_LOW = np.dtype(jnp.bfloat16)


def randlora(
    *,
    rank: int,
    alpha: float | None = None,
    bases: Bases = "dense",
    seed: int = 0,
) -> Adapter:
    r"""A full-rank update: many random low-rank ones, each rescaled.

    $W' = W + \frac{\alpha}{r} \sum_{j \le N} B_j \Lambda_j A \Gamma_j$ (or its
    transpose, where n <= m), with random A and $B_j$ of rank r for all layers,
    $N = \lceil \min(n, m) / r \rceil$, and trained diagonals. It is merged in each
    call: from n m / (n + m) rows of input on, that costs less than its factors.

    Args:
      rank: r, of each basis: a smaller one trains more.
      alpha: the scale's numerator; `rank` by default, a scale of 1. The authors' is
        20 r.
      bases: uniform; or signs and zeros, $\pm 1$ with probability 1 / 6
        each ("sparse"), or $1 / (2 \sqrt{D})$ each for the smaller side D
        ("very_sparse").
      seed: of the bases, which are those that PEFT draws with this
        `projection_prng_key`.

    Returns:
      An adapter with state `lambda [r, N]` and `gamma [N, min(n, m)]`, and fixed for
      all layers `basis_a [r, D]` and `basis_b [D', N, r]` of their largest sides
      $D \le D'$.

    Raises:
      ValueError: a rank below 1, or unknown bases.

    Degenerate inputs:
      Fresh, $\Lambda = 0$: the layer is unchanged.

    References:
      Albert et al., 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of
      large models", https://arxiv.org/abs/2502.00987, equation 4. Li, Hastie and
      Church, 2006, "Very Sparse Random Projections", for the sparse bases. PEFT and
      the authors' code count the columns of A by (rank, basis) and those of B by
      (basis, rank), which pairs other columns than the equation's; so does this. The
      uniform bases have the 8 bits of bfloat16, as PEFT draws them.

    Example:
      >>> import jax
      >>> adapter = randlora(rank=2)
      >>> s = adapter.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["lambda"].shape, s["gamma"].shape
      ((2, 2), (2, 3))
    """
    check_rank(rank)
    if bases not in ("dense", "sparse", "very_sparse"):
        raise ValueError(f"bases {bases!r} is none of dense, sparse, very_sparse")
    scale = 1.0 if alpha is None else alpha / rank

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        small, dtype = min(w.shape), wide(w)
        number = -(-small // rank)
        gamma = jnp.full((number, small), 1 / max(number, small), dtype)
        return {"lambda": jnp.zeros((rank, number), dtype), "gamma": gamma}

    def shared(key: Array, sizes: tuple[tuple[int, int], ...]) -> dict[str, Any]:
        del key
        n, m = (max(side) for side in zip(*sizes, strict=True))
        drawn = drawn_bases(rank, min(n, m), max(n, m), bases, seed)
        return dict(zip(_FIXED, map(jnp.asarray, drawn), strict=True))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        small, large = sorted(w.shape)
        gamma, number = s["gamma"], s["gamma"].shape[0]
        a = s["basis_a"][:, None, :small].astype(gamma.dtype)
        b = s["basis_b"][:large, :number].astype(gamma.dtype)
        a = a * s["lambda"][:, :, None] * gamma[None]
        update = b.reshape(large, -1) @ a.reshape(-1, small)
        return plus(w, scale * (update.T if w.shape[0] == small else update))

    config = ("randlora", ("rank", rank), ("scale", scale))
    return Adapter(
        init,
        None,
        merge,
        fixed=_FIXED,
        shared=shared,
        config=(*config, ("bases", bases), ("seed", seed)),
    )


def drawn_bases(
    rank: int, small: int, large: int, bases: Bases, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A [r, small] and B [large, N, r], of standard deviation 1."""
    random, number = torch_random(seed), -(-small // rank)
    if bases != "dense":
        tail = 1 / (2 * (3 if bases == "sparse" else math.sqrt(small)))
        signs = lambda u: (u > 1 - tail).astype(np.float32) - (u < tail)
        a = signs(random.uniform((rank, 1, small)))
        return _unit(a)[:, 0], _unit(signs(random.uniform((large, number, rank))))
    low = lambda *shape: random.kaiming_uniform(shape, math.sqrt(5)).astype(_LOW)
    a, b = low(rank, 1, small), [low(large, 1, rank) for _ in range(number)]
    return _unit(a)[:, 0], _unit(np.concatenate(b, axis=1))


def _unit(c: np.ndarray) -> np.ndarray:
    """Over its standard deviation, each step in the dtype of c."""
    deviation = c.astype(np.float64).std(ddof=1)
    return (c / deviation.astype(c.dtype)).astype(np.float32)
