"""MiCA: Rüdiger and Raschka, 2026."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._lora import lora
from ._rank import check_rank, wide


def mica(*, rank: int, alpha: float | None = None, rslora: bool = False) -> Adapter:
    r"""A low-rank update into the directions that each weight uses least.

    $y = x W + \frac{\alpha}{r} (x A) B$ with $B = V_{-r}^\top$ fixed, the last r right
    singular vectors of $W = U \Sigma V^\top$, and A from zero.

    Args:
      rank: r, from 1 to min(n, m).
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r.

    Returns:
      An adapter with state `a [n, r]`, and `b [r, m]` fixed.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m).

    Degenerate inputs:
      Fresh, A = 0: the layer is unchanged.

    References:
      Rüdiger and Raschka, 2026, "MiCA Learns More Knowledge Than LoRA and Full
      Fine-Tuning", https://arxiv.org/abs/2604.01694, as PEFT 0.21.2 has it.

    Example:
      >>> import jax
      >>> s = mica(rank=1).init(jax.random.key(0), jnp.diag(jnp.array([4.0, 1.0])))
      >>> jnp.abs(s["b"]).tolist(), s["a"].tolist()
      ([[0.0, 1.0]], [[0.0], [0.0]])
    """
    plain = lora(rank=rank, alpha=alpha, rslora=rslora)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        check_rank(rank, w)
        dtype = wide(w)
        vt = jnp.linalg.svd(w.astype(dtype), full_matrices=False)[2]
        return {"a": jnp.zeros((w.shape[0], rank), dtype), "b": vt[-rank:]}

    return plain._replace(init=init, fixed=("b",), config=("mica", *plain.config[1:4]))
