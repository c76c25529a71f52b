"""KaSA: Wang et al., 2024."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._adalora import leaves_of, skew
from ._lora import lora
from ._operands import like
from ._randomized import product
from ._rank import plus, wide
from ._state import State


def kasa(*, rank: int, alpha: float | None = None, rslora: bool = False) -> Adapter:
    r"""The least components of each weight make room for a diagonal update.

    $y = x (W - N) + s (x A) \Delta\Sigma B$, where N holds the r smallest singular
    components of W, $\Delta\Sigma$ is diagonal and $s = \alpha / r$. A is uniform in
    $\pm 1/\sqrt{n}$, $\Delta\Sigma$ normal, B zero.

    Args:
      rank: r, from 1 to min(n, m) - 1.
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      rslora: divide by $\sqrt{r}$ in place of r.

    Returns:
      An adapter with state `a [n, r]`, `diag [r]`, `b [r, m]`, and N as `a0 [n, r]`,
      `b0 [r, m]`, fixed: the base stays what it is. Train it with `kasa_penalty`.

    Raises:
      ValueError: a rank below 1, or (from `init`) of min(n, m) or above.

    Degenerate inputs:
      Fresh, the weight is W - N: the layer does change, unless W has rank
      min(n, m) - r.

    References:
      Wang et al., 2024, "KaSA: Knowledge-Aware Singular-Value Adaptation of Large
      Language Models", https://arxiv.org/abs/2412.06071, section 3; there the base is
      overwritten with W - N.

    Example:
      >>> w = jnp.diag(jnp.array([4.0, 1.0]))
      >>> adapter = kasa(rank=1)
      >>> adapter.merge(w, adapter.init(jax.random.key(0), w)).tolist()
      [[4.0, 0.0], [0.0, 0.0]]
    """
    plain = lora(rank=rank, alpha=alpha, rslora=rslora)
    scale = dict(plain.config[1:])["scale"]

    def init(key: Array, w: Array) -> dict[str, Any]:
        if rank >= min(w.shape):
            raise ValueError(f"rank {rank} leaves nothing of a weight {list(w.shape)}")
        drawn, normal = jax.random.split(key)
        u, s, vt = jnp.linalg.svd(w.astype(wide(w)), full_matrices=False)
        noise = {"a0": u[:, -rank:] * s[-rank:][None], "b0": vt[-rank:]}
        diag = jax.random.normal(normal, (rank,), wide(w))
        return plain.init(drawn, w) | {"diag": diag} | noise

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = kasa_pair(s, scale)
        return plus(x @ w, (x @ like(a, x)) @ like(b, x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        a, b = kasa_pair(s, scale)
        return plus(w, product(a, b))

    config = ("kasa", *plain.config[1:4])
    return Adapter(init, apply, merge, fixed=("a0", "b0"), config=config)


def kasa_pair(s: dict[str, Any], scale: float) -> tuple[Array, Array]:
    """The factors of the whole update, of rank 2 r."""
    a = jnp.concatenate([scale * s["a"] * s["diag"][..., None, :], s["a0"]], -1)
    return a, jnp.concatenate([s["b"], -s["b0"]], -2)


def kasa_penalty(state: State, *, beta: float = 1e-4, gamma: float = 1e-3) -> Array:
    r"""KaSA's two regularisers, for the loss.

    $\beta \|\Delta\Sigma\|_F^2 + \gamma (\|A^\top A - I\|_F + \|B B^\top - I\|_F)$,
    summed over the adapted matrices.

    Args:
      state: of an adapted model, some of whose adapters are `kasa`.
      beta: the weight of the singular values.
      gamma: the weight of orthonormality.

    Returns:
      A number, to be added to the loss.

    Raises:
      ValueError: no adapter is `kasa`.

    Degenerate inputs:
      Exactly orthonormal factors have slope 0.

    References:
      Wang et al., 2024, https://arxiv.org/abs/2412.06071, equations 9 to 11. The
      authors' code takes the mean over matrices; PEFT 0.21.2 the sum, as here.

    Example:
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> _, state = lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     kasa(rank=1), x, where="w", key=jax.random.key(0))
      >>> kasa_penalty(state, beta=1.0, gamma=0.0) == (state["w"]["diag"] ** 2).sum()
      Array(True, dtype=bool)
    """
    total = jnp.zeros(())
    for s in leaves_of(state, "kasa").values():
        values = jnp.sum(jnp.square(s["diag"]))
        total = total + beta * values + gamma * jnp.sum(skew(s["a"], s["b"]))
    return total
