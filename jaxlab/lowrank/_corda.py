"""CorDA: Yang et al., 2024."""

from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._eva import square
from ._randomized import product
from ._shifted import Factors, shifted


def corda(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    mode: Literal["ipm", "kpm"] = "ipm",
) -> Adapter:
    r"""The part of each weight that a context uses most, or least, is trained.

    With the covariance C of the inputs in that context,
    $C W = P \Sigma Q^\top$ and $W = (C^{-1} P) \Sigma Q^\top$; of these components r
    are trained, $A_0 = C^{-1} P_r (\Sigma_r / s)^{1/2}$ and
    $B_0 = (\Sigma_r / s)^{1/2} Q_r^\top$, and the rest is frozen:
    $y = x (W - s A_0 B_0) + s (x A) B$ with $s = \alpha / r$.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator, above 0; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r.
      mode: "kpm", knowledge-preserved: the r smallest components are trained, and what
        the context needs (questions of a base task) is frozen; "ipm",
        instruction-previewed: the r largest, and the context is the new task.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, and their first values `a0`, `b0`
      fixed: the base stays what it is. `init` takes the Gram matrix $X^\top X$
      `[n, n]` of the leaf's inputs, on any scale: `attach(..., statistics=gram(...))`
      with `jaxlab.measure.gram`, summed over batches.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m); an alpha of 0 or
        below; an unknown mode; no statistic, or one of another shape.

    Degenerate inputs:
      Fresh, the layer is unchanged, to the bit when merged. To C is added 0.01 of its
      mean diagonal, doubled until $\|C C^{-1} - I\|_F < 0.05$; C = 0 counts as the
      identity, which makes "ipm" the method `pissa`.

    References:
      Yang et al., 2024, "CorDA: Context-Oriented Decomposition Adaptation of Large
      Language Models for Task-Aware Parameter-Efficient Fine-tuning",
      https://arxiv.org/abs/2406.05223, section 3, and
      https://github.com/iboing/CorDA, cordalib/decomposition.py. C is divided by its
      mean diagonal in place of the largest input, which divides A and multiplies B by
      one number; there the base is overwritten with the residual.

    Example:
      >>> w, gram = jnp.eye(2), jnp.diag(jnp.array([1.0, 9.0]))
      >>> s = corda(rank=1, mode="kpm").init(jax.random.key(0), w, gram)
      >>> jnp.round(s["a"] @ s["b"], 3).tolist()
      [[1.0, 0.0], [0.0, 0.0]]
    """
    if mode not in ("ipm", "kpm"):
        raise ValueError(f"mode must be 'ipm' or 'kpm', got {mode!r}")

    def start(key: Array, w: Array, scale: float, statistic: Any = None) -> Factors:
        del key
        c, inverse = _regular(square("corda", w, statistic))
        p, s, qt = jnp.linalg.svd(product(c, w.astype(c.dtype)), full_matrices=False)
        mine = slice(rank) if mode == "ipm" else slice(-rank, None)
        root = jnp.sqrt(s[mine] / scale)
        a = product(inverse, p[:, mine]) * root[None]
        return a, root[:, None] * qt[mine]

    options = ("mode", mode)
    return shifted("corda", start, options, rank=rank, alpha=alpha, rslora=rslora)


def _regular(gram: Array) -> tuple[Array, Array]:
    """A covariance of mean diagonal 1, damped until it has an inverse; and that."""
    n = gram.shape[0]
    eye = jnp.eye(n, dtype=gram.dtype)
    size = jnp.trace(gram) / n
    unit = jnp.where(size > 0, gram / jnp.where(size > 0, size, 1), eye)

    def error(damp: Array) -> Array:
        c = unit + damp * eye
        return jnp.linalg.norm(product(c, jnp.linalg.inv(c)) - eye)

    poor = lambda damp: (error(damp) >= 0.05) & (damp < 1e6)
    first = jnp.asarray(0.01, gram.dtype)
    damp = jax.lax.while_loop(poor, lambda d: 2 * d, first)
    c = unit + damp * eye
    return c, jnp.linalg.inv(c)
