"""Mean-reverting diffusion: MR Sampler, IR-SDE's schedules, SGMSE+'s sampler."""

import functools as ft
import itertools as it
import math

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from mixtures import THREE, exact
import numpy as np
import pytest

from jaxlab import diffusion
from jaxlab.types import Noise, Solver

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
MU = np.array([[0.4, -0.7]])
MEAN, VARIANCE = 0.6, 0.3
SETTLED = 0.7
VARIANTS = [(p, n) for p in ("x0", "eps", "v") for n in (1, 2)]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def schedule(kind="cosine"):
    return diffusion.mean_reverting(kind, sigma=SETTLED)


def spaced(steps, low=0.02, high=20.0, end="least"):
    given = {"steps": steps, "low": low, "high": high, "end": end}
    return diffusion.exponential(schedule(), **given)


def start(grid, count=6):
    noise = jax.random.normal(jax.random.key(1), (count, 2), jnp.float64)
    return grid.noise.sigma[0] * noise


@ft.cache
def draws(shape, steps):
    """What the sampler draws at each step."""
    keys = jax.vmap(ft.partial(jax.random.fold_in, KEY))(jnp.arange(shape[0]))
    fold = lambda key, i: jax.random.fold_in(jax.random.fold_in(key, i), 0)
    one = lambda key, i: jax.random.normal(fold(key, i), shape[1:], jnp.float64)
    every = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
    return every(keys, jnp.arange(steps))


denoised = jax.jit(THREE.denoise)


# --- schedules ---


def released(kind, steps, end, sigma):
    """IR-SDE's alpha and sigma at its times 0 to T, from its theta and its dt."""
    if kind == "constant":
        theta = np.ones(steps + 1)
    elif kind == "linear":
        scale = 1000 / (steps + 1)
        theta = np.linspace(scale * 1e-4, scale * 0.02, steps + 1)
    else:
        grid = np.linspace(0, 1, steps + 3)
        whole = np.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
        theta = 1 - whole[1:-1] / whole[0]
    total = np.cumsum(theta)
    alpha = np.exp(total * math.log(end) / total[-1])
    return alpha, sigma * np.sqrt(1 - alpha**2)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_are_those_released(kind):
    for steps, end in ((100, 0.005), (7, 0.01)):
        made = diffusion.mean_reverting(kind, sigma=SETTLED, steps=steps, end=end)
        alpha, sigma = released(kind, steps, end, SETTLED)
        t = np.arange(steps + 1.0)
        np.testing.assert_allclose(made.alpha(t), alpha, rtol=1e-9)
        np.testing.assert_allclose(made.sigma(t), sigma, rtol=1e-9)
        assert made.span == (0.0, steps)


def test_what_drives_a_schedule_settles_at_its_sigma():
    made = schedule()
    t = np.array([3.3, 40.0, 88.8])
    np.testing.assert_allclose(
        made.diffusion(t) / -made.drift(t), 2 * SETTLED**2, rtol=1e-9
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "square"}, "kind must be"),
        ({"sigma": 0.0}, "sigma must be above 0"),
        ({"steps": 0}, "want a step"),
        ({"end": 1.0}, "end in"),
    ],
)
def test_schedules_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        diffusion.mean_reverting(**given)


# --- MR Sampler ---


def published(x, grid, order, sde, prediction):
    """The paper's updates of x itself, with their terms in mu."""
    mu, (t, alpha, sigma) = jnp.asarray(MU), grid.noise
    at = np.log(alpha / sigma)
    kept = []
    for i in range(len(t) - 1):
        a, b, s, r = alpha[i], alpha[i + 1], sigma[i], sigma[i + 1]
        h, n = at[i + 1] - at[i], draws(x.shape, len(t) - 1)[i]
        found = denoised(x - mu, Noise(t[i], a, s)) + mu
        if prediction == "eps":
            found = (x - mu - a * (found - mu)) / s
        kept = [found, *kept][:2]
        slope = 0.0
        if order == 2 and i:
            slope = (kept[0] - kept[1]) * h / (at[i] - at[i - 1])
        if prediction == "x0" and not sde:
            e = math.exp(-h)
            drift = b * (1 - e) * found + b * (1 - (1 - e) / h) * slope
            x = r / s * x + drift + mu * (1 - r / s + r / s * a - b)
        elif prediction == "x0":
            e = math.exp(-2 * h)
            drift = b * (1 - e) * found + b * (1 - (1 - e) / (2 * h)) * slope
            x = r / s * math.exp(-h) * x + drift + mu * (1 - b / a * e - b * (1 - e))
            x = x + r * math.sqrt(1 - e) * n
        else:
            e, c = math.exp(h) - 1, 1 + sde
            x = b / a * x + (1 - b / a) * mu - c * r * (e * found + (e / h - 1) * slope)
            x = x + r * math.sqrt(math.exp(2 * h) - 1) * n if sde else x
    return x


