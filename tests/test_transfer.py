"""Fine-tuning transfer, and the loss on the line between two models."""

import functools as ft

from cases import close, model, stacked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import measure, merge, tree

each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_transfer_adds_the_diff_vector_to_the_target():
    tuned, source, target = (model(seed=i) for i in range(3))
    want = each(lambda a, b, c: c + 0.5 * (a - b), tuned, source, target)
    models = tree.stack([tuned, source, target])
    close(merge.transfer(models, scale=0.5), want)
    close(merge.transfer(models, scale=each(lambda _: 0.5, target)), want)
    close(merge.transfer(models, scale=0.0), target, 0)


def test_transfer_onto_the_source_itself_is_the_tuned_model():
    tuned, source = model(), model(seed=1)
    close(merge.transfer(tree.stack([tuned, source, source])), tuned)


def test_transfer_rounds_no_diff_vector_on_the_way():
    """In bfloat16 a rounded difference would be off by more than half an ulp."""
    models = stacked(3, "bfloat16")
    wide = each(lambda x: np.asarray(x, np.float64), models)
    want = each(lambda x: x[2] + (x[0] - x[1]), wide)
    for got, exact in zip(
        *map(jax.tree.leaves, (merge.transfer(models), want)), strict=True
    ):
        assert got.dtype == jnp.bfloat16
        error = np.abs(np.asarray(got, np.float64) - exact)
        assert (error <= 0.501 * 2**-7 * np.maximum(np.abs(exact), 1e-3)).all()


def test_transfer_needs_three_models():
    with pytest.raises(ValueError, match="holds 2 models, expected 3"):
        merge.transfer(stacked(2))


def descend(goal, steps):
    """Fine-tuning on a quadratic of that minimum: a known contraction."""
    kept = 0.9**steps
    return lambda params: each(lambda x, g: g + kept * (x - g), params, goal)


def test_recycling_starts_each_version_from_what_was_learnt():
    bases, goal = [model(seed=i) for i in range(4)], model(seed=9)
    finetune, starts = descend(goal, 5), []

    def watched(params):
        starts.append(params)
        return finetune(params)

    tuned = list(merge.recycle(bases, watched))
    assert len(tuned) == 4
    close(starts[0], bases[0], 0)
    for i in range(1, 4):
        want = each(lambda b, m, c: b + (m - c), bases[i], tuned[i - 1], bases[i - 1])
        close(starts[i], want)
        close(tuned[i], finetune(starts[i]))


def test_recycling_beats_tuning_each_version_from_scratch():
    """Versions that drift slowly: the error shrinks with every version."""
    goal = model(seed=9)
    drift = [each(lambda x, i=i: x + 0.01 * i, model()) for i in range(5)]
    off = lambda m: float(tree.norm(tree.subtract(m, goal)))
    recycled = [off(m) for m in merge.recycle(drift, descend(goal, 5))]
    scratch = [off(m) for m in merge.recycle(drift, descend(goal, 5), scale=0.0)]
    assert recycled[0] == scratch[0]
    assert recycled[-1] < 0.2 * scratch[-1]
    assert recycled == sorted(recycled, reverse=True)


def test_recycling_takes_one_version_at_a_time():
    taken = []

    def bases():
        for i in range(3):
            taken.append(i)
            yield model(seed=i)

    steps = merge.recycle(bases(), lambda params: params)
    assert not taken
    close(next(steps), model(seed=0), 0)
    assert taken == [0]
    assert list(merge.recycle([], lambda params: params)) == []
    with pytest.raises(ValueError, match="delta has an extra leaf 'a'"):
        list(merge.recycle([model(), {"b": model()["b"]}], lambda params: params))


# --- the loss on the line ------------------------------------------------------------


def test_a_convex_loss_has_no_barrier():
    loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(p))
    got = measure.linear_connectivity(loss, model(), model(seed=1), points=7)
    assert float(got.barrier) == 0.0
    assert float(measure.barrier(loss, model(), model(seed=1))) == 0.0
    np.testing.assert_allclose(got.t, np.linspace(0, 1, 7), rtol=1e-6)
    a, b = model(), model(seed=1)
    for t, value in zip(got.t, got.loss, strict=True):
        middle = each(lambda x, y, t=t: (1 - t) * np.asarray(x) + t * y, a, b)
        want = sum(np.sum(np.square(x)) for x in jax.tree.leaves(middle))
        np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.mark.parametrize("points", [3, 5, 21])
def test_the_barrier_is_above_the_line_and_the_instability_above_the_mean(points):
    """On w in [-1, 1]: 1 - w^2 + w rises 1 above the line from -1 to 1."""
    loss = lambda p: 1 - p["w"] ** 2 + p["w"]
    ends = {"w": jnp.float32(-1)}, {"w": jnp.float32(1)}
    got = measure.linear_connectivity(loss, *ends, points=points)
    w = np.linspace(-1, 1, points)
    np.testing.assert_allclose(got.loss, 1 - w**2 + w, atol=1e-6)
    np.testing.assert_allclose(got.barrier, 1.0, rtol=1e-6)
    np.testing.assert_allclose(got.instability, (1 - w**2 + w).max(), rtol=1e-6)
    np.testing.assert_allclose(measure.barrier(loss, *ends, points=points), 1.0)


def test_permuted_networks_have_a_barrier_and_equal_ones_have_none():
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    net, x = {"i": normal(4, 16), "o": jnp.ones((16, 1))}, normal(64, 4)
    apply = lambda p: jnp.tanh(x @ p["i"]) @ p["o"]
    order = random.permutation(16)
    other = {"i": net["i"][:, order], "o": net["o"][order]}
    loss = lambda p: jnp.mean((apply(p) - apply(net)) ** 2)
    barrier = lambda a, b: measure.barrier(loss, a, b, points=5)
    height = jit(jax.value_and_grad(barrier))
    (high, slope), (none, _) = height(net, other), height(net, net)
    assert float(high) > 0.1
    assert float(none) == 0.0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(slope))


def test_connectivity_in_half_precision_and_of_nan():
    half = lambda seed: model("bfloat16", seed)
    loss = lambda p: sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(p))
    got = measure.linear_connectivity(loss, half(0), half(1), points=3)
    assert got.loss.dtype == jnp.float32
    for end, params in ((0, half(0)), (-1, half(1))):
        np.testing.assert_allclose(got.loss[end], loss(params), rtol=1e-6)
    nan = lambda p: jnp.where(p["w"] > 0, jnp.nan, p["w"])
    ends = {"w": jnp.float32(-1)}, {"w": jnp.float32(1)}
    assert np.isnan(measure.barrier(nan, *ends))


def test_connectivity_says_what_is_wrong():
    loss = lambda p: p["w"].sum()
    one, two = {"w": jnp.ones(2)}, {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="b differs at 'w'"):
        measure.barrier(loss, one, two)
    with pytest.raises(ValueError, match="points must be at least 2"):
        measure.barrier(loss, one, one, points=1)
    with pytest.raises(ValueError, match=r"scalar, got shape \(2,\)"):
        measure.barrier(lambda p: p["w"], one, one)
    steps = {"w": jnp.ones(2), "steps": jnp.int32(3)}
    with pytest.raises(ValueError, match="'steps' of dtype int32"):
        measure.barrier(loss, steps, steps)
