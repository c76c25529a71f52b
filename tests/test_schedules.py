"""Schedules against their own derivatives, and grids against closed forms."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers import BETAS, EDM, FLOW, GRIDS, SCHEDULES

from jaxlab import diffusion

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
VP = SCHEDULES["vp"]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def times(schedule):
    """Within the span, off the kinks of a discrete schedule."""
    least, most = schedule.span
    return least + (most - least) * np.array([0.013, 0.21, 0.5004, 0.77, 0.9871])


def every(schedule, t):
    return [f(t) for f in schedule[:4]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_drift_and_diffusion_are_the_slopes_of_alpha_and_sigma(name):
    schedule = SCHEDULES[name]

    @jit
    @jax.vmap
    def slopes(t):
        log = jax.grad(lambda t: jnp.log(schedule.alpha(t)))(t)
        return log, jax.grad(lambda t: schedule.sigma(t) ** 2)(t)

    t = times(schedule)
    alpha, sigma, drift, diffusion_ = every(schedule, t)
    log, square = slopes(jnp.asarray(t))
    np.testing.assert_allclose(drift, log, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(diffusion_, square - 2 * drift * sigma**2, rtol=1e-10)
    assert (diffusion_ > 0).all()
    assert (alpha > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_inverts_the_ratio(name):
    schedule = SCHEDULES[name]
    t = np.append(times(schedule), schedule.span[0])
    ratio = schedule.sigma(t) / schedule.alpha(t)
    np.testing.assert_allclose(schedule.time(ratio), t, rtol=1e-12, atol=1e-12)
    noise = diffusion.from_ratios(schedule, np.sort(ratio)[::-1]).noise
    np.testing.assert_allclose(noise.ratio, np.sort(ratio)[::-1], rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_host_and_a_program_agree(name):
    """Also in float32, and for one number."""
    schedule = SCHEDULES[name]
    t = times(schedule)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    program = jit(lambda t, ratio: (*every(schedule, t), schedule.time(ratio)))
    want = (*every(schedule, t), t)
    for dtype, rtol in ((jnp.float64, 1e-13), (jnp.float32, 3e-4)):
        got = program(jnp.asarray(t, dtype), jnp.asarray(ratio, dtype))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a, b, rtol=rtol)
    for i in (0, 4):
        one = every(schedule, t[i])
        np.testing.assert_allclose(one, [v[i] for v in want[:4]], rtol=1e-15)


@pytest.mark.parametrize("name", ["ou", "sub_vp", "scaled", "cosine", "ve"])
def test_moments_are_those_of_the_sde(name):
    """dm = f m dt and dv = (2 f v + g^2) dt, integrated by Runge and Kutta."""
    schedule = SCHEDULES[name]
    a, b, steps = *times(schedule)[[1, 3]], 2000

    def slope(t, moments):
        m, v = moments
        f, g2 = schedule.drift(t), schedule.diffusion(t)
        return np.array([f * m, 2 * f * v + g2])

    x, h = np.array([schedule.alpha(a), schedule.sigma(a) ** 2]), (b - a) / steps
    for i in range(steps):
        t = a + i * h
        k = slope(t, x)
        l = slope(t + h / 2, x + h / 2 * k)
        m = slope(t + h / 2, x + h / 2 * l)
        x = x + h / 6 * (k + 2 * l + 2 * m + slope(t + h, x + h * m))
    want = schedule.alpha(b), schedule.sigma(b) ** 2
    np.testing.assert_allclose(x, want, rtol=1e-10)


def test_formulas_of_the_papers():
    t = np.array([0.1, 0.6, 1.0])
    area = 0.1 * t + 19.9 * t**2 / 2
    sub = SCHEDULES["sub_vp"]
    np.testing.assert_allclose(sub.alpha(t), np.exp(-area / 2), rtol=1e-14)
    np.testing.assert_allclose(sub.sigma(t), 1 - np.exp(-area), rtol=1e-14)
    np.testing.assert_allclose(VP.sigma(t) ** 2, 1 - np.exp(-area), rtol=1e-14)
    k, gamma = 10.0, 1.5  # SGMSE+'s defaults
    size = 0.05**2 * np.log(k) / (gamma + np.log(k))
    want = size * (k ** (2 * t) - np.exp(-2 * gamma * t))
    np.testing.assert_allclose(SCHEDULES["ou"].sigma(t) ** 2, want, rtol=1e-13)
    np.testing.assert_allclose(SCHEDULES["ve"].sigma(t), 0.01 * 5000**t, rtol=1e-13)
    s = SCHEDULES["scaled"]
    np.testing.assert_allclose(s.diffusion(t) / -s.drift(t), 2 * 0.3**2, rtol=1e-14)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_discrete_schedules_are_running_products(kind):
    betas = diffusion.beta_schedule(kind, steps=400)
    schedule, t = diffusion.discrete(betas), np.arange(400)
    products = np.cumprod(1 - betas)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, products, rtol=1e-11)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - products, rtol=1e-10)
    assert schedule.span == (0.0, 399.0)
    between = np.log(schedule.sigma(7.25) / schedule.alpha(7.25))
    at = np.log(schedule.sigma(t) / schedule.alpha(t))
    np.testing.assert_allclose(between, 0.75 * at[7] + 0.25 * at[8], rtol=1e-12)


def test_ends_where_nothing_of_the_sample_or_of_the_noise_is_left():
    cosine = diffusion.cosine(t_max=1.0)
    for schedule in (cosine, FLOW):
        one = np.float64(1)
        assert (schedule.alpha(one), schedule.sigma(one)) == (0, pytest.approx(1))
        assert schedule.drift(one) == -np.inf
        assert schedule.diffusion(one) == np.inf
        assert schedule.time(np.float64(np.inf)) == pytest.approx(1)
        assert schedule.time(jnp.float64(jnp.inf)) == pytest.approx(1)
        assert jnp.isinf(schedule.drift(jnp.float64(1)))
    for name in ("cosine", "flow", "vp", "sub_vp", "ou", "edm", "scaled_linear"):
        schedule, zero = SCHEDULES[name], np.float64(0)
        assert (schedule.alpha(zero), schedule.sigma(zero)) == (1, 0)
        assert schedule.time(zero) == pytest.approx(0, abs=1e-17)
    last = diffusion.from_ratios(SCHEDULES["ve"], [3, 1, 0]).noise  # log 0 is no time
    assert [v[-1] for v in last] == [0, 1, 0]


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_is_of_float64_and_runs_one_way(name):
    noise = GRIDS[name]().noise
    assert all(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in noise)
    change = np.diff(np.arctan2(noise.sigma, noise.alpha), axis=0)
    assert (change >= 0).all() or (change <= 0).all()
    assert (noise.sigma[0] > 0).all()


def test_levels_of_the_papers():
    i = np.arange(9) / 8
    root = 80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    karras = diffusion.karras(EDM, steps=8, end="least")
    np.testing.assert_allclose(karras.noise.sigma, root**7, rtol=1e-13)
    closed = diffusion.karras(EDM, steps=9)
    np.testing.assert_allclose(closed.noise.sigma, np.append(root**7, 0), rtol=1e-13)
    same = diffusion.karras(VP, steps=8, end="least", low=0.002, high=80.0)
    np.testing.assert_allclose(diffusion.ratios(same), root**7, rtol=1e-11)
    even = diffusion.exponential(EDM, steps=8, end="least")
    np.testing.assert_allclose(np.diff(np.log(even.noise.sigma)), np.log(2.5e-5) / 8)
    bent = diffusion.exponential(EDM, steps=8, end="least", power=3.0)
    want = np.log(0.002) + (1 - i) ** 3 * np.log(40000)
    np.testing.assert_allclose(np.log(bent.noise.sigma), want, rtol=1e-12, atol=1e-12)
    steady = diffusion.uniform(VP, steps=8, end="least").noise.t
    np.testing.assert_allclose(steady, 1 + i * (1e-3 - 1), rtol=1e-14)
    np.testing.assert_array_equal(diffusion.uniform(VP, steps=8).noise.t, 1 - i)
    ve = diffusion.uniform(SCHEDULES["ve"], steps=5).noise  # least noise, then none
    np.testing.assert_allclose(ve.sigma, [50, 50 * 5e3**-0.25, 50 * 5e3**-0.5,
        50 * 5e3**-0.75, 0.01, 0], rtol=1e-12)  # fmt: skip


@pytest.mark.parametrize("steps", [7, 20, 30, 150, 999, 1000])
def test_each_timestep_ends_where_the_next_begins(steps):
    schedule = SCHEDULES["discrete"]
    t = diffusion.timesteps(schedule, steps=steps).noise.t
    want = np.round(1000 - np.arange(steps) * 1000 / steps) - 1
    np.testing.assert_array_equal(t, np.append(want, 0))
    assert len(np.unique(want)) == steps
    noise = diffusion.timesteps(schedule, steps=steps).noise
    np.testing.assert_allclose(
        noise.alpha[:-1] ** 2, np.cumprod(1 - BETAS)[want.astype(int)]
    )
    assert [v[-1] for v in noise] == [0, 1, 0]


def test_spacings_of_timesteps():
    steps = ft.partial(diffusion.timesteps, SCHEDULES["discrete"], end="least")
    lead = steps(steps=3, spacing="leading", offset=1).noise.t
    np.testing.assert_array_equal(lead, [667, 334, 1, 0])
    np.testing.assert_array_equal(steps(steps=4, spacing="leading").noise.t,
        [750, 500, 250, 0])  # fmt: skip
    even = steps(steps=3, spacing="linspace").noise.t
    np.testing.assert_array_equal(even, [999, 499.5, 0])
    one = diffusion.timesteps(SCHEDULES["discrete"], steps=1, spacing="linspace")
    np.testing.assert_array_equal(one.noise.t, [999, 0])


def test_a_shift_is_that_of_the_flow():
    grid = diffusion.uniform(FLOW, steps=6)
    t = grid.noise.t
    got = diffusion.shift(grid, factor=3.0).noise
    np.testing.assert_allclose(got.t, 3 * t / (1 + 2 * t), rtol=1e-14)
    np.testing.assert_allclose((got.alpha[0], got.sigma[-1]), 0)
    same = diffusion.shift(grid, factor=1.0).noise
    np.testing.assert_allclose(same.t, t, rtol=1e-14)
    of = diffusion.uniform(VP, steps=6, end="least")
    twice = diffusion.ratios(diffusion.shift(of, factor=2.0))
    np.testing.assert_allclose(twice, 2 * diffusion.ratios(of), rtol=1e-12)


def test_reversed_and_joined_grids():
    grid = diffusion.karras(EDM, steps=4)
    back = diffusion.reverse(grid).noise.sigma
    np.testing.assert_array_equal(back, grid.noise.sigma[-2::-1])
    least = diffusion.karras(EDM, steps=4, end="least")
    there = diffusion.reverse(diffusion.reverse(least))
    np.testing.assert_array_equal(there.noise.sigma, least.noise.sigma)
    joined = diffusion.columns([grid, diffusion.karras(EDM, steps=2)]).noise.sigma
    assert joined.shape == (5, 2)
    np.testing.assert_array_equal(joined[:, 0], grid.noise.sigma)
    np.testing.assert_allclose(joined[:, 1], [80, 0.002, 0, 0, 0])


DISCRETE = SCHEDULES["discrete"]
ONCE = "its noise must fall"
BAD = [
    (lambda: diffusion.from_times(FLOW, []), "two levels or more"),
    (lambda: diffusion.from_times(FLOW, [1.0]), "two levels or more"),
    (lambda: diffusion.from_times(FLOW, 1.0), "two levels or more"),
    (lambda: diffusion.from_times(FLOW, [1, 0.4, 0.6, 0]), f"levels 1 and 2 .*{ONCE}"),
    (lambda: diffusion.from_times(FLOW, [0.4, 0.6, 0.5]), f"levels 1 and 2 .*{ONCE}"),
    (lambda: diffusion.from_times(FLOW, [1, 0.5, 0.5]), "none may stand twice"),
    (lambda: diffusion.from_ratios(EDM, [3, 1, 0, 0]), "none may stand twice"),
    (lambda: diffusion.from_times(FLOW, [[1, 1], [0.5, 1], [0, 0]]), "levels 0 and 1"),
    (lambda: diffusion.from_times(FLOW, [0, 0.5]), "first level .* has no noise"),
    (lambda: diffusion.from_ratios(EDM, [0, 1]), "first level .* has no noise"),
    (lambda: diffusion.from_ratios(EDM, [-1, 0]), "first level .* has no noise"),
    (lambda: diffusion.from_ratios(EDM, [2, -1]), "negative alpha or sigma"),
    (lambda: diffusion.from_times(FLOW, [1.5, 0.5]), "negative alpha or sigma"),
    (lambda: diffusion.from_times(FLOW, [1, np.nan, 0]), r"level \[1\] .* not finite"),
    (lambda: diffusion.from_ratios(EDM, [np.inf, 1]), r"level \[0\] .* not finite"),
    (lambda: diffusion.karras(FLOW, steps=4), "high=inf; give them"),
    (lambda: diffusion.karras(EDM, steps=0), "steps must be at least 1, got 0"),
    (
        lambda: diffusion.karras(EDM, steps=1, end="least", low=3.0, high=2.0),
        "low < hi",
    ),
    (lambda: diffusion.karras(EDM, steps=4, low=np.nan), "0 < low < high"),
    (lambda: diffusion.karras(EDM, steps=4, end="last"), "end must be .* got 'last'"),
    (lambda: diffusion.exponential(EDM, steps=4, low=0.0), "0 < low < high"),
    (lambda: diffusion.uniform(EDM, steps=0), "steps must be at least 1, got 0"),
    (lambda: diffusion.uniform(EDM, steps=4, end="last"), "end must be .* got 'last'"),
    (lambda: diffusion.timesteps(DISCRETE, steps=1001), "from 1 to 1000, got 1001"),
    (lambda: diffusion.timesteps(DISCRETE, steps=4, spacing="even"), "got 'even'"),
    (lambda: diffusion.timesteps(DISCRETE, steps=4, end="last"), "got 'last'"),
    (
        lambda: diffusion.timesteps(DISCRETE, steps=1000, spacing="leading", offset=1),
        "offset 1 leaves the 1000 steps",
    ),
    (lambda: diffusion.shift(GRIDS["karras"](), factor=0.0), "factor must be above 0"),
    (lambda: diffusion.reverse(diffusion.karras(EDM, steps=1)), "two levels or more"),
    (lambda: diffusion.columns([]), "at least one grid"),
    (lambda: diffusion.columns([GRIDS["columns"]()]), "each of one axis"),
    (lambda: diffusion.edm(sigma_min=0.0), "0 < sigma_min < sigma_max"),
    (lambda: diffusion.ve(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
    (lambda: diffusion.vp(beta_min=np.nan), "0 < beta_min < beta_max"),
    (lambda: diffusion.cosine(t_max=1.1), "t_min < t_max <= 1"),
    (lambda: diffusion.ou(stiffness=-1.0), "stiffness must be at least 0"),
    (lambda: diffusion.scaled(VP, sigma=0.0), "sigma must be above 0"),
    (lambda: diffusion.discrete([0.1]), r"two numbers in \(0, 1\)"),
    (lambda: diffusion.discrete([0.1, 1.0]), r"two numbers in \(0, 1\)"),
    (lambda: diffusion.beta_schedule("sigmoid"), "kind must be .* got 'sigmoid'"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_levels_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