@pytest.mark.parametrize("sde", [False, True])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_updates_are_those_published(prediction, sde):
    grid = spaced(7)
    z = start(grid)
    denoise = diffusion.recentre(
        lambda x, noise, cond: THREE.denoise(x - MU, noise) + MU, mean=MU
    )
    for order in (1, 2):
        solver = diffusion.mrs(order=order, sde=sde, prediction=prediction)
        found = diffusion.sample(denoise, z, grid, solver=solver, key=KEY).x + MU
        want = published(z + MU, grid, order, sde, prediction)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-11)


def test_names_they_had_before():
    grid = spaced(6, end="zero")

    def same(ours, theirs):
        for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)

    for order in (1, 2):
        for sde in (False, True):
            theirs = diffusion.dpmpp(order=order, eta=float(sde), exact=True)
            same(diffusion.mrs(order=order, sde=sde).plan(grid), theirs.plan(grid))
        ours = diffusion.mrs(order=order, prediction="eps")
        same(ours.plan(grid), diffusion.deis(order=order).plan(grid))
    for eta in (0.0, 1.0):
        ours = diffusion.mrs(order=1, sde=eta > 0)
        same(ours.plan(grid), diffusion.ddim(eta=eta).plan(grid))
    midpoint = diffusion.dpmpp(order=2).plan(grid)  # 2M as published
    assert np.abs(diffusion.mrs().plan(grid).past - midpoint.past).max() > 1e-3


@pytest.mark.parametrize("sde", [False, True])
def test_a_velocity_that_is_a_line_in_the_angle(sde):
    """Only the first step, which knows no slope, is not exact."""
    v = lambda phi: 0.8 - 0.5 * phi
    angle = lambda noise: jnp.arctan2(noise.sigma / SETTLED, noise.alpha)

    def denoise(z, noise, cond):
        return noise.alpha * z - noise.sigma / SETTLED * v(angle(noise))

    grid = spaced(5, end="zero")
    phi = np.asarray(angle(grid.noise))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    solver = diffusion.mrs(sde=sde, prediction="v")
    z = moments(solver, denoise, grid, 0.3, 0.0)[0, 0]
    want = 0.3 * grid.noise.alpha[0] if sde else 0.3
    for i, (p, q) in enumerate(it.pairwise(phi)):
        at = (p + q) / 2 + (q - p) / 2 * nodes
        rate = v(at if i else np.full_like(at, p))
        rate = 2 * np.cos(at) * rate if sde else rate
        want += (q - p) / 2 * (rate @ weights)
    np.testing.assert_allclose(z, want, rtol=0, atol=1e-12)


def moments(solver, denoise, grid, mean, variance):
    """Mean and variance after a run of scalars, of which it is linear: `[b]` each."""
    mean, variance = np.atleast_1d(mean), np.atleast_1d(variance)
    x = jnp.asarray(mean)[:, None]
    first, back = ravel_pytree((x, solver.init(x)))
    evaluate = lambda x, noise, state: (denoise(x, noise, None), state)

    def step(flat, z, row):
        x, memory = back(flat)
        draw = lambda j: z[j]
        x, memory, _ = solver.step(evaluate, x, memory, None, row, draw)
        return ravel_pytree((x, memory))[0]

    def body(carry, row):
        (flat, spread), z = carry, jnp.zeros((104, *x.shape))
        by_state, by_noise = jax.jacfwd(step, (0, 1))(flat, z, row)
        by_noise = by_noise.reshape(len(flat), -1)
        spread = by_state @ spread @ by_state.T + by_noise @ by_noise.T
        return (step(flat, z, row), spread), None

    diagonal = jnp.zeros_like(first).at[: len(mean)].set(variance)
    rows = jax.tree.map(jnp.asarray, solver.plan(grid))
    run = jit(lambda *given: jax.lax.scan(body, *given)[0])
    flat, spread = run((first, jnp.diag(diagonal)), rows)
    return np.array([flat[: len(mean)], jnp.diag(spread)[: len(mean)]])


