"""rewrite.symmetries, continuous: every swap, gain and flip of tiny models."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import rewrite

SEED = 3
RNG = np.random.default_rng(SEED)
FAST = {"xla_backend_optimization_level": 0}


def normal(*shape):
    return RNG.normal(size=shape)


def rms(x, gain):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain


def mlp(p, x):
    h = jnp.tanh(jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] + p["d"])
    return h @ p["e"] + p["f"]


def tied_swiglu(p, x):
    y = rms(x @ p["emb"], p["n"])
    y = x @ p["emb"] + (jax.nn.silu(y @ p["g"]) * (y @ p["u"])) @ p["d"]
    return y @ p["emb"].T


def mixture(p, x):
    h = jnp.tanh(jnp.einsum("br,erf->bef", x, p["w1"]) + p["b1"])
    return jnp.einsum("be,bef,efr->br", jax.nn.softmax(x @ p["r"]), h, p["w2"])


def gathered_mixture(p, x):
    gate, e = jax.lax.top_k(x @ p["r"], 1)
    h = jnp.tanh(jnp.einsum("br,bkrf->bkf", x, p["w1"][e]) + p["b1"][e])
    return jnp.einsum("bk,bkf,bkfr->br", gate, h, p["w2"][e])


def gru(p, x):
    def step(h, x):
        u, z = (jax.nn.sigmoid(x @ p["i" + n] + h @ p["h" + n]) for n in "uz")
        return (1 - z) * jnp.tanh(x @ p["in"] + u * (h @ p["hn"])) + z * h, None

    start = jnp.zeros((x.shape[1], 2), x.dtype)
    return jax.lax.scan(step, start, x)[0] @ p["out"]


def tied(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"]) @ p["w"].T + p["c"]


def repeated_square(p, x):
    return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["i"]) @ p["w"]) @ p["w"]) @ p["o"]


ROW = {"a": (2, 2), "b": (2,), "c": (2, 2), "d": (2,), "e": (2, 2), "f": (2,)}
MOE = {"r": (3, 2), "w1": (2, 3, 2), "b1": (2, 2), "w2": (2, 2, 3)}
GATES = {"iu": (3, 2), "iz": (3, 2), "in": (3, 2), "hu": (2, 2), "hz": (2, 2),
         "hn": (2, 2), "out": (2, 3)}  # fmt: skip
SWIGLU = {"emb": (5, 2), "n": (2,), "g": (2, 2), "u": (2, 2), "d": (2, 2)}
TINY = {
    "mlp": (mlp, ROW, (5, 2)),
    "tied swiglu": (tied_swiglu, SWIGLU, (4, 5)),
    "mixture": (mixture, MOE, (5, 3)),
    "gathered mixture": (gathered_mixture, MOE, (9, 3)),
    "gru": (gru, GATES, (4, 3, 3)),
    "tied": (tied, {"w": (2, 2), "b": (2,), "c": (2,)}, (5, 2)),
    "repeated square": (
        repeated_square, {"i": (3, 2), "w": (2, 2), "o": (2, 3)}, (5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_no_other_swap_of_axes_of_length_two_keeps_the_function(name):
    """All 2^k subsets of axes are swapped: those that keep it are those found."""
    apply, shapes, size = TINY[name]
    params, x = {k: normal(*s) for k, s in shapes.items()}, normal(*size)
    axes = [(k, i) for k, s in shapes.items() for i, n in enumerate(s) if n == 2]
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(True):
        got = rewrite.symmetries(apply, params, x)

        def change(code):
            q = dict(params)
            for bit, (k, axis) in enumerate(axes):
                q[k] = jnp.where((code >> bit) & 1, jnp.flip(q[k], axis), q[k])
            return jnp.abs(apply(q, x) - want).max()

        want = apply(params, x)
        every = jax.jit(jax.vmap(change), compiler_options=FAST)
        kept = set(np.flatnonzero(every(jnp.arange(1 << len(axes))) < 1e-9).tolist())
    span = {0}
    for group in got.groups:
        swaps = sum(1 << axes.index((m.path, m.place.axis)) for m in group.members)
        assert all(m.place.steps == () for m in group.members)
        span |= {s ^ swaps for s in span}
    assert kept == span
    assert len(span) > 1


def scaled(p, gains):
    """Every slice of every leaf along every axis times a gain of its own."""
    return {
        k: x * ft.reduce(jnp.multiply, [g.reshape([-1] + [1] * (x.ndim - a - 1))
                                        for a, g in enumerate(gains[k])])
        for k, x in p.items()
    }  # fmt: skip


def exponents(found, shapes):
    """By row, what each symmetry does to each slice; and what is no change at all."""
    names = [(k, a, i) for k, s in shapes.items() for a, n in enumerate(s)
             for i in range(n)]  # fmt: skip
    rows = []
    for s in found:
        for unit in range(s.group.size):
            row = np.zeros(len(names), int)
            for m, e in zip(s.group.members, s.exponents, strict=True):
                every = range(shapes[m.path][0]) if m.place.steps else [unit]
                for i in every:
                    row[names.index((m.path, m.place.axis, i))] += e
            rows.append(row)
    for k, shape in shapes.items():
        for a in range(1, len(shape)):
            row = np.zeros(len(names), int)
            row[[n for n, (path, axis, _) in enumerate(names)
                 if (path, axis) in ((k, 0), (k, a))]] = 1  # fmt: skip
            row[[n for n, (path, axis, _) in enumerate(names)
                 if (path, axis) == (k, a)]] = -1  # fmt: skip
            rows.append(row)
    return np.array(rows)


def gain_of(vector, shapes):
    """A vector over all slices as one gain per leaf and axis."""
    out, at = {}, 0
    for k, shape in shapes.items():
        out[k] = []
        for n in shape:
            out[k].append(vector[at : at + n])
            at += n
    return out


def relu_mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]


def bilinear(p, x):
    return ((x @ p["g"]) * jnp.tanh(x @ p["u"])) @ p["d"]


def attention(p, x):
    weights = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T / 2)
    return weights @ (x @ p["v"]) @ p["o"]


def normalised(p, x):
    return rms(x @ p["e"], p["n"]) @ p["h"]


def cosine(p, x):
    y = x @ p["e"]
    return y / jnp.sqrt((y * y).sum(-1, keepdims=True)) @ p["h"]


SCALED = {
    "tanh": (mlp, ROW, (20, 2)),
    "relu": (relu_mlp, {"a": (3, 4), "b": (4,), "c": (4, 2)}, (20, 3)),
    "bilinear": (bilinear, {"g": (2, 3), "u": (2, 3), "d": (3, 2)}, (20, 2)),
    "attention": (attention, dict.fromkeys("qkvo", (2, 2)), (20, 2)),
    "normalised": (normalised, {"e": (3, 2), "n": (2,), "h": (2, 3)}, (20, 3)),
    "cosine": (cosine, {"e": (3, 2), "h": (2, 3)}, (20, 3)),
    "tied swiglu": (tied_swiglu, SWIGLU, (9, 5)),
    "repeated square": (
        repeated_square, {"i": (3, 2), "w": (2, 2), "o": (2, 3)}, (20, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALED)
def test_no_other_scale_of_slices_keeps_the_function(name):
    """The gains to which outputs are blind, at first order: those found, no more."""
    apply, shapes, size = SCALED[name]
    params, x = {k: normal(*s) for k, s in shapes.items()}, normal(*size)
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(True):
        found = [s for s in rewrite.continuous(apply, params, x)
                 if s.kind not in ("sign", "rotation")]  # fmt: skip
        rows = exponents(found, shapes)
        change = lambda c: apply(scaled(params, gain_of(jnp.exp(c), shapes)), x).ravel()
        slope = jax.jit(jax.jacfwd(change), compiler_options=FAST)
        slope = np.asarray(slope(jnp.zeros(rows.shape[1])))
    values = np.linalg.svd(slope, compute_uv=False)
    blind = slope.shape[1] - (values > 1e-9 * values[0]).sum()
    assert np.abs(slope @ rows.T).max(initial=0) < 1e-12 * values[0]
    assert np.linalg.matrix_rank(rows) == blind


@pytest.mark.parametrize("name", ["tanh", "bilinear", "attention", "normalised"])
def test_no_other_flip_of_slices_keeps_the_function(name):
    """All 2^k flips of slices: those that keep it are the span of those found."""
    apply, shapes, size = SCALED[name]
    params, x = {k: normal(*s) for k, s in shapes.items()}, normal(*size)
    with jax.numpy_rank_promotion("allow"), jax.enable_x64(True):
        found = rewrite.continuous(apply, params, x)
        found = [s for s in found if s.kind != "scale" and not s.ones]
        rows = exponents(found, shapes) % 2
        want, bits = apply(params, x), np.arange(rows.shape[1])

        def change(code):
            signs = 1.0 - 2 * ((code >> bits) & 1).astype(x.dtype)
            return jnp.abs(
                apply(scaled(params, gain_of(signs, shapes)), x) - want
            ).max()

        every = jax.jit(jax.vmap(change), compiler_options=FAST)
        kept = set(np.flatnonzero(every(jnp.arange(1 << len(bits))) < 1e-9).tolist())
    span = {0}
    for row in rows:
        code = int((row << bits).sum())
        span |= {s ^ code for s in span}
    assert kept == span
