"""How the values of adapters are compared with their papers' formulas."""

from collections.abc import Callable
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.types import Adapter

# Draws of this kind compile fastest, and their values do not matter here.
KEYS = jax.random.split(jax.random.key(0, impl="unsafe_rbg"))
EVEN, ODD = (6, 4), (5, 7)


class Case(NamedTuple):
    """An adapter, and what its paper says of it."""

    make: Callable[[], Adapter]
    count: Callable[[int, int], int]  # trained values of a weight [n, m]
    merged: Callable[[Any, Any], Any] | None = None  # (w, s) -> w'
    output: Callable[[Any, Any, Any], Any] | None = None  # (x, w, s) -> y, instead
    zero: str = ""  # the trained entries that start at zero
    starts: bool = True  # a fresh state changes nothing
    random: bool = False  # the key matters to the fresh state
    shapes: tuple = (ODD,)
    also: str = ""  # fixed entries to draw too
    statistic: Callable[[Any], Any] | None = None  # w -> what init takes


def summed(a, b):
    """A B as a sum of outer products."""
    return sum(np.outer(a[:, q], b[q]) for q in range(a.shape[1]))


def relu(z):
    return np.where(z > 0, z, 0)


def softmax(z):
    out = np.exp(z)
    return out / out.sum(-1, keepdims=True)


def pair(r):
    """The entries of factors `[n, r]` and `[r, m]`."""
    return lambda n, m: r * (n + m)


@ft.cache
def weight(shape):
    """A weight with two pruned entries."""
    w = np.random.default_rng(0).normal(size=shape)
    w[0, 0] = w[-1, 1] = 0
    return w


@ft.cache
def computed(case, shape):
    """Two first states, one at random, and what is merged and applied there.

    In the state at random, fixed projections are as they were.
    """
    adapter, rng = case.make(), np.random.default_rng(1)
    larger = tuple(v + 2 for v in shape)

    def fresh(key, w):
        s = adapter.init(key, w, *([case.statistic(w)] if case.statistic else []))
        if adapter.shared is not None:
            s = s | adapter.shared(key, (shape, larger, larger[::-1]))
        return jax.tree.map(wide, s)

    def wide(v):
        return v.astype(float) if jnp.issubdtype(v.dtype, jnp.floating) else v

    def everything(key, w, x, noise):
        start = fresh(key, w)
        s = start | jax.tree.map(jnp.add, {k: start[k] for k in noise}, noise)
        merged = adapter.merge and adapter.merge(w, s)
        return start, s, merged, adapter.apply and adapter.apply(x, w, s)

    with jax.enable_x64(True):
        w = jnp.asarray(weight(shape))
        moves = {
            k: jax.tree.map(lambda v: 0.4 * rng.normal(size=v.shape), v)
            for k, v in jax.eval_shape(fresh, KEYS[0], w).items()
            if k not in adapter.fixed or k in case.also.split()
        }
        x, options = jnp.asarray(inputs(shape)), {"xla_backend_optimization_level": 0}
        run = jax.jit(everything, compiler_options=options)
        (other, *_), out = (run(key, w, x, moves) for key in KEYS)
        return jax.tree.map(np.asarray, (other, *out))


def inputs(shape):
    return np.random.default_rng(2).normal(size=(3, shape[0]))


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def check_values(case):
    """Merged and applied, wherever the adapter can do either."""
    for shape in case.shapes:
        w, x = weight(shape), inputs(shape)
        *_, s, merged, applied = computed(case, shape)
        if case.merged is not None:
            want = case.merged(w, s)
            assert np.abs(want - w).max() > 1e-2
            close(merged, want)
        else:
            assert merged is None
        if applied is not None:
            y = case.output(x, w, s) if case.output else x @ want
            assert np.abs(y - x @ w).max() > 1e-2
            close(applied, y)


def check_count(case):
    """The trained values, those that all leaves share included."""
    adapter = case.make()
    for n, m in (case.shapes[-1], (24, 16)):
        w = jax.ShapeDtypeStruct((n, m), jnp.float32)
        statistic = [jax.eval_shape(case.statistic, w)] if case.statistic else []
        s = jax.eval_shape(adapter.init, KEYS[0], w, *statistic)
        if adapter.shared is not None:
            of_one = ft.partial(_shared, adapter, ((n, m),))
            s = s | jax.eval_shape(of_one, KEYS[0])
        trained = {k: v for k, v in s.items() if k not in adapter.fixed}
        assert sum(v.size for v in jax.tree.leaves(trained)) == case.count(n, m)


def _shared(adapter, sizes, key):
    return adapter.shared(key, sizes)


def check_start(case):
    """Which entries are zero, what it computes, and whether the key matters."""
    adapter, shape = case.make(), case.shapes[0]
    other, s, *_ = computed(case, shape)
    zero = [k for k in s if k not in adapter.fixed and not s[k].any()]
    assert sorted(zero) == sorted(case.zero.split())
    w, x = weight(shape), inputs(shape)
    new = case.output(x, w, s) if case.output else x @ case.merged(w, s)
    assert (np.abs(new - x @ w).max() < 1e-6) == case.starts
    pairs = zip(jax.tree.leaves(s), jax.tree.leaves(other), strict=True)
    assert any((a != b).any() for a, b in pairs) == case.random