def gaussian(x, noise, cond=None):
    a, s = (jnp.reshape(v, (-1, 1)) for v in (noise.alpha, noise.sigma))
    return MEAN + VARIANCE * a / (a**2 * VARIANCE + s**2) * (x - a * MEAN)


def marginal(grid, i):
    a, s = grid.noise.alpha[i], grid.noise.sigma[i]
    return np.array([a * MEAN, a**2 * VARIANCE + s**2])


@pytest.mark.parametrize(("prediction", "order"), VARIANTS)
def test_order_of_the_law(prediction, order):
    """Of the SDE's mean and variance, propagated rather than sampled."""
    solver = diffusion.mrs(order=order, sde=True, prediction=prediction)
    grids = [spaced(steps) for steps in (80, 160, 320)]
    first, last = (np.transpose([marginal(g, i) for g in grids]) for i in (0, -1))
    found = moments(solver, gaussian, diffusion.columns(grids), *first)
    errors = np.abs(found - last).sum(0)
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (slopes > order - 0.1).all(), (errors, slopes)
    assert errors[-1] < (7e-3 if order == 1 else 1e-4)


@ft.cache
def flowed(high, low):
    return np.asarray(
        exact(THREE, start(spaced(1)) / spaced(1).noise.alpha[0], high, low)
    )


@pytest.mark.parametrize(("prediction", "order"), VARIANTS)
def test_order_of_the_flow(prediction, order):
    solver = diffusion.mrs(order=order, prediction=prediction)
    grids = [spaced(steps) for steps in (40, 80, 160)]
    x = start(grids[0])
    plan = solver.plan(diffusion.columns([g for g in grids for _ in x]))
    run = jit(ft.partial(diffusion.sample, THREE.denoise, solver=solver))
    found = np.asarray(run(jnp.tile(x, (3, 1)), plan).x).reshape(3, *x.shape)
    off = np.abs(found / grids[0].noise.alpha[-1] - flowed(20.0, 0.02))
    errors = np.median(off, (1, 2))
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (np.abs(slopes - order) < 0.2).all(), (errors, slopes)


def test_columns_and_half_precision():
    grids = [spaced(n, end="zero") for n in (3, 5)]
    solver = diffusion.mrs(sde=True, prediction="v")
    x = start(grids[0], 2)
    run = jit(ft.partial(diffusion.sample, THREE.denoise, solver=solver, key=KEY))
    both = run(x, solver.plan(diffusion.columns(grids))).x
    for j, grid in enumerate(grids):
        alone = run(x, solver.plan(grid)).x
        np.testing.assert_allclose(both[j], alone[j], rtol=0, atol=1e-11)
    half = run(x.astype(jnp.bfloat16), solver.plan(grids[1])).x
    assert half.dtype == jnp.bfloat16
    assert np.isfinite(half.astype(jnp.float32)).all()


def test_what_it_refuses():
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        diffusion.mrs(order=3)
    with pytest.raises(ValueError, match="prediction must be"):
        diffusion.mrs(prediction="score")
    for wrong in (diffusion.edm(), diffusion.flow(), diffusion.sub_vp()):
        grid = diffusion.exponential(wrong, steps=3, low=0.1, high=2.0)
        with pytest.raises(ValueError, match="constant"):
            diffusion.mrs(prediction="v").plan(grid)
    rising = diffusion.reverse(spaced(3))
    for prediction in ("eps", "v"):
        with pytest.raises(ValueError, match="sde must be"):
            diffusion.mrs(sde=True, prediction=prediction).plan(rising)


# --- SGMSE+ ---

NOISY, CLEAN, ADDED = 0.9, 0.5, 0.2  # what is heard; variances of speech and of noise
POSTERIOR = CLEAN / (CLEAN + ADDED) * NOISY, CLEAN * ADDED / (CLEAN + ADDED)


