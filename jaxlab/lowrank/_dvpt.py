"""DVPT, dynamic visual prompts: He et al., 2023."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ._module import Module, linear, shifted


def dvpt(*, prompts: int = 50, rank: int = 20) -> Module:
    r"""Prompts that ask an example's own features what they are.

    $H = \phi(X W_d + b_d)$ is a bottleneck of the frozen features,
    $Z = \mathrm{softmax}(P H^\top / \sqrt r) H$ what the prompts P find there, and
    $X \leftarrow X + g ((H + [Z; 0]) W_u + b_u)$: Z goes to the first p tokens. One set
    of parameters may serve several blocks. φ is $x \sigma(1.702 x)$.

    Args:
      prompts: p, at least 1; the authors put p learned tokens in front of a ViT's own.
      rank: r, of the bottleneck, at least 1.

    Returns:
      `init(key, n)` gives `prompts [p, r]`, `down [n, r]`, `down_bias [r]`,
      `up [r, n]`, `up_bias [n]` and the gate `gate []`; `apply(params, x)` takes
      `x [..., s, n]` to the same.

    Raises:
      ValueError: prompts or rank below 1; from `apply`, fewer tokens than prompts.

    Degenerate inputs:
      Fresh, g = 0: the features are unchanged.

    References:
      He et al., 2023, "DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models
      for Medical Image Analysis", https://arxiv.org/abs/2307.09787. The order is the
      paper's; the authors' code attends to X and not to H, adds to the first tokens
      before the feed-forward, and has a gate for each of the two.

    Example:
      >>> params = dvpt(prompts=2, rank=2).init(jax.random.key(0), 3)
      >>> dvpt(prompts=2, rank=2).apply(params, jnp.ones((4, 3))).shape
      (4, 3)
    """
    if prompts < 1 or rank < 1:
        raise ValueError(f"prompts and rank must be at least 1: {prompts}, {rank}")

    def init(key: Array, n: int) -> dict[str, Any]:
        one, two, three = jax.random.split(key, 3)
        return {
            "prompts": jax.random.normal(one, (prompts, rank)),
            "down": linear(two, n, rank),
            "down_bias": jnp.zeros(rank),
            "up": linear(three, rank, n),
            "up_bias": jnp.zeros(n),
            "gate": jnp.zeros(()),
        }

    def apply(params: dict[str, Any], x: Array) -> Array:
        tokens = x.shape[-2]
        if tokens < prompts:
            raise ValueError(f"{tokens} tokens are fewer than {prompts} prompts")
        wide = x.astype(params["down"].dtype)
        h = shifted(wide @ params["down"], params["down_bias"])
        h = h * jax.nn.sigmoid(1.702 * h)
        logits = jnp.einsum("pr,...sr->...ps", params["prompts"], h) / math.sqrt(rank)
        found = jax.nn.softmax(logits) @ h
        pad = [(0, 0)] * (x.ndim - 2) + [(0, tokens - prompts), (0, 0)]
        update = shifted((h + jnp.pad(found, pad)) @ params["up"], params["up_bias"])
        return (wide + params["gate"] * update).astype(x.dtype)

    return Module(init, apply)
