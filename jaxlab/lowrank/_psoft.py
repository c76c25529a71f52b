"""PSOFT: Wu et al., 2025."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._principal import principal
from ._rank import check_rank, plus, wide


def psoft(
    *,
    rank: int,
    orthogonal: bool = True,
    scale_in: bool = True,
    scale_out: bool = True,
    split: bool = False,
    terms: int | None = None,
    bound: float | None = None,
) -> Adapter:
    r"""Rotates a weight within its principal subspace: $W' = W + A (R^\top - 1) B$.

    $A B$ is the best approximation of W of rank r, $A^\top A = 1$, and
    $R = \mathrm{diag}(\beta) (1 + Q)(1 - Q)^{-1} \mathrm{diag}(\alpha)$ with Q
    skew-symmetric. Without $\alpha$ and $\beta$ all angles and norms among the columns
    of $A B$ are kept.

    Args:
      rank: r, from 1 to min(n, m).
      orthogonal: False trains R itself in place of Q.
      scale_in: train $\alpha$.
      scale_out: train $\beta$.
      split: give A and B the root of the singular values each; then angles change.
      terms: the inverse by a Neumann series of as many terms; None solves exactly.
      bound: with `terms`, Q is scaled down to this Frobenius norm where it is above.

    Returns:
      An adapter with state `q`: [r (r - 1) / 2], the entries of Q above the diagonal,
      row by row, or R [r, r]; `alpha [r]` and `beta [r]`; and the fixed `a [n, r]`,
      `b [r, m]`.

    Raises:
      ValueError: fewer than one term; a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, R = 1: the layer is unchanged. Rank 1 has no rotation: `q` is empty.

    References:
      Wu et al., 2025, "Efficient Orthogonal Fine-Tuning with Principal Subspace
      Adaptation", https://arxiv.org/abs/2505.11235. The Neumann
      series is that of the implementation in PEFT: below four terms it has four, the
      constant, Q, Q² and Q³, from three on.

    Example:
      >>> import jax
      >>> s = psoft(rank=3).init(jax.random.key(0), jnp.eye(4))
      >>> s["q"].shape, s["alpha"].tolist()
      ((3,), [1.0, 1.0, 1.0])
    """
    check_rank(rank)
    if terms is not None and terms < 1:
        raise ValueError(f"terms must be at least 1, got {terms}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        check_rank(rank, w)
        a, d, b = principal(w)
        root, dtype = jnp.sqrt(d[:rank]) if split else d[:rank], wide(w)
        s = {"a": a[:, :rank], "b": root[:, None] * b[:rank]}
        if split:
            s["a"] = s["a"] * root[None]
        skew = jnp.zeros(rank * (rank - 1) // 2, dtype)
        s["q"] = skew if orthogonal else jnp.eye(rank, dtype=dtype)
        s |= {"alpha": jnp.ones(rank, dtype)} if scale_in else {}
        return s | ({"beta": jnp.ones(rank, dtype)} if scale_out else {})

    def core(s: dict[str, Any]) -> Array:
        r = _rotation(_skew(s["q"], rank), terms, bound) if orthogonal else s["q"]
        r = r * s["alpha"][None] if scale_in else r
        r = r * s["beta"][:, None] if scale_out else r
        return r.T - jnp.eye(rank, dtype=r.dtype)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b, c = (like(v, x) for v in (s["a"], s["b"], core(s)))
        return plus(x @ w, ((x @ a) @ c) @ b)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, s["a"] @ core(s) @ s["b"])

    options = {"rank": rank, "orthogonal": orthogonal, "scale_in": scale_in}
    options |= {"scale_out": scale_out, "split": split, "terms": terms, "bound": bound}
    return Adapter(
        init, apply, merge, fixed=("a", "b"), config=("psoft", *options.items())
    )


def _skew(q: Array, r: int) -> Array:
    """The skew-symmetric matrix of the entries above its diagonal."""
    upper = jnp.zeros((r, r), q.dtype).at[jnp.triu_indices(r, 1)].set(q)
    return upper - upper.T


def _rotation(q: Array, terms: int | None, bound: float | None) -> Array:
    """The Cayley transform of Q, or its Neumann series."""
    one = jnp.eye(q.shape[0], dtype=q.dtype)
    if terms is None:
        return jnp.linalg.solve(one - q, one + q)
    if bound is not None:
        square = jnp.sum(q * q)
        above = square > bound**2
        size = jnp.sqrt(jnp.where(above, square, 1))
        q = q * jnp.where(above, bound / (size + 1e-12), 1)
    total, power = one, one
    last = terms - 1 if terms < 3 else max(terms - 1, 3)
    for i in range(1, last + 1):
        power = power @ q
        total = total + (1 if i == last and terms > 2 else 2) * power
    return total
