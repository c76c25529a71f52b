"""Likelihood by the probability-flow ODE, against densities known in closed form."""

import functools as ft
import itertools as it
import math

import jax
import jax.numpy as jnp
from mixtures import THREE, exact
import numpy as np
import pytest

from jaxlab import diffusion
from jaxlab.diffusion import _ode as ode
from jaxlab.types import Denoiser, Noise

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
LOW, HIGH = 0.05, 20.0
SCHEDULES = {
    "edm": diffusion.edm(),
    "vp": diffusion.vp(),
    "flow": diffusion.flow(),
    "scaled": diffusion.scaled(diffusion.cosine(), sigma=0.3),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def spaced(schedule, steps, low=LOW, high=HIGH):
    return diffusion.exponential(schedule, steps=steps, low=low, high=high, end="least")


def data(count=4):
    return 0.8 * jax.random.normal(jax.random.key(1), (count, 2), jnp.float64)


def end(grid):
    return Noise(*(v[-1] for v in grid.noise))


def truth(x, grid):
    return THREE.log_density(x, end(grid))


# Runs from the mixture's own law at the most noise: what is left is the method's error.
@ft.partial(jit, static_argnums=(1,), static_argnames=("method", "steps"))
def estimate(x, name, *, steps, method="rk4"):
    grid = spaced(SCHEDULES[name], steps)
    given = {"exact": True, "method": method, "prior": THREE.log_density}
    return diffusion.log_likelihood(THREE.denoise, x, grid, **given)


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("rk4", 4)])
def test_it_converges_to_the_density_of_a_mixture(method, order):
    x, errors = data(), []
    for steps in (150, 300):
        found = estimate(x, "vp", steps=steps, method=method)
        off = found.log_p - truth(x, spaced(SCHEDULES["vp"], 1))
        errors.append(float(jnp.abs(off).max()))
        assert found.nfe == order * steps
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.2, errors
    assert errors[1] < (2e-3 if order == 2 else 1e-6)


def test_every_schedule_gives_one_density():
    """Of the noisy sample over alpha, all have the same ODE."""
    first = None
    for name, schedule in SCHEDULES.items():
        levels = spaced(schedule, 20).noise.alpha
        out = estimate(levels[-1] * data(), name, steps=20)
        found = out.log_p + 2 * math.log(levels[-1]), out.z / levels[0]
        first = first or found
        for value, want in zip(found, first, strict=True):
            np.testing.assert_allclose(value, want, rtol=0, atol=1e-9)


def test_the_default_prior():
    """Of Gaussian data, in closed form: the one error is to call the end pure noise."""
    variance, d = 0.6, 3
    x = jax.random.normal(KEY, (4, d), jnp.float64)

    def denoise(x, noise, cond):
        a, s = noise.alpha, noise.sigma
        return a * variance / (a**2 * variance + s**2) * x

    grid = spaced(diffusion.vp(), 200)
    found = diffusion.log_likelihood(denoise, x, grid, exact=True, method="rk4")
    (a, s), (b, r) = (
        (n.alpha, n.sigma) for n in (Noise(*(v[0] for v in grid.noise)), end(grid))
    )
    first, last = b**2 * variance + r**2, a**2 * variance + s**2
    z = x * math.sqrt(last / first)
    np.testing.assert_allclose(found.z, z, rtol=1e-6)
    want = -jnp.sum(z**2, -1) / (2 * s**2) - d / 2 * math.log(2 * math.pi * s**2)
    want = want + d / 2 * math.log(last / first)
    np.testing.assert_allclose(found.log_p, want, rtol=0, atol=1e-6)


def bend(x, noise, cond=None):
    """A denoiser that mixes its coordinates and is of no density."""
    a, s, turn = (
        jnp.asarray(v, x.dtype)
        for v in (noise.alpha, noise.sigma, [[0.5, 0.3], [-0.2, 0.4]])
    )
    return jnp.tanh(a * x @ turn) / (1 + s)


