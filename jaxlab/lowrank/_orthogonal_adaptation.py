"""Orthogonal Adaptation: Po et al., 2023."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import like
from ._rank import check_rank, plus, wide


def orthogonal_adaptation(*, rank: int, concept: int, seed: int = 0) -> Adapter:
    r"""Updates in disjoint parts of one orthogonal basis, which add without meeting.

    $y_i = x W + (x B_i) A_i$. $B_i$ are r columns of an orthogonal matrix that the
    seed and n alone decide, other ones for each concept, and stay fixed; $A_i$ is
    trained. So concepts that never saw each other have $B_i^\top B_j = 0$, hence
    $\Delta W_i^\top \Delta W_j = 0$, and inputs in the span of $B_i$ see concept i
    alone in the plain sum $W + \sum_i B_i A_i$.

    Args:
      rank: r, from 1 to min(n, m).
      concept: i, from 0 to n / r - 1.
      seed: of the basis; the same for all concepts.

    Returns:
      An adapter with state `b [r, m]` and fixed `a [n, r]`.

    Raises:
      ValueError: a rank below 1, a negative concept, or (from `init`) a rank above
        min(n, m) or a concept for which no columns are left (names their number).

    Degenerate inputs:
      Fresh, A = 0: the layer is unchanged.

    References:
      Po et al., 2023, "Orthogonal Adaptation for Modular Customization of Diffusion
      Models", https://arxiv.org/abs/2312.02432, section 4, randomised orthogonal
      basis; the columns are numbered in place of drawn, so that none is drawn twice.
      `b` here is their $A^\top$ and `a` their B.

    Example:
      >>> one = orthogonal_adaptation(rank=2, concept=0)
      >>> s = one.init(jax.random.key(0), jnp.ones((4, 3)))
      >>> bool(jnp.allclose(s["a"].T @ s["a"], jnp.eye(2), atol=1e-6))
      True
    """
    check_rank(rank)
    if concept < 0:
        raise ValueError(f"concept must be at least 0, got {concept}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        (n, m), dtype = w.shape, wide(w)
        check_rank(rank, w)
        used = (concept + 1) * rank
        if used > n:
            raise ValueError(
                f"concept {concept} is beyond the {n // rank} of {n} inputs"
            )
        a = _basis(n, used, seed, dtype)[:, -rank:]
        return {"a": a, "b": jnp.zeros((rank, m), dtype)}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        return plus(x @ w, (x @ like(s["a"], x)) @ like(s["b"], x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, s["a"] @ s["b"])

    options = (("rank", rank), ("concept", concept), ("seed", seed))
    config = ("orthogonal_adaptation", *options)
    return Adapter(init, apply, merge, fixed=("a",), config=config)


def interference(a: Array, b: Array) -> Array:
    r"""How much low-rank updates of one weight meet when they are added.

    $I_{ij} = \|\Delta W_i^\top \Delta W_j\|_F \,/\, (\|\Delta W_i\|_F
    \|\Delta W_j\|_F)$ with $\Delta W_i = a_i b_i$: what one update makes of the
    directions that another writes from. No update is formed.

    Args:
      a: the first factors `[k, n, r]`.
      b: the second factors `[k, r, m]`, any scale.

    Returns:
      `[k, k]`, between 0 (orthogonal) and 1, at least float32.

    Degenerate inputs:
      0 for an update of zeros.

    References:
      Po et al., 2023, https://arxiv.org/abs/2312.02432, section 4, whose condition
      $\Delta\theta_i \Delta\theta_j^\top = 0$ this measures.

    Example:
      >>> a = jnp.eye(2).reshape(2, 2, 1)
      >>> interference(a, jnp.ones((2, 1, 3))).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    dtype = wide(a, b)
    a, b = a.astype(dtype), b.astype(dtype)
    met = jnp.einsum("inr,jns->ijrs", a, a)
    wide_b = jnp.einsum("irm,ism->irs", b, b)
    squared = jnp.einsum("ijrs,jst,ijut,iur->ij", met, wide_b, met, wide_b)
    own = jnp.einsum("iirs,irs->i", met, wide_b)
    sizes = own[:, None] * own[None]
    positive = sizes > 0
    ratio = jnp.maximum(squared, 0) / jnp.where(positive, sizes, 1)
    return jnp.sqrt(jnp.where(positive, ratio, 0))


def _basis(n: int, columns: int, seed: int, dtype: Any) -> Array:
    """The first columns of the orthogonal matrix of a seed."""
    draw = lambda c: jax.random.normal(jax.random.fold_in(key, c), (n,), dtype)
    key = jax.random.key(seed)
    drawn = jax.vmap(draw)(jnp.arange(columns, dtype=jnp.uint32)).T
    return jnp.linalg.qr(drawn)[0]
