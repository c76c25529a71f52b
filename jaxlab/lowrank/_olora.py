"""OLoRA: Büyükakyüz, 2024."""

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._shifted import Factors, shifted


def olora(*, rank: int, alpha: float | None = None, rslora: bool = False) -> Adapter:
    r"""A low-rank update that starts at orthonormal directions of each weight.

    $y = x (W - s A_0 B_0) + s (x A) B$ from $A_0 = R_r^\top$ and $B_0 = Q_r^\top$, the
    first r rows of R and columns of Q in $W^\top = Q R$.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator, above 0; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, and their first values `a0`, `b0`
      fixed: the base stays what it is. `as_lora` makes it a plain LoRA of rank 2 r.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m); an alpha of 0 or
        below.

    Degenerate inputs:
      Fresh, the layer is unchanged, to the bit when merged.

    References:
      Büyükakyüz, 2024, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language
      Models", https://arxiv.org/abs/2406.01775, algorithm 1; there the base is
      overwritten with the residual.

    Example:
      >>> import jax
      >>> s = olora(rank=1).init(jax.random.key(0), jnp.array([[2.0, 0.0], [3.0, 1.0]]))
      >>> (s["a"] @ s["b"] + 0).tolist()
      [[2.0, 0.0], [3.0, 0.0]]
    """

    def start(key: Array, w: Array, scale: float) -> Factors:
        del key, scale
        q, r = jnp.linalg.qr(w.T)
        return r[:rank].T, q[:, :rank].T

    return shifted("olora", start, rank=rank, alpha=alpha, rslora=rslora)
