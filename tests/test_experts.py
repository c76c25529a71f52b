"""Experts Weights Averaging: exact where it must be, balanced where it is random."""

import functools as ft

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import nn, tree

KEY = jax.random.key(3)


def normal(*shape, seed=0):
    """Float32 draws that cost no compilation."""
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


EXPERTS = {"up": normal(4, 3, 8), "down": normal(4, 8, 3, seed=1)}
BOTH = tree.glob("up", "down")
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ffn(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


@pytest.mark.parametrize(("tokens", "experts"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_the_partition_covers_each_token_once_and_is_balanced(tokens, experts):
    for seed in range(5):
        key = jax.random.key(seed)
        parts, counts = nn.random_partition(tokens, experts, key=key)
        assert sorted(parts[counts].tolist()) == list(range(tokens))
        sizes = counts.sum(1)
        assert sizes.max() - sizes.min() <= 1
    with pytest.raises(ValueError, match="experts must be"):
        nn.random_partition(3, 4, key=KEY)


def test_every_token_is_as_likely_in_every_part():
    draw = lambda key: nn.random_partition(8, 4, key=key)[0]
    parts = jax.vmap(draw)(jax.random.split(KEY, 4000))
    often = np.stack(
        [np.bincount(np.ravel(parts[:, e]), minlength=8) for e in range(4)]
    )
    np.testing.assert_allclose(often, 1000, atol=5 * np.sqrt(750))


@pytest.mark.parametrize("shape", [(12, 3), (2, 7, 3)])
def test_each_token_meets_one_expert(shape):
    x = normal(*shape, seed=2)
    run = jax.jit(lambda x: nn.partition_experts(ffn, EXPERTS, x, key=KEY))
    got, flat = np.asarray(run(x)).reshape(-1, 3), x.reshape(-1, 3)
    every = np.asarray(jax.jit(jax.vmap(ffn, (0, None)))(EXPERTS, flat))
    parts = nn.random_partition(flat.shape[0], 4, key=KEY)
    for e, (part, counts) in enumerate(zip(*map(np.asarray, parts), strict=True)):
        np.testing.assert_allclose(
            got[part[counts]], every[e, part[counts]], 1e-5, 1e-6
        )


def test_equal_experts_are_one_network_exactly():
    one = {"up": normal(3, 8), "down": normal(8, 3, seed=1)}
    experts = nn.to_experts(one, where=BOTH, experts=4)
    back = nn.to_ffn(experts, where=BOTH)
    for name, v in one.items():
        np.testing.assert_array_equal(back[name], v)
    x = normal(16, 3, seed=2)
    got = nn.partition_experts(ffn, experts, x, key=KEY)
    np.testing.assert_allclose(got, ffn(one, x), 1e-5, 1e-6)
    still = nn.average_experts(experts, where=BOTH, rate=0.3)
    for name, v in experts.items():
        np.testing.assert_array_equal(still[name], v)


def test_the_share_rate_moves_experts_to_their_mean():
    mean = {n: v.mean(0) for n, v in EXPERTS.items()}
    average = lambda rate: nn.average_experts(EXPERTS, where=BOTH, rate=rate)
    for name, v in EXPERTS.items():
        np.testing.assert_array_equal(average(0.0)[name], v)
        whole = average(1.0)[name]
        np.testing.assert_allclose(whole, np.stack([mean[name]] * 4), 1e-5, 1e-6)
        third = 0.7 * v + 0.3 * mean[name][None]
        np.testing.assert_allclose(average(0.3)[name], third, 1e-5, 1e-6)
        kept = average(0.3)[name].mean(0)  # the mean is what it was
        np.testing.assert_allclose(kept, mean[name], 1e-5, 1e-6)
        b = 0.15  # of the others alone: the same by another name
        others = (v.sum(0, keepdims=True) - v) / 3
        want = (1 - b) * v + b * others
        np.testing.assert_allclose(average(b * 4 / 3)[name], want, 1e-5, 1e-6)


def test_only_the_selected_leaves_change_in_their_dtype():
    params = {"moe": EXPERTS["up"].astype(jnp.bfloat16), "norm": jnp.ones(3)}
    got = jax.jit(
        lambda rate: nn.average_experts(params, where=tree.glob("moe"), rate=rate)
    )(0.5)
    assert got["moe"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["norm"], params["norm"])
    with pytest.raises(ValueError, match="selects no leaf"):
        nn.average_experts(params, where=tree.glob("other"), rate=0.5)
    with pytest.raises(ValueError, match="rate must be"):
        nn.average_experts(params, where=tree.glob("moe"), rate=1.5)
    with pytest.raises(ValueError, match="'s' is a scalar"):
        nn.to_ffn({"s": jnp.ones(())}, where=tree.glob("s"))
    with pytest.raises(ValueError, match="experts must be"):
        nn.to_experts(params, where=tree.glob("moe"), experts=0)


# --- the layer ---------------------------------------------------------------------


class Ffn(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(3, 8, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def test_the_layer_trains_and_converts_to_its_network():
    """Weights stacked by path; averaged each step; the mean runs as one network."""
    layer = nn.RandomPartitionMoE(Ffn, 4, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    assert params["experts"]["up"]["kernel"].get_value().shape == (4, 3, 8)
    first = params["experts"]["up"]["kernel"].get_value()
    assert not np.array_equal(first[0], first[1])
    x, target = normal(2, 16, 3), normal(2, 16, 3, seed=1)
    where = tree.glob("experts/**")

    @jax.jit
    def loss(params, key):
        y = nnx.merge(graph, params)(x, rngs=nnx.Rngs(partition=key))
        return jnp.mean((y - target) ** 2)

    def step(params, key):
        slope = jax.grad(loss)(params, key)
        params = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, slope))
        return nn.average_experts(params, where=where, rate=0.2), None

    spread = lambda p: float(
        jnp.std(p["experts"]["up"]["kernel"].get_value(), 0).mean()
    )
    before, start = loss(params, KEY), spread(params)
    train = jit(lambda p: jax.lax.scan(step, p, jax.random.split(KEY, 60))[0])
    params = train(params)
    assert loss(params, KEY) < before
    assert spread(params) < 0.1 * start
    network = nnx.merge(
        nnx.split(Ffn(nnx.Rngs(1)))[0], nn.to_ffn(params, where=where)["experts"]
    )
    got = nnx.merge(graph, params)(x)
    np.testing.assert_allclose(got, network(x), 1e-5, 1e-6)


def test_nn_has_no_other_hidden_names():
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        nn.Missing  # noqa: B018
