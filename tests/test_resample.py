"""Resampling: every scheme's expectations, at any size, on any number of devices."""

import functools as ft

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import diffusion

SCHEMES = ("systematic", "stratified", "multinomial", "jump")
every = pytest.mark.parametrize("scheme", SCHEMES)
WEIGHTS = np.array([0.05, 0.3, 0.0, 0.02, 0.3, 0.17, 0.08, 0.08])
N = len(WEIGHTS)
COUNT = 4000
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def offspring(places, n):
    return np.bincount(np.asarray(places), minlength=n)


@ft.cache
def draw(scheme):
    """`(logits [n], keys [count]) -> places [count, n]`, compiled once a scheme."""
    one = ft.partial(diffusion.resample, scheme=scheme)
    return jit(jax.vmap(lambda logits, key: one(logits, key=key), (None, 0)))


@ft.cache
def draws(scheme):
    """`[count, n]`: places, and how many offspring each particle has."""
    places = draw(scheme)(log(WEIGHTS), jax.random.split(jax.random.key(0), COUNT))
    assert places.dtype == jnp.int32
    return np.asarray(places), np.stack([offspring(p, N) for p in places])


def log(weights):
    with np.errstate(divide="ignore"):
        return np.log(weights).astype(np.float32) + 7  # a constant is no matter


@every
def test_offspring_are_as_expected(scheme):
    counts = draws(scheme)[1]
    error = counts.std(0) / np.sqrt(len(counts))
    assert (np.abs(counts.mean(0) - N * WEIGHTS) <= 4.5 * error + 1e-6).all()
    wrong = np.full(N, 1.0)  # a test that could not tell would pass this too
    assert (np.abs(counts.mean(0) - wrong) > 4.5 * error).all()
    assert (counts[:, WEIGHTS == 0] == 0).all()


def test_how_far_offspring_stray():
    """Less than 1 (systematic), than 2 (stratified); the variance of n draws."""
    want = N * WEIGHTS
    assert np.abs(draws("systematic")[1] - want).max() < 1
    assert 1 < np.abs(draws("stratified")[1] - want).max() < 2
    got = draws("multinomial")[1].var(0)
    np.testing.assert_allclose(got, want * (1 - WEIGHTS), rtol=0.1, atol=1e-6)
    assert (draws("systematic")[1].var(0) <= 0.25).all()
    for scheme in ("systematic", "stratified"):
        assert (np.diff(draws(scheme)[0]) >= 0).all()


def test_jumps_leave_the_others_in_place():
    """Who has its share or more stays; 1 - n w of the rest jump, to those with more."""
    places = draws("jump")[0]
    stayed = places == np.arange(N)
    share = np.minimum(1, N * WEIGHTS)
    assert stayed[:, share == 1].all()
    error = np.sqrt(share * (1 - share) / len(places))
    assert (np.abs(stayed.mean(0) - share) <= 4.5 * error).all()
    assert np.isin(places[~stayed], np.flatnonzero(N * WEIGHTS > 1)).all()


def test_a_million_particles():
    """Exact sums: nobody strays, none is out of range, the weightless have none."""
    n = 1_000_000
    logits = np.random.default_rng(0).normal(0, 3, n).astype(np.float32)
    logits[:3] = logits[-3:] = -np.inf
    want = np.exp(logits.astype(np.float64))
    want *= n / want.sum()
    run = jit(ft.partial(diffusion.resample, key=jax.random.key(1)))
    got = offspring(run(logits), n)
    assert len(got) == n
    assert (np.abs(got - want) < 1 + 1e-6 * want).all()  # as float32 knows them
    assert (got[want == 0] == 0).all()


@every
def test_one_survivor_none_and_equals(scheme):
    keys = jax.random.split(jax.random.key(2), COUNT)
    run = lambda logits: np.asarray(draw(scheme)(np.float32(logits), keys))
    assert (run([-np.inf] * N) == np.arange(N)).all()
    for odd in (np.nan, np.inf, -np.inf):
        assert (run([odd, odd, -1e4] + [odd] * (N - 3)) == 2).all()
    if scheme != "multinomial":
        assert (run([1e30] * N) == np.arange(N)).all()


def test_a_population_of_one():
    one = jit(ft.partial(diffusion.resample, key=jax.random.key(0), scheme="jump"))
    np.testing.assert_array_equal(one(np.zeros(1, np.float32)), [0])


def test_sharded_as_unsharded():
    mesh = jax.make_mesh((8,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    logits = np.random.default_rng(3).normal(size=256).astype(np.float32)
    run = jit(ft.partial(diffusion.resample, key=jax.random.key(4)))
    spread = jax.device_put(logits, NamedSharding(mesh, PartitionSpec("n")))
    np.testing.assert_array_equal(run(spread), run(logits))


def test_effective_size():
    size = jit(diffusion.effective_size)
    odd = np.float32([np.nan, 5, np.inf, -np.inf])
    for logits, want in (
        (log([1, 1, 1, 1]) - 300, 4),
        (log([1, 2, 3, 0]), 36 / 14),
        (odd, 1),
        (odd - 5 - np.float32([0, np.inf, 0, 0]), 0),
    ):
        np.testing.assert_allclose(size(logits), want, rtol=1e-5)
    assert jax.eval_shape(size, jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32
    slope = jit(jax.grad(diffusion.effective_size))(np.float32([0, 1, -np.inf]))
    assert np.isfinite(np.asarray(slope)).all()


def test_bad_input():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="scheme must be one of"):
        diffusion.resample(np.zeros(3), key=key, scheme="residual")  # pyright: ignore
    for wrong in (np.zeros((2, 3)), np.zeros(0), np.zeros(())):
        with pytest.raises(ValueError, match="n at least 1"):
            diffusion.resample(wrong, key=key)
