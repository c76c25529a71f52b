"""Feynman-Kac correctors against normal densities, whose targets are in closed form."""

import functools as ft
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import diffusion
from jaxlab.diffusion import Expert, feynman_kac

LOW, HIGH = 0.1, 5.0
POPULATIONS, N = 12, 1024
QUICK = {"xla_backend_optimization_level": 0}  # to compile, not to run
CASES = {  # weight, mean and variance of each expert
    "annealing": [(3.0, 0.0, 1.0), (0.0, 1.0, 1.0)],
    "product": [(1.0, -0.5, 0.6), (1.0, 1.0, 1.0)],
    "guidance": [(3.0, 0.5, 1.0), (-2.0, 0.0, 2.0)],
}


def denoise(x, noise, cond):
    """Of normal data, whose mean and variance it is told."""
    mean, variance = jnp.moveaxis(cond, 1, 0)
    a, s = noise.alpha, noise.sigma
    over = lambda v: v.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
    a, s = jnp.asarray(a, x.dtype), jnp.asarray(s, x.dtype)
    mean, variance = over(mean), over(variance)
    return (variance * a * x + mean * s**2) / (variance * a**2 + s**2)


def levels(steps, schedule=None):
    schedule = schedule or diffusion.edm()
    return diffusion.karras(schedule, steps=steps, low=LOW, high=HIGH, end="least")


class Normal(NamedTuple):
    mean: float
    variance: float
    log: float  # of the integral


def product(parts, sigma):
    """The product of noisy N(mean, variance)^beta."""
    beta, mean, variance = np.array(parts, np.float64).T
    variance = variance + sigma**2
    inverse = (beta / variance).sum()
    middle = (beta * mean / variance).sum() / inverse
    log = -0.5 * (beta * (np.log(2 * np.pi * variance) + mean**2 / variance)).sum()
    log += 0.5 * (np.log(2 * np.pi / inverse) + inverse * middle**2)
    return Normal(middle, 1 / inverse, log)


def start(top, n=N):
    noise = jax.random.normal(jax.random.key(5), (POPULATIONS, n))
    return jnp.float32(top.mean) + jnp.float32(np.sqrt(top.variance)) * noise


@ft.cache
def sampler(steps=100, spread=1.0):
    """Many populations one after the other, in a program for all cases."""

    def one(x, key, parts, lam, threshold):
        experts = [Expert(denoise, p[0], p[1:]) for p in parts]
        return feynman_kac(
            experts,
            x,
            levels(steps),
            key=key,
            noise=lam,
            threshold=threshold,
            spread=spread,
        )

    def run(x, parts, lam, threshold):
        keys = jax.random.split(jax.random.key(0), POPULATIONS)
        return jax.lax.map(lambda v: one(*v, parts, lam, threshold), (x, keys))

    run = jax.jit(run, compiler_options=QUICK if steps < 50 else None)
    return lambda parts, lam, threshold=0.5: run(
        start(product(parts, HIGH)), jnp.array(parts), lam, threshold
    )


def moments(out):
    """Of every population: the weighted mean and mean square, and the normaliser."""
    w = np.exp(np.asarray(out.log_weights, np.float64))
    np.testing.assert_allclose(w.sum(1), 1, atol=1e-5)
    x = np.asarray(out.x, np.float64)
    return (w * x).sum(1), (w * x**2).sum(1), np.exp(np.float64(out.log_z))


def within(values, want, errors=4.0, bias=0.0):
    """Whether the mean is as many standard errors off, or fewer."""
    values = np.asarray(values, np.float64)
    off = abs(values.mean() - want)
    return off <= errors * values.std() / np.sqrt(len(values)) + bias


@pytest.mark.parametrize("name", CASES)
def test_weighted_particles_are_of_the_target(name):
    """At any noise; at much, to 2% of the normaliser. Plain sums of scores are not."""
    parts, run = CASES[name], sampler()
    end, top = product(parts, LOW), product(parts, HIGH)
    square = end.variance + end.mean**2
    for lam in (1.0, 4.0):
        out = run(parts, lam)
        mean, second, z = moments(out)
        assert within(mean, end.mean)
        assert within(second, square)
        np.testing.assert_array_equal(out.nfe, 200)
    z /= np.exp(end.log - top.log)
    assert within(z, 1, bias=0.02)
    assert z.std() < 0.2
    size = np.asarray(out.ess)
    np.testing.assert_array_equal(out.resampled, size < N / 2)
    assert size.min() >= 1
    assert size.max() <= 1.001 * N
    plain = run(parts, 1.0, 0.0)
    assert not np.asarray(plain.resampled).any()
    off = (
        not within(plain.x.mean(1), end.mean, 8.0),
        not within((plain.x**2).mean(1), square, 8.0),
    )
    assert any(off)


def test_movement_is_exact_for_normal_data():
    """What becomes of the unweighted variance has a closed form, for every noise."""
    parts, beta = CASES["annealing"], 3.0
    end, top = 1 + LOW**2, 1 + HIGH**2
    for lam in (0.0, 1.0, 4.0):
        c = (1 + lam) * beta / 2
        want = (end / top) ** (2 * c) * top / beta
        want += lam * end * (1 - (end / top) ** (2 * c - 1)) / (2 * c - 1)
        got = (sampler()(parts, lam, 0.0).x ** 2).mean(1)
        assert within(got, want)
        assert not within(got, end / beta, errors=8.0)


