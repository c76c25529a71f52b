"""The sequential merge: what each step adds, forgets, and how much it remembers."""

import functools as ft
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge, tree

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
step = jit(merge.opcm_step)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def model(seed, shape=(6, 5)):
    return {"w": normal(*shape, seed=seed), "b": normal(5, seed=seed + 100)}


def states(models, **keywords):
    state, out = merge.opcm_init(models[0]), []
    for m in models:
        state = step(state, m, **keywords)
        out.append(state)
    return out


def inner(a, b):
    return float(jnp.sum(a * b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))


def added(before, after, name="w"):
    """What a step has added, before the common scaling."""
    return after.scale * after.delta[name] - before.scale * before.delta[name]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_update_is_orthogonal_to_the_past(alpha):
    """To the merged matrix, each of its singular pairs, and the first r spaces."""
    found = states([model(i) for i in range(4)], alpha=alpha)
    for before, after in itertools.pairwise(found):
        update = added(before, after)
        u, s, vt = jnp.linalg.svd(before.delta["w"], full_matrices=False)
        inside = np.asarray(u.T @ update @ vt.T / jnp.linalg.norm(update))
        r = int((np.cumsum(s) <= alpha * np.sum(s) * (1 + 1e-6)).sum())
        assert r == {0.0: 0, 1.0: 5}.get(alpha, r)
        assert abs(inner(update, before.delta["w"])) < 1e-5
        np.testing.assert_allclose(np.diag(inside), 0, atol=1e-5)
        np.testing.assert_allclose(inside[:r, :r], 0, atol=1e-5)
        assert (
            r == 5
            or np.abs(inside[r:, r:] - np.diag(np.diag(inside[r:, r:]))).max() > 0.01
        )
        new = jnp.linalg.norm(update)
        assert new > 0.1  # something is left to add


def test_vectors_are_added_as_they_are():
    models = [model(i) for i in range(3)]
    found = states(models)
    for before, after, m in zip(found, found[1:], models[1:], strict=False):
        np.testing.assert_allclose(
            added(before, after, "b"), m["b"], rtol=1e-5, atol=1e-5
        )


def test_the_norm_is_the_mean_of_the_norms():
    models = [model(i) for i in range(5)]
    for t, state in enumerate(states(models), 1):
        mean = np.mean([float(tree.norm(m)) for m in models[:t]])
        assert float(state.count) == t
        np.testing.assert_allclose(
            [state.norm, tree.norm(state.delta)], mean, rtol=1e-5
        )


def test_one_model_is_itself_and_again_adds_nothing():
    m = {"w": model(0)["w"]}
    first, second = states([m, m])
    np.testing.assert_array_equal(first.delta["w"], m["w"])
    np.testing.assert_allclose(second.delta["w"], m["w"], rtol=1e-5, atol=1e-5)


def test_models_of_orthogonal_directions_are_kept_whole_in_any_order():
    u, _, vt = np.linalg.svd(normal(6, 5))
    parts = [{"w": jnp.asarray(u[:, i : i + 2] @ vt[i : i + 2])} for i in (0, 2)]
    for first, second in (parts, parts[::-1]):
        got = states([first, second])[-1]
        want = first["w"] + second["w"]
        np.testing.assert_allclose(got.scale * got.delta["w"], want, atol=1e-5)


def test_the_order_matters():
    models = [model(i) for i in range(3)]
    stacked = tree.stack(models)
    merged = jit(merge.opcm)(stacked)["w"]
    other = jit(merge.opcm)(jax.tree.map(lambda x: x[::-1], stacked))["w"]
    assert np.abs(merged - other).max() > 0.01


def test_stacked_is_step_by_step():
    models = [model(i) for i in range(4)]
    want = states(models, alpha=0.3)[-1].delta
    got = jit(ft.partial(merge.opcm, alpha=0.3))(tree.stack(models))
    jax.tree.map(
        ft.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want
    )


def test_models_arrive_in_their_own_dtypes():
    base = {"w": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones(4, jnp.float16)}
    state = step(merge.opcm_init(base), jax.tree.map(lambda x: 2 * x, base))
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    assert merge.add(base, state.delta)["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="delta has no leaf 'b'"):
        merge.opcm_step(state, {"w": base["w"]})
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        merge.opcm_step(state, base, alpha=1.5)


def test_memory_is_flat_in_the_number_of_models():
    """Neither arrays nor Python objects remain of a model that was merged."""
    shape = (120, 100)
    state, sizes = step(merge.opcm_init(model(0, shape)), model(0, shape)), {}
    tracemalloc.start()
    for t in range(1, 25):
        state = step(state, model(t % 4, shape))
        jax.block_until_ready(state)
        live = sum(x.nbytes for x in jax.live_arrays())
        sizes[t] = live, tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    arrays, objects = zip(*(sizes[t] for t in (6, 12, 24)), strict=True)
    assert len(set(arrays)) == 1
    assert max(objects) - min(objects) < 4 * 120 * 100  # less than one model
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert held < 4 * 120 * 100 + 100