def test_the_exact_trace_is_that_of_the_jacobian():
    """Heun's steps of the flow and of the divergence, in NumPy's loop."""
    grid, x = spaced(diffusion.vp(), 3), data(1)
    found = diffusion.log_likelihood(bend, x, grid, exact=True, method="heun")
    at = np.log(diffusion.ratios(grid))[::-1]
    u, total = x[0] / end(grid).alpha, 0.0

    def field(u, log):
        t = diffusion.vp().time(jnp.exp(log))
        noise = Noise(t, diffusion.vp().alpha(t), diffusion.vp().sigma(t))
        slope = lambda u: u - bend((noise.alpha * u)[None], noise)[0]
        return slope(u), jnp.trace(jax.jacfwd(slope)(u))

    field = jit(field)
    for log, after in it.pairwise(at):
        h = after - log
        slope, spread = field(u, log)
        other, more = field(u + h * slope, after)
        u, total = u + h / 2 * (slope + other), total + h / 2 * (spread + more)
    alpha, sigma = grid.noise.alpha[0], grid.noise.sigma[0]
    prior = -jnp.sum((alpha * u / sigma) ** 2) / 2 - math.log(2 * math.pi * sigma**2)
    want = prior + total + 2 * math.log(alpha / end(grid).alpha)
    np.testing.assert_allclose(found.z[0], alpha * u, rtol=1e-12)
    np.testing.assert_allclose(found.log_p[0], want, rtol=1e-12)


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_probes_are_unbiased(probe):
    grid, x, count = spaced(diffusion.vp(), 8), data(1), 4000
    every = jnp.broadcast_to(x, (count, 2))
    run = jit(
        ft.partial(diffusion.log_likelihood, bend, grid=grid, probe=probe),
        static_argnames=("probes", "exact"),
    )
    want = run(x, exact=True).log_p[0]
    one, four = (np.asarray(run(every, key=KEY, probes=n).log_p) for n in (1, 4))
    for found in (one, four):
        assert found.std() > 1e-3
        assert abs(found.mean() - want) < 4 * found.std() / math.sqrt(count)
    assert abs(one.var() / four.var() / 4 - 1) < 0.2


def test_signs_see_a_diagonal_exactly():
    """One probe of a standard normal law: the flow moves nothing."""
    standard = lambda x, noise, cond: x * noise.alpha
    grid, x = spaced(diffusion.vp(), 100), data()
    run = jit(
        lambda x: diffusion.log_likelihood(standard, x, grid, key=KEY, method="rk4")
    )
    found = run(x)
    np.testing.assert_allclose(found.z, x, rtol=1e-6)
    want = -jnp.sum(x**2, -1) / 2 - math.log(2 * math.pi)
    left = 1 - grid.noise.sigma[0] ** 2  # of the data, which the prior leaves out
    np.testing.assert_allclose(found.log_p, want, rtol=0, atol=5 * left)


def test_no_sample_depends_on_another():
    grid, x = spaced(diffusion.flow(), 4), data()
    run = jit(lambda x, key: diffusion.log_likelihood(bend, x, grid, key=key))
    every, few = run(x, KEY), run(x[:2], KEY)
    np.testing.assert_allclose(every.log_p[:2], few.log_p, rtol=1e-12)
    keys = jax.vmap(ft.partial(jax.random.fold_in, KEY))(jnp.arange(4))
    np.testing.assert_array_equal(run(x, keys).log_p, every.log_p)
    there, back = (ode.stages(g, "rk4") for g in (grid, diffusion.reverse(grid)))
    jax.tree.map(np.testing.assert_array_equal, there, back)


def test_transforms_state_and_half_precision():
    """The state runs along; cond is told; a slope goes through."""

    def apply(x, noise, cond, state):
        return bend(x, noise) + cond / (1 + state).astype(x.dtype), state + 1

    seen = Denoiser(lambda x, cond: jnp.zeros((), jnp.int32), apply)
    grid, cond = spaced(diffusion.vp(), 3), jnp.ones((4, 1), jnp.float32)

    def run(x, denoise=seen):
        told = cond.astype(x.dtype)
        return diffusion.log_likelihood(denoise, x, grid, key=KEY, cond=told)

    x, one = data().astype(jnp.float32), jit(run)
    out = one(x)
    assert out.log_p.dtype == jnp.float32
    fresh = lambda x, noise, cond: bend(x, noise) + cond
    assert np.abs(out.log_p - jit(lambda x: run(x, fresh))(x).log_p).max() > 1e-3
    half = one(x.astype(jnp.bfloat16))
    assert (half.log_p.dtype, half.z.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(half.log_p, out.log_p, rtol=0.05)
    slope = jit(jax.grad(lambda x: run(x).log_p.sum()))(x)
    step = jnp.zeros_like(x).at[0, 0].set(1e-2)
    near = (one(x + step).log_p - one(x - step).log_p)[0] / 2e-2
    np.testing.assert_allclose(slope[0, 0], near, rtol=1e-2)


def plain(x, noise, cond):
    return x / 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "pass key="),
        ({"key": KEY, "probes": 0}, "1 probe or more"),
        ({"key": KEY, "probe": "uniform"}, "'rademacher' or 'normal'"),
        ({"exact": True, "method": "euler"}, "method must be"),
        ({"exact": True, "cond": jnp.ones((3, 1))}, "first axis must be the 2"),
        ({"exact": True, "denoise": lambda x, n, c: x[:, :1]}, "the denoiser gave"),
        ({"exact": True, "x": jnp.ones((2, 2), jnp.int32)}, "floating-point"),
        (
            {"exact": True, "grid": diffusion.columns([spaced(diffusion.vp(), 2)] * 2)},
            "without columns",
        ),
        (
            {"exact": True, "grid": diffusion.uniform(diffusion.flow(), steps=3)},
            "alpha is 0",
        ),
    ],
)
def test_what_it_refuses(given, message):
    first = {"denoise": plain, "x": jnp.ones((2, 2)), "grid": spaced(diffusion.vp(), 2)}
    with pytest.raises(ValueError, match=message):
        diffusion.log_likelihood(**first | given)


