"""Small networks that prompts and gates come out of."""

from collections.abc import Callable, Sequence
import itertools

import jax
from jax import Array
import jax.numpy as jnp


def linears(key: Array, widths: Sequence[int]) -> list[dict[str, Array]]:
    """Linear layers `w [n, m]`, `b [m]`, uniform in 1 / sqrt(n)."""
    out = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        keys = jax.random.split(jax.random.fold_in(key, i))
        shapes = {"w": (n, m), "b": (m,)}
        out.append(_uniform(dict(zip(shapes, keys, strict=True)), shapes, n))
    return out


def perceptron(
    layers: Sequence[dict[str, Array]], x: Array, act: Callable[[Array], Array]
) -> Array:
    """Linear layers of `x [..., n]` with an activation between them."""
    for i, layer in enumerate(layers):
        x = (act(x) if i else x) @ layer["w"]
        x = x + jnp.broadcast_to(layer["b"], x.shape)
    return x


def cell(key: Array, n: int, size: int) -> dict[str, Array]:
    """One direction of an LSTM layer: `w [n, 4 size]`, `u [size, 4 size]`, `b`."""
    shapes = {"w": (n, 4 * size), "u": (size, 4 * size), "b": (4 * size,)}
    keys = dict(zip(shapes, jax.random.split(key, 3), strict=True))
    return _uniform(keys, shapes, size)


def run(layer: dict[str, Array], x: Array) -> Array:
    """The hidden states `[p, size]` of an LSTM over `x [p, n]`."""
    zero = jnp.zeros(layer["u"].shape[0], x.dtype)

    def step(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = state
        i, f, g, o = jnp.split(x @ layer["w"] + h @ layer["u"] + layer["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    return jax.lax.scan(step, (zero, zero), x)[1]


def _uniform(
    keys: dict[str, Array], shapes: dict[str, tuple[int, ...]], n: int
) -> dict[str, Array]:
    """Arrays by name, uniform in 1 / sqrt(n)."""
    draw = lambda k, s: jax.random.uniform(k, s, jnp.float32, -(n**-0.5), n**-0.5)
    return {name: draw(keys[name], shape) for name, shape in shapes.items()}
