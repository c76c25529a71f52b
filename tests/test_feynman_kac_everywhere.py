"""Feynman-Kac correctors under every transformation, and on bad input."""

import functools as ft

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import diffusion
from jaxlab.diffusion import Expert, feynman_kac
from jaxlab.types import Denoiser

GRID = diffusion.karras(diffusion.edm(), steps=8, low=0.1, high=5.0, end="least")


def unit(x, noise, cond):
    """The denoiser of N(0, 1)."""
    return x / (1 + noise.sigma**2).astype(x.dtype)


def annealed(x, key, **options):
    return feynman_kac([Expert(unit, 3.0)], x, GRID, key=key, **options)


KEYS = jax.random.split(jax.random.key(0), 8)
X = 3 * np.random.default_rng(1).normal(size=(8, 64, 2)).astype(np.float32)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def one(x, key, threshold=0.9):
    return annealed(x, key, threshold=threshold)


run = jit(one)


@ft.cache
def looped():
    every = [run(x, key) for x, key in zip(X, KEYS, strict=True)]
    out = jax.tree.map(lambda *v: np.stack(v), *every)
    assert out.resampled.any()
    assert not out.resampled.all()
    return out


def same(got, want):
    """Alike to rounding."""
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_mapped_as_looped():
    same(jit(jax.vmap(one))(X, KEYS), looped())


def test_pmapped_as_looped():
    same(jax.pmap(one)(X, KEYS), looped())


def test_sharded_as_unsharded():
    """A population over eight devices: its ancestors may be anywhere."""
    mesh = jax.make_mesh((8,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("n"))
    got = run(jax.device_put(X[0], spread), KEYS[0])
    same(got, jax.tree.map(lambda v: v[0], looped()))
    assert got.resampled.any()


def test_keys_decide_and_slots_have_their_own():
    """No slot's noise depends on how many there are."""
    few = run(X[0], KEYS[0])
    jax.tree.map(np.testing.assert_array_equal, few, run(X[0], KEYS[0]))
    assert (run(X[0], KEYS[1]).x != few.x).any()
    many = run(X[:2].reshape(128, 2), KEYS[0], 0.0)
    np.testing.assert_array_equal(many.x[:64], run(X[0], KEYS[0], 0.0).x)


def test_jumps_at_every_step():
    """The paper's process: the weights start anew each time."""
    out = jit(ft.partial(annealed, threshold=1.0, scheme="jump"))(X[0], KEYS[0])
    assert out.resampled.all()
    np.testing.assert_allclose(out.log_weights, -np.log(64), rtol=1e-5)


def test_a_population_of_one_in_bfloat16():
    out = run(np.ones((1, 2), jnp.bfloat16), KEYS[0])
    assert out.x.dtype == jnp.bfloat16
    assert out.log_z.dtype == out.log_weights.dtype == jnp.float32
    assert np.isfinite(np.asarray(out.x, np.float32)).all()
    assert np.isfinite(out.log_z)
    assert (np.asarray(out.ess) == 1).all()
    assert not np.asarray(out.resampled).any()
    assert np.asarray(out.log_weights) == 0


def test_gradients():
    def loss(beta, lam):
        out = feynman_kac([Expert(unit, beta)], X[0], GRID, key=KEYS[0], noise=lam)
        return out.log_z + jnp.sum(out.x[:, 0] * jnp.exp(out.log_weights))

    slope = jit(jax.grad(loss, (0, 1)))
    slopes = np.asarray([*slope(3.0, 1.0), slope(3.0, 0.0)[0]])
    assert np.isfinite(slopes).all()
    assert (slopes != 0).all()


def test_particles_without_weight():
    """Where a prediction or a reward is none, there is none; where all are, for all."""
    hurt = Expert(
        lambda x, noise, cond: jnp.where(x > 50, jnp.nan, unit(x, noise, cond))
    )

    @jit
    def part(x, limit):
        off = lambda x, noise: jnp.where(x < limit, -jnp.inf, 0.0)
        options = {"noise": 0.0, "reward": off, "threshold": 0.6}
        return feynman_kac([hurt], x, GRID, key=KEYS[0], **options)

    x = np.repeat(np.float32([-100, -1, 1, 100]), 4)
    out = jax.tree.map(np.asarray, part(x, -20.0))
    assert (np.abs(out.x) < 1).all()  # the offspring of -1 and 1 alone
    assert {-1.0, 1.0} == set(np.sign(out.x))
    assert np.isfinite(out.log_z)
    assert np.isfinite(out.log_weights).all()
    gone = jax.tree.map(np.asarray, part(np.clip(x, -1, 1), np.inf))
    assert np.isfinite(gone.x).all()
    assert gone.log_z == -np.inf
    assert (gone.log_weights == -np.inf).all()
    assert (gone.ess == 0).all()
    assert not gone.resampled.any()


def forgetful(x, cond):
    return jnp.zeros(len(x))


UNIT = Expert(unit)
BAD = {
    "at least one expert": {"experts": []},
    "expert 1: a weight that changes": {"experts": [UNIT, Expert(unit, lambda t: t)]},
    "weight must be finite": {"experts": [Expert(unit, np.nan)]},
    "remembers its samples": {
        "experts": [Expert(Denoiser(forgetful, lambda x, n, c, s: (x, s)))]
    },
    "conds of one structure": {"experts": [UNIT, Expert(unit, 1.0, jnp.ones(2))]},
    "the denoiser gave": {"experts": [Expert(lambda x, n, c: x[:, :1])]},
    "noise must be at least 0": {"noise": -1.0},
    "spread must be above 0": {"spread": 0.0},
    "threshold must be from 0 to 1": {"threshold": 1.5},
    "scheme must be one of": {"scheme": "residual"},
    "without columns": {"grid": diffusion.columns([GRID, GRID])},
    "must fall": {"grid": diffusion.reverse(GRID)},
    "alpha is 0": {"grid": diffusion.uniform(diffusion.flow(), steps=3)},
    "reward must give": {"reward": lambda x, noise: x},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    given = {"experts": [UNIT], "x": X[0], "grid": GRID, "key": KEYS[0]}
    given |= BAD[message]
    with pytest.raises(ValueError, match=message):
        feynman_kac(given.pop("experts"), given.pop("x"), given.pop("grid"), **given)