# --- bits ---


def test_bits_of_a_known_law():
    """A density flat in each bin costs the entropy of the bins."""
    pmf = np.random.default_rng(0).dirichlet(np.ones(16))
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)):
        log_p = np.log(pmf * 16 / (high - low))
        bits = diffusion.bits_per_dim(log_p, dims=1, bins=16, low=low, high=high)
        np.testing.assert_allclose(bits, -np.log2(pmf), rtol=1e-12)
    log_p = jnp.asarray([-1000.0, -2000.0])
    published = -log_p / math.log(2) / 784 + 7  # 8, and log2 of a slope of 1/2
    np.testing.assert_allclose(diffusion.bits_per_dim(log_p, dims=784), published)


def test_dequantised_data_keep_their_bins():
    x = jnp.tile(jnp.arange(8, dtype=jnp.uint8), (500, 1))
    found = diffusion.dequantise(x, key=KEY, bins=8, low=-2, high=2)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.floor((found + 2) * 2), x)
    inside = np.asarray((found + 2) * 2 - x.astype(jnp.float32))
    assert abs(inside.mean() - 0.5) < 4 * math.sqrt(1 / 12 / inside.size)
    assert abs(inside.var() - 1 / 12) < 0.005


def test_bits_of_nothing():
    for given in ({"dims": 0}, {"dims": 1, "bins": 0}, {"dims": 1, "low": 1.0}):
        with pytest.raises(ValueError, match="low < high"):
            diffusion.bits_per_dim(0.0, **given)


# --- inversion ---


@pytest.mark.parametrize(
    ("solver", "order"),
    [(diffusion.ddim(), 1), (diffusion.heun(), 2), (diffusion.dpmpp(), 2)],
    ids=["ddim", "heun", "dpmpp"],
)
def test_inversion_and_back(solver, order):
    """Encode, decode: both and the round trip err as the solver's order says."""
    x, there, back = jnp.asarray(THREE.means) + 0.1, [], []
    run = jit(ft.partial(diffusion.sample, THREE.denoise, solver=solver))
    want = np.asarray(encoded())
    for steps in (160, 320):
        grid = spaced(diffusion.edm(), steps)
        z = run(x, solver.plan(diffusion.reverse(grid))).x
        there.append(float(jnp.abs(z - want).max()))
        back.append(float(jnp.abs(run(z, solver.plan(grid)).x - x).max()))
    for errors in (there, back):
        assert np.log2(errors[0] / errors[1]) > order - 0.2, (there, back)
    assert back[1] < (2e-2 if order == 1 else 1e-3), back


@ft.cache
def encoded():
    return exact(THREE, jnp.asarray(THREE.means) + 0.1, LOW, HIGH)


# --- adaptive steps ---


def test_adaptive_steps_both_ways():
    """The error follows the tolerance; what is counted is what was run."""
    pytest.importorskip("diffrax")
    x, schedule, calls = jnp.asarray(THREE.means) + 0.1, diffusion.vp(), []
    low, high = (float(schedule.time(np.float64(s))) for s in (LOW, HIGH))
    a, b = (float(schedule.alpha(np.float64(t))) for t in (low, high))

    def counted(x, noise, cond):
        one = jax.ShapeDtypeStruct((), x.dtype)
        add = lambda _: calls.append(1) or np.zeros((), x.dtype)
        zero = jax.experimental.io_callback(add, one, noise.t)
        return THREE.denoise(x, noise) + zero

    def run(denoise, x, start, stop, tolerance, most=4096):
        more = {"rtol": tolerance, "atol": tolerance, "most": most}
        ends = {"start": start, "stop": stop}
        flow = ft.partial(diffusion.probability_flow, denoise, schedule=schedule)
        return jit(lambda x: flow(x, **ends, **more))(x)

    z = run(THREE.denoise, a * x, low, high, 1e-8)
    np.testing.assert_allclose(z.x / b, encoded(), rtol=0, atol=1e-6)
    back = run(counted, z.x[:1], high, low, 1e-4)
    jax.effects_barrier()
    assert len(calls) == back.nfe < z.nfe / 2
    np.testing.assert_allclose(back.x / a, x[:1], rtol=0, atol=1e-3)
    assert np.isnan(run(THREE.denoise, z.x, high, low, 1e-8, most=3).x).all()


def test_what_adaptive_steps_refuse():
    pytest.importorskip("diffrax")
    run = ft.partial(diffusion.probability_flow, plain, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="tolerances"):
        run(diffusion.vp(), rtol=0.0)
    with pytest.raises(ValueError, match="are not 0"):
        run(diffusion.flow())
    with pytest.raises(ValueError, match="first axis"):
        run(diffusion.vp(), cond=jnp.ones((3, 1)))
