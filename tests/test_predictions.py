"""Predictions as one another, the denoisers made of them, and Langevin's steps."""

import functools as ft

import jax
import jax.numpy as jnp
from mixtures import THREE, Mixture
import numpy as np
import pytest
from solvers import EDM, SCHEDULES

from jaxlab import diffusion
from jaxlab.types import Noise

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
X0, EPS = np.random.default_rng(0).standard_normal((2, 5, 3))
KINDS = ("x0", "eps", "v", "score", "flow")


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def made(a, s):
    """A noisy sample and all that can be predicted of it."""
    a, s = (np.reshape(v, (-1, 1)) for v in (a, s))
    score = np.divide(-EPS, s, where=s > 0, out=np.full_like(EPS, np.nan))
    flow, v = EPS - X0, a * EPS - s * X0
    return a * X0 + s * EPS, dict(zip(KINDS, (X0, EPS, v, score, flow), strict=True))


@pytest.mark.parametrize("source", KINDS)
def test_all_predictions_say_the_same(source, float64):
    """At one noise, and at one for each sample; alpha and sigma are anything."""
    for a, s in (
        (0.6, 0.8),
        (1.0, 3.0),
        (np.linspace(1, 0.1, 5), np.linspace(0.1, 2, 5)),
    ):
        x, values = made(a, s)
        x, *levels = map(jnp.asarray, (x, a, s))
        noise = Noise(0.0, *levels)
        for target in KINDS:
            given = jnp.asarray(values[source]), x, noise
            got = diffusion.convert(*given, source=source, target=target)
            np.testing.assert_allclose(got, values[target], rtol=1e-12, atol=1e-12)


def test_the_score_of_a_denoiser_is_that_of_the_density(float64):
    x, noise = jnp.asarray(X0[:, :2]), Noise(0.0, jnp.float64(0.6), jnp.float64(0.7))
    x0 = THREE.denoise(x, noise)
    got = diffusion.convert(x0, x, noise, source="x0", target="score")
    np.testing.assert_allclose(got, THREE.score(x, noise), rtol=1e-12)
    slope = jit(jax.grad(lambda x: jnp.sum(THREE.log_density(x, noise))))(x)
    np.testing.assert_allclose(got, slope, rtol=1e-12)


@pytest.mark.parametrize(("a", "s"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1e-6)])
def test_a_velocity_tells_sample_and_noise_at_both_ends(a, s):
    x, values = made(a, s)
    noise = Noise(0.0, jnp.float32(a), jnp.float32(s))
    for source in ("v", "flow"):
        for target in ("x0", "eps", "v", "flow"):
            given = (jnp.asarray(v, jnp.float32) for v in (values[source], x))
            got = diffusion.convert(*given, noise, source=source, target=target)
            np.testing.assert_allclose(got, values[target], atol=1e-6)
    for target in ("eps", "score"):  # no noise: the sample alone tells nothing of it
        got = diffusion.convert(x, x, Noise(0, 1, 0.0 * jnp.ones(())), source="x0",
            target=target)  # fmt: skip
        assert not jnp.isfinite(got).any()


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_of_any_prediction_denoises(prediction, dtype):
    x, values = made(0.6, 0.8)
    seen = []

    def network(x, t, cond):
        seen.append((x.dtype, t))
        return jnp.asarray(values[prediction], x.dtype)

    denoise = diffusion.denoiser(network, prediction=prediction)
    noise = Noise(*map(jnp.float32, (999.0, 0.6, 0.8)))
    x0 = denoise(jnp.asarray(x, dtype), noise)
    assert x0.dtype == seen[0][0] == dtype
    assert seen[0][1].tolist() == [999.0] * 5  # bfloat16 has no 999
    np.testing.assert_allclose(x0, X0, atol=1e-5 if dtype == "float32" else 0.05)


