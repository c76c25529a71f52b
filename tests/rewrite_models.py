"""Small models of every library and form: name -> (apply, params, inputs)."""

import functools as ft
from typing import Any

import equinox as eqx
from flax import linen, nnx
import jax
import jax.numpy as jnp
import numpy as np

Model = tuple[Any, Any, tuple[Any, ...]]


def normal(seed: int, *shape: int, scale: float = 0.5) -> jax.Array:
    drawn = scale * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(drawn, jnp.float32)


def fresh(params: Any, seed: int = 0) -> Any:
    """The tree with random values, vectors above 0.1: no zero bias hides an error."""
    leaves, treedef = jax.tree.flatten(params)
    drawn = [normal(seed + i, *x.shape) for i, x in enumerate(leaves)]
    positive = [abs(x) + 0.1 if x.ndim < 2 else x for x in drawn]
    return jax.tree.unflatten(treedef, positive)


def mlp() -> Model:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None])
        return h @ p["b"]["w"].T

    params = {
        "a": {"w": normal(0, 3, 4), "b": normal(1, 4)},
        "b": {"w": normal(2, 2, 4)},
    }
    return apply, params, (normal(3, 5, 3),)


class Norm(nnx.Module):
    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jnp.reshape(self.scale[...], (1, 1, -1))
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


