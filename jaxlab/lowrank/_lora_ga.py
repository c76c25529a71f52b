"""LoRA-GA: Wang et al., 2024."""

import math
from typing import Any, Literal

from jax import Array

from ..types import Adapter
from ._shifted import Factors, shifted, top_svd

Direction = Literal["ArB2r", "A2rBr", "ArBr"]


def lora_ga(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    direction: Direction = "ArB2r",
    gamma: float | None = 16.0,
    niter: int | None = None,
) -> Adapter:
    r"""LoRA whose first step is that of full fine-tuning, as nearly as a rank allows.

    $y = x (W - s A_0 B_0) + s (x A) B$ from
    $A_0 = \frac{m^{1/4}}{\sqrt{\gamma}} U_{1..r}$ and
    $B_0 = \frac{m^{1/4}}{\sqrt{\gamma}} V_{r+1..2r}^\top$, singular vectors of the
    gradient $\nabla_W L = U \Sigma V^\top$. A step of gradient descent on A and B then
    changes the weight along the best approximation of $\nabla_W L$ of rank 2 r.

    Args:
      rank: r, from 1 to min(n, m) / 2.
      alpha: the scale's numerator, above 0; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r, as the paper has it.
      direction: which of the first 2 r singular vectors: "ArB2r" as above; "A2rBr" the
        other way round; "ArBr" in turns, from the second for A and the first for B.
      gamma: the paper's $\gamma$, above 0 ("stable"); None for unit vectors.
      niter: of a randomised SVD (4 in the authors' code); exact by default.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, and their first values `a0`, `b0`
      fixed: the base stays what it is. `init` takes the gradient `[n, m]` of the loss
      by the leaf: `attach(..., statistics=...)` with `rewrite.as_matrix` of each.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m) / 2; an alpha or
        gamma of 0 or below; an unknown direction; no statistic, or one of another
        shape.

    Degenerate inputs:
      Fresh, the layer is unchanged, to the bit when merged. A gradient of zero gives
      some orthonormal vectors.

    References:
      Wang et al., 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
      https://arxiv.org/abs/2407.05000, section 3 and algorithm 1, and
      https://github.com/Outsider565/LoRA-GA; there the base is overwritten with the
      residual. (PEFT 0.21.2 scales B alone, and by the singular values.)

    Example:
      >>> import jax, jax.numpy as jnp
      >>> slope = jnp.diag(jnp.array([4.0, 2.0, 1.0]))
      >>> adapter = lora_ga(rank=1, gamma=None)
      >>> s = adapter.init(jax.random.key(0), jnp.zeros((3, 3)), slope)
      >>> jnp.abs(s["a"]).T.tolist(), jnp.abs(s["b"]).tolist()
      ([[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]])
    """
    r = rank
    chosen = {
        "ArB2r": (slice(r), slice(r, 2 * r)),
        "A2rBr": (slice(r, 2 * r), slice(r)),
        "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
    }
    if direction not in chosen:
        raise ValueError(f"direction must be one of {[*chosen]}, got {direction!r}")
    if gamma is not None and gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")

    def start(key: Array, w: Array, scale: float, slope: Any = None) -> Factors:
        del scale
        if slope is None or slope.shape != w.shape:
            got = "none" if slope is None else f"one of shape {slope.shape}"
            raise ValueError(
                f"lora_ga needs statistics=: the gradient {list(w.shape)} of each "
                f"leaf, got {got}"
            )
        if 2 * rank > min(w.shape):
            raise ValueError(
                f"2 * rank = {2 * rank} is above min(n, m) of a weight {list(w.shape)}"
            )
        u, _, vt = top_svd(key, slope.astype(w.dtype), 2 * rank, niter)
        left, right = chosen[direction]
        size = 1.0 if gamma is None else w.shape[1] ** 0.25 / math.sqrt(gamma)
        return size * u[:, left], size * vt[right]

    options = (("direction", direction), ("gamma", gamma), ("niter", niter))
    return shifted("lora_ga", start, *options, rank=rank, alpha=alpha, rslora=rslora)
