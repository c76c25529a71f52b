"""PELA: Guo et al., 2023."""

from collections.abc import Sequence
from typing import Any

from jax import Array, lax
import jax.numpy as jnp

from ..tree import widen
from ..types import Adapter
from ._operands import like
from ._rank import check_rank, wide


def pela(*, rank: int) -> Adapter:
    r"""A low-rank layer in place of the weight: $y = (x L) R$.

    $L = U_r \Sigma_r^{1/2}$ and $R = \Sigma_r^{1/2} V_r^\top$ from the singular value
    decomposition of W, so L R is the nearest matrix of rank r, and both are trained.

    Args:
      rank: r, from 1 to min(n, m); `pela_rank` gives that of a compression ratio.

    Returns:
      An adapter with state `a [n, r]` and `b [r, m]`. Its base weight is not used.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, the layer is the truncated one, unlike that of other adapters; with
      r = min(n, m) it is unchanged.

    References:
      Guo et al., 2023, "PELA: Learning Parameter-Efficient Models with Low-Rank
      Approximation", https://arxiv.org/abs/2310.10700, section 3.1. The losses of its
      intermediate training are `feature_distillation` and `weight_perturbation`.

    Example:
      >>> import jax
      >>> adapter, w = pela(rank=1), jnp.ones((2, 3))
      >>> s = adapter.init(jax.random.key(0), w)
      >>> bool(jnp.allclose(adapter.merge(w, s), w, atol=1e-6))
      True
    """
    check_rank(rank)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        check_rank(rank, w)
        u, sizes, v = jnp.linalg.svd(w.astype(wide(w)), full_matrices=False)
        root = jnp.sqrt(sizes[:rank])
        return {"a": u[:, :rank] * root[None], "b": root[:, None] * v[:rank]}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        del w
        return (x @ like(s["a"], x)) @ like(s["b"], x)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return (s["a"] @ s["b"]).astype(w.dtype)

    return Adapter(init, apply, merge, config=("pela", ("rank", rank)))


def pela_rank(n: int, m: int, *, ratio: float) -> int:
    r"""The rank at which two factors are `ratio` times smaller than the weight.

    $r = \lfloor n m / (\rho (n + m)) \rfloor$.

    Args:
      n: the inputs.
      m: the outputs.
      ratio: $\rho$, above 0; the paper's is 3.

    Returns:
      r, at least 1.

    Raises:
      ValueError: a ratio that is not positive.

    Example:
      >>> pela_rank(768, 768, ratio=3)
      128
    """
    if ratio <= 0:
        raise ValueError(f"ratio must be positive, got {ratio}")
    return max(1, int(n * m / (ratio * (n + m))))


def feature_distillation(student: Sequence[Array], teacher: Sequence[Array]) -> Array:
    r"""How far features are from those of the uncompressed model.

    $\frac{1}{L} \sum_l \operatorname{mean}(F^s_l - F^t_l)^2$.

    Args:
      student: the low-rank model's features, L arrays.
      teacher: the original model's, of the same shapes; no slope goes there.

    Returns:
      A scalar.

    Raises:
      ValueError: another number of features, none, or another shape.

    References:
      Guo et al., 2023, https://arxiv.org/abs/2310.10700, section 3.2.

    Example:
      >>> float(feature_distillation([jnp.ones(2)], [jnp.zeros(2)]))
      1.0
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} features of student, {len(teacher)} of teacher"
        )
    total = jnp.zeros(())
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape != theirs.shape:
            raise ValueError(f"feature {i} differs: {ours.shape} != {theirs.shape}")
        total += jnp.mean((widen(ours) - lax.stop_gradient(widen(theirs))) ** 2)
    return total / len(student)


def weight_perturbation(w: Array, s: dict[str, Any], *, size: float = 1e-3) -> Array:
    r"""Holds the low-rank weight within a perturbation of the original.

    $(\|L R - W\|_\infty - \epsilon)^2$ with the largest entry as norm.

    Args:
      w: the original weight `[n, m]`.
      s: a state of `pela`.
      size: $\epsilon$.

    Returns:
      A scalar; the paper averages it over the layers.

    References:
      Guo et al., 2023, https://arxiv.org/abs/2310.10700, section 3.3, as in the
      authors' code.

    Example:
      >>> s = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}
      >>> float(weight_perturbation(jnp.zeros((2, 2)), s, size=0.5))
      0.25
    """
    distance = jnp.max(jnp.abs(s["a"] @ s["b"] - w.astype(wide(w, s["a"]))))
    return (distance - size) ** 2