class Block(nnx.Module):
    """Grouped-query attention with rotary positions, and a gated MLP."""

    def __init__(self, d: int, kv: int, rep: int, dim: int, rngs: nnx.Rngs):
        self.kv, self.rep, self.dim = kv, rep, dim
        self.q = nnx.Linear(d, kv * rep * dim, use_bias=False, rngs=rngs)
        self.k = nnx.LinearGeneral(d, (kv, dim), use_bias=False, rngs=rngs)
        self.v = nnx.LinearGeneral(d, (kv, dim), use_bias=True, rngs=rngs)
        self.o = nnx.LinearGeneral((kv, rep, dim), d, axis=(-3, -2, -1), rngs=rngs)
        self.gate = nnx.Linear(d, 6, rngs=rngs)
        self.up = nnx.Linear(d, 6, rngs=rngs)
        self.down = nnx.Linear(6, d, rngs=rngs)
        self.before, self.after = Norm(d), Norm(d)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.before(x)
        q = self.q(h).reshape(*h.shape[:2], self.kv, self.rep, self.dim)
        k, v = self.k(h), self.v(h)
        q, k = rotary(q), rotary(k)
        scores = jnp.einsum("bsgrd,btgd->bgrst", q, k)
        mixed = jnp.einsum("bgrst,btgd->bsgrd", jax.nn.softmax(scores), v)
        x = x + self.o(mixed)
        h = self.after(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


def rotary(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    place = jnp.arange(x.shape[1], dtype=x.dtype)
    angle = jnp.outer(place, 10.0 ** -jnp.arange(half, dtype=x.dtype))
    angle = angle.reshape(1, x.shape[1], *(1,) * (x.ndim - 3), half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.block = Block(8, 2, 2, 4, rngs)
        self.norm = Norm(8)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(self.norm(self.block(self.embed(tokens))))


def transformer() -> Model:
    graph, params = nnx.split(nnx.eval_shape(lambda: Decoder(nnx.Rngs(0))))
    apply = lambda p, tokens: nnx.merge(graph, p)(tokens)
    return apply, fresh(params), (jnp.arange(10).reshape(2, 5) % 11,)


class ResNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = lambda: linen.BatchNorm(use_running_average=True)
        x = linen.relu(norm()(linen.Conv(4, (3, 3), name="stem")(x)))
        h = linen.Conv(6, (3, 3), strides=2, padding=((1, 1), (1, 1)))(x)
        h = linen.relu(norm()(h))
        h = linen.Conv(6, (3, 3), feature_group_count=6)(h)  # depthwise
        h = linen.Conv(6, (3, 3), feature_group_count=3, kernel_dilation=2)(h)
        x = linen.Conv(6, (1, 1), strides=2, use_bias=False)(x) + h
        return linen.Dense(3)(linen.GroupNorm(2)(x).mean((1, 2)))


def resnet() -> Model:
    model, x = ResNet(), normal(4, 2, 6, 6, 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model.apply, fresh(shapes), (x,)


def equinox() -> Model:
    net = eqx.filter_eval_shape(eqx.nn.MLP, 3, 2, 5, 2, key=jax.random.key(0))
    shapes, static = eqx.partition(net, lambda x: hasattr(x, "shape"))
    apply = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    return apply, fresh(shapes), (normal(5, 4, 3),)


def gru() -> Model:
    """The weights are constants of the scan."""

    def apply(p: Any, xs: jax.Array) -> jax.Array:
        def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            r, z, n = jnp.split(x @ p["wi"] + p["b"][None], 3, -1)
            hr, hz, hn = jnp.split(h @ p["wh"], 3, -1)
            r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
            h = z * h + (1 - z) * jnp.tanh(n + r * hn)
            return h, h

        last, every = jax.lax.scan(cell, jnp.zeros((xs.shape[1], 4)), xs)
        return (last + every.mean(0)) @ p["out"]

    shapes = {"wi": (3, 12), "wh": (4, 12), "b": (12,), "out": (4, 2)}
    params = {n: normal(i, *s) for i, (n, s) in enumerate(shapes.items())}
    return apply, params, (normal(9, 6, 2, 3),)


def scanned(remat: bool = True) -> Model:
    """Layers sliced by a scan, each rematerialised: `[layer, ...]` leaves."""

    def block(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        q = jnp.einsum("bsd,dhk->bshk", x, p["q"])
        x = x + jnp.einsum("bshk,hkd->bsd", jnp.tanh(q), p["o"])
        h = x * p["scale"][None, None] + p["bias"][None, None]
        return x + jax.nn.gelu(h @ p["up"]) @ p["up"].T, None

    def apply(p: Any, x: jax.Array) -> jax.Array:
        policy = jax.checkpoint_policies.dots_saveable
        one = jax.checkpoint(block, policy=policy) if remat else block
        x, _ = jax.lax.scan(one, x @ p["in"], p["layers"], unroll=1, reverse=True)
        return x @ p["in"].T

    shapes = {"q": (4, 2, 3), "o": (2, 3, 4), "up": (4, 5), "scale": (4,), "bias": (4,)}
    layers = {n: normal(i, 3, *s, scale=0.4) for i, (n, s) in enumerate(shapes.items())}
    return apply, {"in": normal(8, 2, 4), "layers": layers}, (normal(9, 2, 3, 2),)


def branching() -> Model:
    """A branch, a loop and a nested jit."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        yes = lambda x: jnp.tanh(x @ p["yes"])
        no = lambda x: x @ p["no"] @ p["no"]
        x = jax.lax.cond(x.sum() > 0, yes, no, x)
        going = lambda c: c[0] < 3
        turn = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["loop"]))
        _, x = jax.lax.while_loop(going, turn, (0, x))
        return jax.jit(lambda x, w: x @ w)(x, p["out"])

    params = {n: normal(i, 3, 3) for i, n in enumerate(("yes", "no", "loop", "out"))}
    return apply, params, (normal(7, 4, 3),)


def moe() -> Model:
    """Experts on an axis of their own, and experts folded into one."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ p["router"])
        h = jax.nn.relu(jnp.einsum("td,edf->etf", x, p["up"]))
        y = jnp.einsum("etf,efd->etd", h, p["down"])
        mixed = jnp.einsum("te,etd->td", gates, y)
        folded = p["folded"].reshape(4, 3, 2)  # (d, experts, out)
        return jnp.einsum("etd,deo->teo", y, folded) + mixed[:, :3, None]

    shapes = {"router": (4, 3), "up": (3, 4, 5), "down": (3, 5, 4), "folded": (4, 6)}
    params = {n: normal(i, *s) for i, (n, s) in enumerate(shapes.items())}
    return apply, params, (normal(9, 6, 4),)


def tied() -> Model:
    def apply(p: Any, tokens: jax.Array) -> jax.Array:
        x = jnp.take(p["embed"], tokens, axis=0) + p["place"][None]
        return jnp.tanh(x @ p["w"]) @ p["embed"].T

    params = {"embed": normal(0, 7, 4), "place": normal(1, 3, 4), "w": normal(2, 4, 4)}
    return apply, params, (jnp.array([[0, 6, 3], [3, 3, 1]]),)


MODELS = {
    f.__name__: ft.cache(f)
    for f in (
        mlp, transformer, resnet, equinox, gru, scanned, branching, moe, tied,
    )
}  # fmt: skip
