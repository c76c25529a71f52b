"""The demo's model: a small multilayer perceptron in Flax NNX, used as a function."""

import functools as ft
import itertools as it
from typing import Any

from flax import nnx
import jax
from jaxtyping import Array, Float

from ..types import Apply, Params

PIXELS, DIGITS = 64, 10


class MLP(nnx.Module):
    """`pixels -> width -> width -> digits` with ReLU between."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        sizes = [PIXELS, width, width, DIGITS]
        self.layers = nnx.List(
            [nnx.Linear(n, m, rngs=rngs) for n, m in it.pairwise(sizes)]
        )

    def __call__(self, x: Float[Array, "b n"]) -> Float[Array, "b m"]:
        """Logits `[b 10]` of images `[b 64]`."""
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def init(*, width: int, seed: int) -> tuple[Apply, Params]:
    """The pair (apply, params): all that jaxlab ever asks of a model."""
    graph, params = nnx.split(MLP(width, rngs=nnx.Rngs(seed)))
    return ft.partial(_apply, graph), params


def _apply(graph: Any, params: Params, x: Float[Array, "b n"]) -> Float[Array, "b m"]:
    return nnx.merge(graph, params)(x)
