"""RoAd: Liao and Monz, 2024."""

from typing import Any, Literal

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._rank import wide


def road(*, variant: Literal[1, 2, 4] = 1, group: int = 64) -> Adapter:
    r"""Rotates and scales pairs of a layer's outputs: $y = R\,(x W + b)$.

    The pair of outputs $i$ and $i + g/2$ of a group of g becomes
    $$\begin{pmatrix} \alpha_1\cos\theta_1 & -\alpha_1'\sin\theta_1' \\
    \alpha_2'\sin\theta_2' & \alpha_2\cos\theta_2 \end{pmatrix}
    \begin{pmatrix} h_i \\ h_{i+g/2} \end{pmatrix}.$$

    Args:
      variant: how many of the four $\theta$ and $\alpha$ of a pair differ. 1: all are
        one, a rotation and a scale; 2: one for each row of the matrix; 4: all four.
      group: g, even; it divides m. Which outputs are paired, and nothing else.

    Returns:
      An adapter with state `theta` and `alpha`, each [m / 2], [m] or [2 m].

    Raises:
      ValueError: another variant, an odd group, or (from `init`) one that does not
        divide m.

    Degenerate inputs:
      Fresh, theta = 0 and alpha = 1: the layer is unchanged.

    References:
      Liao and Monz, 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning,
      Efficient Batching and Composability", https://arxiv.org/abs/2409.00119.

    Example:
      >>> s = {"theta": jnp.array([jnp.pi / 2]), "alpha": jnp.array([2.0])}
      >>> road(group=2).merge(jnp.array([[1.0, 0.0]]), s).round(3).tolist()
      [[-0.0, 2.0]]
    """
    if variant not in (1, 2, 4):
        raise ValueError(f"variant must be 1, 2 or 4, got {variant!r}")
    if group < 2 or group % 2:
        raise ValueError(f"group must be even, got {group}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        m = w.shape[1]
        if m % group:
            raise ValueError(f"group {group} does not divide the {m} outputs")
        size = m * variant // 2
        return {"theta": jnp.zeros(size, wide(w)), "alpha": jnp.ones(size, wide(w))}

    def turn(y: Array, s: dict[str, Any]) -> Array:
        dtype = wide(y, s["theta"])
        pairs = y.astype(dtype).reshape(-1, y.shape[-1] // group, 2, group // 2)
        straight, across = _columns(s["theta"], s["alpha"], variant, group)
        crossed = jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], axis=-2)
        turned = pairs * straight[None] + crossed * across[None]
        return turned.reshape(y.shape).astype(y.dtype)

    def bias(b: Array | None, s: dict[str, Any]) -> Array | None:
        return None if b is None else turn(b, s)

    config = ("road", ("variant", variant), ("group", group))
    apply = lambda x, w, s: turn(x @ w, s)
    return Adapter(init, apply, turn, bias=bias, config=config)


def _columns(
    theta: Array, alpha: Array, variant: int, group: int
) -> tuple[Array, Array]:
    r"""$\alpha\cos\theta$ and $\alpha\sin\theta$ by output `[groups, 2, g / 2]`."""
    if variant == 4:
        theta, alpha = (v.reshape(-1, 2, 2, group // 2) for v in (theta, alpha))
        return (
            alpha[:, 0] * jnp.cos(theta[:, 0]),
            alpha[:, 1] * jnp.sin(theta[:, 1]),
        )
    theta, alpha = (v.reshape(-1, variant, group // 2) for v in (theta, alpha))
    if variant == 1:
        theta, alpha = (jnp.repeat(v, 2, axis=1) for v in (theta, alpha))
    return alpha * jnp.cos(theta), alpha * jnp.sin(theta)