def test_a_preconditioned_network_is_karras(float64):
    noise = Noise(0.3, jnp.float64(0.6), jnp.float64(0.9))
    x, told = jnp.asarray(made(0.6, 0.9)[0]), []

    def network(x, t, cond):
        told.append(t)
        return jnp.tanh(x) + cond

    got = diffusion.edm_denoiser(network, sigma_data=0.4)(x, noise, 2.0)
    s, hat = 1.5, np.asarray(x) / 0.6
    norm = np.sqrt(s**2 + 0.4**2)
    want = 0.4**2 / norm**2 * hat + s * 0.4 / norm * (np.tanh(hat / norm) + 2)
    np.testing.assert_allclose(got, want, rtol=1e-13)
    np.testing.assert_allclose(told[0], np.full(5, np.log(1.5) / 4), rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_preconditioned_network_at_the_ends(dtype):
    x = jnp.asarray(X0, dtype)
    network = lambda x, t, cond: (
        jnp.where(jnp.isfinite(t), 1, jnp.nan).astype(x.dtype).reshape(-1, 1) * x
    )
    denoise = diffusion.edm_denoiser(network, sigma_data=0.5)
    one, none = jnp.float32(1), jnp.float32(0)
    np.testing.assert_array_equal(denoise(x, Noise(none, one, none)), x)
    pure = denoise(x, Noise(one, none, one))
    np.testing.assert_allclose(pure, x / 2)
    assert pure.dtype == dtype


def test_about_another_mean():
    """Of data that is shifted: z = x - mu is sampled as if it were not."""
    mean = jnp.array([[3.0, -1.0]])
    shifted = Mixture(THREE.weights, THREE.means + np.asarray(mean), THREE.variances)
    cond = {"mu": jnp.repeat(mean, 4, 0)}
    grid = diffusion.karras(SCHEDULES["ou"], steps=6, low=0.05, high=2.0)
    z = diffusion.prior(KEY, (4, 2), grid)
    of = ft.partial(diffusion.sample, grid=grid, solver=diffusion.dpmpp(), cond=cond)
    sampled = lambda denoise: jit(lambda z: of(denoise, z))(z)
    want = sampled(THREE.denoise)
    # the noise of x is about the mean: its alpha x0 is short of mu by (1 - alpha) mu
    back = lambda x, noise, _: shifted.denoise(x - (1 - noise.alpha) * mean, noise)
    for mu in (mean, lambda cond: cond["mu"]):
        got = sampled(diffusion.recentre(back, mean=mu))
        np.testing.assert_allclose(got.x, want.x, atol=1e-4)
        assert float(got.nfe) == 6


GRID = diffusion.from_times(SCHEDULES["vp"], [1.0, 0.5, 0.0])
FIRST = [v[0] for v in GRID.noise[1:]]
CORRECTED = diffusion.langevin(diffusion.ddim(), snr=0.2, steps=2)


def test_langevin_steps_are_those_of_the_paper(float64):
    x, z = jnp.asarray(X0), jnp.asarray(EPS)
    denoise = lambda x, noise: 0.3 * x
    evaluate = lambda x, noise, state: (denoise(x, noise), state + 1)

    def first(solver):
        row = jax.tree.map(lambda v: jnp.asarray(v[0]), solver.plan(GRID))
        draw = lambda j: z * (j - 99).astype(z.dtype)
        return solver.step(evaluate, x, (), 0, row, draw)

    got, _, state = first(CORRECTED)
    want, (a, s) = (
        np.asarray(first(diffusion.ddim())[0]),
        (v[1] for v in GRID.noise[1:]),
    )
    norm = lambda v: np.linalg.norm(v, axis=1, keepdims=True)
    for count in (1, 2):
        noise, score = EPS * count, (a * 0.3 * want - want) / s**2
        fall = (GRID.noise.alpha[0] / a) ** 2
        epsilon = 2 * fall * (0.2 * norm(noise) / norm(score)) ** 2
        want = want + epsilon * score + np.sqrt(2 * epsilon) * noise
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert state == 3


def draw(x, grid, key, denoise=lambda x, noise, cond: THREE.denoise(x, noise)):
    return diffusion.sample(denoise, x, grid, solver=CORRECTED, key=key)


def test_langevin_of_each_sample_alone_and_none_at_the_clean_end():
    x, keys = jnp.asarray(X0[:2, :2], jnp.float32), jax.random.split(KEY)
    short = diffusion.from_times(SCHEDULES["vp"], [1.0, 0.0])
    both = diffusion.columns([GRID, short])
    mixed = jit(lambda x, keys: draw(x, both, keys))(x, keys)
    alone = jit(lambda x, keys: draw(x, GRID, keys))(x[:1], keys[:1])
    np.testing.assert_allclose(mixed.x[:1], alone.x, atol=1e-5)
    np.testing.assert_allclose(
        mixed.x[1], THREE.denoise(x, Noise(1, *FIRST))[1], atol=1e-5
    )
    assert float(alone.nfe) == 4  # two steps, one of them with two corrections


def test_langevin_without_a_score_stays_and_has_a_slope():
    """Nor does the clean end spoil it."""
    flat = lambda x, noise, cond: x  # of no score where alpha is 1
    grid, x = diffusion.from_ratios(EDM, [2, 1, 0]), jnp.asarray(X0, jnp.float32)
    loss = lambda x: jnp.sum(jnp.sin(draw(x, grid, KEY, flat).x))
    value, slope = jit(jax.value_and_grad(loss))(x)
    np.testing.assert_allclose(value, np.sin(X0).sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, np.cos(X0), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: diffusion.denoiser(None, prediction="x"), "one of x0, eps.* got 'x'"),
        (lambda: diffusion.edm_denoiser(None, sigma_data=0.0), "sigma_data must be"),
        (
            lambda: diffusion.convert(X0, X0, Noise(0, 1, 1), source="y", target="x0"),
            "one of x0, eps, v, score, flow, got 'y'",
        ),
        (lambda: diffusion.langevin(EDM, snr=-1.0), "snr above 0"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