def test_the_normaliser_converges_with_steps():
    """To what the test above asks of 100; a tenth of them are far too few."""
    parts = CASES["product"]
    ratio = np.exp(product(parts, LOW).log - product(parts, HIGH).log)
    few, many = (moments(sampler(n)(parts, 4.0))[2] / ratio for n in (10, 100))
    assert few.mean() - 1 > 0.5
    assert not within(few, 1, 8.0)
    assert within(many, 1, bias=0.02)


def test_one_density_needs_no_weights():
    """Of weight 1: the weights stay equal whatever the noise, nothing is resampled."""
    out = sampler()([(1.0, 0.5, 0.7), (0.0, 0.0, 1.0)], 2.0)
    np.testing.assert_allclose(out.log_z, 0, atol=1e-6)
    np.testing.assert_allclose(out.log_weights, -np.log(N), atol=1e-5)
    assert not np.asarray(out.resampled).any()
    assert within(out.x.mean(1), 0.5)


def bump(x, noise):
    """A reward that falls with the noise, and is not linear."""
    return (0.8 * x - 0.7 * x**2) * jnp.exp(-noise.sigma / noise.alpha)


def log_density(x, noise, cond):
    """Of noisy N(0, 1)."""
    variance = noise.alpha**2 + noise.sigma**2
    return -0.5 * (x**2 / variance + jnp.log(2 * np.pi * variance))


def test_a_reward_and_a_weight_that_change_in_time():
    """N(0, 1)^beta(t) exp(r_t) where alpha changes: its moments and its normaliser."""
    schedule = diffusion.cosine()
    grid = levels(100, schedule)
    beta = lambda t: 2 - np.tanh(schedule.sigma(t) / schedule.alpha(t) - 1)

    def target(i):
        alpha, sigma = grid.noise.alpha[i], grid.noise.sigma[i]
        b, fade = beta(grid.noise.t[i]), np.exp(-sigma / alpha)
        variance = alpha**2 + sigma**2
        inverse = b / variance + 1.4 * fade
        mean = 0.8 * fade / inverse
        log = 0.5 * (np.log(2 * np.pi / inverse) + inverse * mean**2)
        return Normal(mean, 1 / inverse, log - 0.5 * b * np.log(2 * np.pi * variance))

    top, end = target(0), target(-1)
    one = Expert(denoise, beta, jnp.array([0.0, 1.0]), log_density)
    keys = jax.random.split(jax.random.key(1), POPULATIONS)
    ratio, square = np.exp(end.log - top.log), end.variance + end.mean**2

    @jax.jit
    def run(x, lam):
        options = {"noise": lam, "reward": bump}
        walk = lambda v: feynman_kac([one], v[0], grid, key=v[1], **options)
        return jax.lax.map(walk, (x, keys))

    for lam in (0.5, 4.0):
        mean, second, z = moments(run(start(top), lam))
        assert within(mean, end.mean, bias=2e-3)
        assert within(second, square, bias=2e-3)
        assert within(z / ratio, 1, bias=0.02)
        assert not within(mean, 0, 8.0)  # as without the reward
        assert not within(second, 1 + LOW**2, 8.0)


FEW = levels(8)
PAIR = [Expert(denoise, w, jnp.array(c)) for w, *c in CASES["product"]]
SOME = 4 * jax.random.normal(jax.random.key(2), (16, 3))


def sampled(experts, grid, scale=1.0, **options):
    """In a program that is quickly compiled."""
    run = lambda x: feynman_kac(experts, x, grid, key=jax.random.key(3), **options)
    return jax.jit(run, compiler_options=QUICK)(SOME * np.float32(scale))


@ft.cache
def of_pair():
    return sampled(PAIR, FEW)


def test_schedules_differ_by_units_alone():
    """Of the same ratios of noise, in z = x / alpha; the normaliser is of x."""
    grid = levels(8, diffusion.vp())
    alpha = grid.noise.alpha[[0, -1]]
    got = sampled(PAIR, grid, alpha[0])
    close = ft.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    close(got.x, of_pair().x * np.float32(alpha[1]))
    close(got.log_weights, of_pair().log_weights)
    close(got.log_z, of_pair().log_z - 3 * np.log(alpha[1] / alpha[0]))


def test_one_call_for_experts_of_one_network():
    """Conds are told side by side; the answer is that of networks of their own."""
    batches = []

    def told(x, noise, cond):
        batches.append(x.shape)
        return denoise(x, noise, cond)

    fixed = lambda cond: lambda x, noise, _: denoise(x, noise, cond + 0 * x[:, :2])
    apart = Expert(fixed(PAIR[1].cond[None]), 0.5)
    half = [
        e._replace(denoise=told, weight=w) for e, w in zip(PAIR, (1, 0.5), strict=True)
    ]
    got = sampled([half[0], apart, half[1]], FEW)
    assert set(batches) == {(32, 3)}
    assert got.nfe == 24
    np.testing.assert_allclose(got.x, of_pair().x, atol=1e-4)
    np.testing.assert_allclose(got.log_z, of_pair().log_z, atol=1e-4)


def test_infinite_spread_is_eulers_method():
    """In the square of sigma, without noise: of one density, x' = x + dV s / 2."""
    unit = Expert(lambda x, noise, cond: x / (1 + noise.sigma**2))
    out = sampled([unit], FEW, noise=0.0, spread=np.inf)
    want, v = np.asarray(SOME, np.float64), FEW.noise.sigma**2
    for now, after in itertools.pairwise(v):
        want = want - (now - after) / 2 * want / (1 + now)
    np.testing.assert_allclose(out.x, want, rtol=1e-5)
