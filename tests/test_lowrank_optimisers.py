"""GaLore, Fira, refactorisation and momentum reset against their formulas."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import lowrank

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def run(tx, grads, params):
    """The updates of several steps, under jit."""

    @jit
    def step(g, state):
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            return tx.update(g, state, params)

    state, out = tx.init(params), []
    for g in grads:
        update, state = step(g, state)
        out.append(update)
    return out, state


def svd(g):
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return u, vt.T


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_galore_is_the_optimiser_in_the_leading_subspace(shape):
    grads = [normal(i, *shape) for i in range(3)]
    tx = lowrank.galore(optax.trace(0.9), rank=2, scale=0.5)
    got, state = run(tx, grads, jnp.zeros(shape))
    assert state.inner.trace.shape == ((8, 2) if shape[0] > shape[1] else (2, 8))
    left, right = (v[:, :2] for v in svd(grads[0]))
    total = 0
    for g, update in zip(grads, got, strict=True):
        total = 0.9 * total + np.asarray(g, np.float64)
        inside = (
            total @ right @ right.T if shape[0] > shape[1] else left @ left.T @ total
        )
        close(update, 0.5 * inside)


def test_galore_changes_its_subspace_when_it_is_time():
    grads = [normal(i, 6, 4) for i in range(5)]
    got, _ = run(
        lowrank.galore(optax.identity(), rank=1, period=2, scale=1.0), grads, grads[0]
    )
    for i, (g, update) in enumerate(zip(grads, got, strict=True)):
        right = svd(grads[i - i % 2])[1][:, :1]
        close(update, np.asarray(g) @ right @ right.T)


def test_galore_leaves_vectors_and_small_matrices_whole():
    params = {"w": normal(0, 3, 6, 4), "b": normal(1, 4), "s": normal(2, 5, 2)}
    inner = optax.scale_by_adam()
    got, state = run(lowrank.galore(inner, rank=2, scale=1.0), [params], params)
    sizes = {n: v.shape for n, v in state.inner.mu.items()}
    assert sizes == {"w": (3, 6, 2), "b": (4,), "s": (5, 2)}
    want = run(inner, [params], params)[0][0]
    for name in ("b", "s"):
        close(got[0][name], want[name])


def test_memory_is_that_of_the_subspace():
    """Adam's two moments and the projection: (2 n + m) r numbers in place of 2 n m."""
    params = {"w": jnp.zeros((64, 32))}
    state = lowrank.galore(optax.scale_by_adam(), rank=4).init(params)
    numbers = sum(x.size for x in jax.tree.leaves(state))
    assert numbers == (2 * 64 + 32) * 4 + 1 + 1 + 1  # two counts, a norm
    full = optax.scale_by_adam().init(params)
    assert numbers < 0.16 * sum(x.size for x in jax.tree.leaves(full))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_fira_scales_the_rest_of_the_gradient_and_limits_its_growth(shape):
    """Against numpy; a sudden large gradient meets the limiter."""
    grads = [normal(0, *shape), 30 * normal(1, *shape), normal(2, *shape)]
    tx = lowrank.fira(optax.trace(0.5), rank=2, scale=0.7)
    got, _ = run(tx, grads, jnp.zeros(shape))
    tall = shape[0] >= shape[1]
    left, right = (v[:, :2] for v in svd(grads[0]))
    momentum, last = 0, None
    for g, update in zip(grads, got, strict=True):
        g = np.asarray(g, np.float64)
        low = g @ right if tall else left.T @ g
        momentum = 0.5 * momentum + low
        back = lambda r: 0.7 * (r @ right.T if tall else left @ r)
        axis = 1 if tall else 0
        size = lambda r, axis=axis: np.linalg.norm(r, axis=axis, keepdims=True)
        rest = (g - back(low)) * size(momentum) / (size(low) + 1e-8)
        norm = np.linalg.norm(rest)
        if last is not None and norm > 1.01 * last:
            rest, norm = rest * 1.01 * last / norm, 1.01 * last
        last = norm
        close(update, back(momentum) + rest, 1e-4)


def test_fira_learns_what_galore_cannot_reach():
    """A target outside the first subspace of a fixed rank-one projection."""
    target = normal(0, 4, 4)

    def error(tx):
        def step(_, carry):
            w, state = carry
            with jax.numpy_dtype_promotion("standard"):
                update, state = tx.update(w - target, state)
            return w - 0.05 * update, state

        w = jnp.zeros((4, 4))
        return float(
            jnp.abs(jax.lax.fori_loop(0, 200, step, (w, tx.init(w)))[0] - target).max()
        )

    options = {"rank": 1, "period": 1000, "scale": 1.0}
    assert error(lowrank.galore(optax.identity(), **options)) > 0.5
    assert error(lowrank.fira(optax.identity(), **options)) < 0.1


def test_balancing_keeps_the_product():
    a, b = 10 * normal(0, 3, 8, 2), 0.1 * normal(1, 3, 2, 5)
    x, y = jit(lowrank.balance)(a, b)
    close(x @ y, a @ b, 1e-5)
    gram = np.asarray(x.mT @ x)
    close(gram, y @ y.mT, 1e-4)
    close(gram * (1 - np.eye(2)), 0, 1e-4)
    with pytest.raises(ValueError, match="r > min"):
        lowrank.balance(jnp.ones((2, 3)), jnp.ones((3, 4)))


def test_refactorizing_changes_factors_and_not_the_model():
    params = {"x": {"a": 10 * normal(0, 8, 2), "b": normal(1, 2, 5)}, "c": normal(2, 3)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = lowrank.refactorize(period=2)
    state = tx.init(params)
    for step in range(1, 4):
        updates, state = tx.update(zero, state, params)
        new = optax.apply_updates(params, updates)
        same = bool((new["x"]["a"] == params["x"]["a"]).all())
        assert same == (step % 2 == 1)
        close(new["x"]["a"] @ new["x"]["b"], params["x"]["a"] @ params["x"]["b"], 1e-4)
        close(new["c"], params["c"])
    fresh = {"a": normal(0, 8, 2), "b": jnp.zeros((2, 5))}
    kept, _ = lowrank.refactorize(period=1).update(fresh, state, fresh)
    close(kept["a"], fresh["a"], 1e-6)  # a fresh LoRA keeps its a
    with pytest.raises(ValueError, match="needs params"):
        tx.update(zero, state)


def test_momentum_starts_anew():
    grads = [normal(i, 3) for i in range(5)]
    reset, _ = run(
        lowrank.reset_momentum(optax.scale_by_adam(), period=2), grads, grads[0]
    )
    fresh = lambda gs: run(optax.scale_by_adam(), gs, gs[0])[0]
    want = [*fresh(grads[:2]), *fresh(grads[2:4]), *fresh(grads[4:])]
    for got, expected in zip(reset, want, strict=True):
        close(got, expected)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: lowrank.galore(optax.identity(), rank=0),
        lambda: lowrank.fira(optax.identity(), rank=1, period=0),
        lambda: lowrank.refactorize(period=0),
        lambda: lowrank.reset_momentum(optax.identity(), period=0),
    ],
)
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        bad()
