"""Factors of smaller rank, without ever forming the matrix."""

from typing import Any

from jax import Array
import jax.numpy as jnp
import numpy as np

from ._factors import Factors, Update
from ._places import named
from ._randomized import product, t


def compress(
    update: Update,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
) -> Update:
    r"""The best approximation of each update at a smaller rank.

    $A = Q_A R_A$, $B^\top = Q_B R_B$, $R_A R_B^\top = U \Sigma V^\top$; the result is
    $(Q_A U_r \Sigma_r^{1/2})\,(\Sigma_r^{1/2} V_r^\top Q_B^\top)$, the truncated
    singular value decomposition of $A B$. $O((n + m) k^2)$ for k columns.

    Args:
      update: factors, from `factors`, `linear` or `combine`.
      rank: r, of every leaf.
      energy: instead, the least share $\sum_{i \le r} \sigma_i^2 / \sum_i \sigma_i^2$
        that is kept, in (0, 1); each leaf gets the rank it needs.
      tolerance: instead, the largest error $\|A B - A_r B_r\|_F / \|A B\|_F$.

    Returns:
      `{path: Factors}`, the singular values shared evenly by both factors. Gains,
      biases and leaves that are no matrices stay as they are.

    Raises:
      ValueError: not exactly one of the three; one out of range; a rank above
        min(n, m) (names the leaf).

    Degenerate inputs:
      A rank above that of the factors gives zero columns; an update of 0 needs rank 1.
      Stacked and batched matrices of a leaf share the largest rank that one needs.
      `energy` and `tolerance` look at values: not under `jax.jit`.

    References:
      Eckart & Young, 1936, "The approximation of one matrix by another of lower rank",
      https://doi.org/10.1007/BF02288367.

    Example:
      >>> twice = {"w": Factors(jnp.ones((4, 2)), jnp.ones((2, 3)))}
      >>> one = compress(twice, tolerance=1e-3)["w"]
      >>> one.a.shape, round(float((one.a @ one.b)[0, 0]), 4)
      ((4, 1), 2.0)
    """
    given = [x for x in (rank, energy, tolerance) if x is not None]
    if len(given) != 1:
        raise ValueError("compress takes one of rank, energy and tolerance")
    check_energy(energy)
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}")
    lost = tolerance**2 if tolerance is not None else energy and 1 - energy

    def leaf(f: Factors) -> Factors:
        if f.a is None:
            return f
        sides = f.a.shape[-2], f.b.shape[-1]
        if rank is not None:
            check_sides(rank, *sides)
        u, s, vt = svd(f.a, f.b)
        r = rank or needed_rank(s, lost)
        a, b = balanced(u, s, vt, r)
        return f._replace(a=a, b=b)

    return {path: named(path, leaf, f) for path, f in update.items()}


def svd(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """The decomposition of `a @ b`: `u [*, n, p]`, `s [*, p]`, `vt [*, p, m]`."""
    qa, ra = jnp.linalg.qr(a)
    qb, rb = jnp.linalg.qr(t(b))
    u, s, vt = jnp.linalg.svd(product(ra, t(rb)), full_matrices=False)
    return product(qa, u), s, product(vt, t(qb))


def balanced(u: Any, s: Any, vt: Any, rank: int) -> tuple[Any, Any]:
    """The two factors of the leading triplets, zero columns where there are fewer."""
    root = s[..., :rank] ** 0.5
    a, b = u[..., :rank] * root[..., None, :], root[..., :, None] * vt[..., :rank, :]
    if (lack := rank - root.shape[-1]) > 0:
        front = [(0, 0)] * (a.ndim - 2)
        a = jnp.pad(a, [*front, (0, 0), (0, lack)])
        b = jnp.pad(b, [*front, (0, lack), (0, 0)])
    return a, b


def needed_rank(s: Any, lost: Any, total: Any = None) -> int:
    r"""The least rank with $\sum_{i > r} \sigma_i^2 \le$ `lost` times `total`.

    `total` is all there is, where `s` holds a part of it: then at most as many as `s`.
    """
    kept = np.cumsum(np.asarray(s, np.float64) ** 2, -1)
    total = kept[..., -1] if total is None else np.asarray(total, np.float64)
    short = np.sum(total[..., None] - kept > lost * total[..., None], -1)
    return int(np.clip(short + 1, 1, s.shape[-1]).max())


def check_energy(energy: float | None) -> None:
    """Raises where a share is not in (0, 1)."""
    if energy is not None and not 0 < energy < 1:
        raise ValueError(f"energy must be in (0, 1), got {energy}")


def check_sides(rank: int, n: int, m: int) -> None:
    """Raises unless 1 <= rank <= min(n, m)."""
    if not 1 <= rank <= min(n, m):
        raise ValueError(f"rank {rank} is not from 1 to min(n, m) = {min(n, m)}")