def enhance(z, noise, cond=None):
    """Of the clean speech given the noisy one, about the noisy one."""
    mean, variance = POSTERIOR[0] - NOISY, POSTERIOR[1]
    gain = variance * noise.alpha / (noise.alpha**2 * variance + noise.sigma**2)
    return mean + gain * (z - noise.alpha * mean)


def test_the_prior_is_about_the_noisy_speech():
    grid = diffusion.uniform(diffusion.ou(), steps=4)
    log = math.log(10)
    want = 0.05**2 * (100 - math.exp(-3)) * log / (1.5 + log)
    np.testing.assert_allclose(grid.noise.sigma[0] ** 2, want, rtol=1e-12)
    x = NOISY + diffusion.prior(KEY, (20_000, 1), grid)
    error = 4 * math.sqrt(want / len(x))
    assert abs(float(x.mean()) - NOISY) < error
    assert abs(float(x.var()) / want - 1) < 4 * math.sqrt(2 / len(x))


def test_the_predictor_is_released_reverse_diffusion():
    schedule = diffusion.ou()
    grid = diffusion.from_times(schedule, [0.8, 0.7])
    x, (t, a, s) = jnp.array([[1.3]]), (v[0] for v in grid.noise)
    z, n = x - NOISY, draws(x.shape, 1)[0]
    score = (a * enhance(z, Noise(t, a, s)) - z) / s**2
    rate = 0.05 * 10**t * math.sqrt(2 * math.log(10))
    drift, noise = 1.5 * (NOISY - x) * 0.1, rate * math.sqrt(0.1)
    want = x - (drift - noise**2 * score) + noise * n
    solver = diffusion.euler_maruyama()
    found = diffusion.sample(enhance, z, grid, solver=solver, key=KEY).x + NOISY
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_corrector_keeps_its_stationary_law(steps):
    """Near the marginal: its variance over 1 - (r sigma)^2 / variance."""
    still = Solver(
        plan=lambda grid: np.zeros(len(grid.noise.t) - 1),
        init=lambda x: (),
        step=lambda evaluate, x, memory, state, row, draw: (x, memory, state),
    )
    grid = diffusion.from_times(diffusion.ou(), [0.8, 0.5])
    mean, variance = marginal(grid, -1)
    variance = variance / (1 - (0.5 * grid.noise.sigma[-1]) ** 2 / variance)
    solver = diffusion.annealed_langevin(still, snr=0.5, steps=steps)
    found = moments(solver, gaussian, grid, mean, variance)
    np.testing.assert_allclose(found[:, 0], (mean, variance), rtol=1e-12)
    away = moments(solver, gaussian, grid, mean + 1, 2 * variance)
    assert 0 < away[0, 0] - mean < 1
    assert variance < away[1, 0] < 2 * variance


def strayed(solver, steps):
    """How far from the posterior's mean and variance, noised as the last level is."""
    grid = diffusion.from_times(diffusion.ou(), np.linspace(1, 0.01, steps + 1))
    a, s = grid.noise.alpha, grid.noise.sigma
    law = np.array([a * (POSTERIOR[0] - NOISY), a**2 * POSTERIOR[1] + s**2])
    return np.abs(moments(solver, enhance, grid, *law[:, 0])[:, 0] - law[:, -1])


def test_enhancement_reaches_the_posterior():
    """The corrector's own bias is small: it helps where steps are few."""
    plain, second = diffusion.euler_maruyama(), diffusion.mrs(sde=True)
    released = diffusion.annealed_langevin(plain, snr=0.5)
    few = {s: strayed(s, 30) for s in (plain, released)}
    assert (few[released] < 0.75 * few[plain]).all(), few
    assert (strayed(released, 1600) < 0.5 * few[released]).all()
    for solver, order in ((plain, 1), (second, 2)):
        errors = [strayed(solver, steps).sum() for steps in (200, 400)]
        assert errors[0] / errors[1] > 2 ** (order - 0.1), (order, errors)


def test_correctors_that_are_none():
    for given in ({"snr": 0.0}, {"steps": 0}):
        with pytest.raises(ValueError, match="snr above 0"):
            diffusion.annealed_langevin(diffusion.ddim(), **given)
