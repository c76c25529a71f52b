"""PiSSA: Meng et al., 2024."""

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._shifted import Factors, shifted, top_svd


def pissa(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    niter: int | None = None,
) -> Adapter:
    r"""The principal part of each weight is trained, the rest is frozen.

    $y = x (W - s A_0 B_0) + s (x A) B$ from
    $A_0 = U_r (\Sigma_r / s)^{1/2}$ and $B_0 = (\Sigma_r / s)^{1/2} V_r^\top$, where
    $W = U \Sigma V^\top$ and $s = \alpha / r$.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator, above 0; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r.
      niter: of the paper's fast SVD, 4 to 16; exact by default.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, and their first values `a0`, `b0`
      fixed: the base stays what it is. `as_lora` makes it a plain LoRA of rank 2 r.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m); an alpha or niter
        below 0.

    Degenerate inputs:
      Fresh, the layer is unchanged, to the bit when merged. Where W has rank below r,
      pairs of zero singular values start at zero and have no slope.

    References:
      Meng et al., 2024, "PiSSA: Principal Singular Values and Singular Vectors
      Adaptation of Large Language Models", https://arxiv.org/abs/2404.02948,
      section 3; there the base is overwritten with the residual. With `niter`
      the sketch has 10 columns more than the rank.

    Example:
      >>> import jax
      >>> s = pissa(rank=1).init(jax.random.key(0), jnp.diag(jnp.array([4.0, 1.0])))
      >>> (s["a"] @ s["b"]).tolist()
      [[4.0, 0.0], [0.0, 0.0]]
    """
    if niter is not None and niter < 0:
        raise ValueError(f"niter must be at least 0, got {niter}")

    def start(key: Array, w: Array, scale: float) -> Factors:
        u, s, vt = top_svd(key, w, rank, niter)
        root = jnp.sqrt(s / scale)
        return u * root[None], root[:, None] * vt

    options = ("niter", niter)
    return shifted("pissa", start, options, rank=rank, alpha=alpha, rslora=rslora)
