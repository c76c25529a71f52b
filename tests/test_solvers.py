"""Every solver: its measured order, its identities, and its ends."""

import functools as ft
import inspect
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
from mixtures import THREE, exact
import numpy as np
import pytest
from solvers import BEYOND, GRIDS, SCHEDULES, SOLVERS

from jaxlab import diffusion
from jaxlab.types import Grid, Schedule, Solver

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
POINTS = np.random.default_rng(0).standard_normal((64, 2))
VARIANCES = np.geomspace(0.01, 1, 24)
ODE = [n for n, row in SOLVERS.items() if row.order]
SDE = [n for n, row in SOLVERS.items() if row.weak]
FLOW = SCHEDULES["flow"]
PURE = {"edm": FLOW, "flow": FLOW, "vp": diffusion.cosine(t_max=1.0)}  # of no alpha
MEAN, VARIANCE = 0.7, 0.3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def own(kind):
    """The public functions that make something."""
    for name, value in vars(diffusion).items():
        if inspect.isfunction(value) and value.__annotations__.get("return") is kind:
            yield name


def test_every_solver_schedule_and_grid_has_a_row():
    assert set(own(Solver)) == {n.split("/")[0] for n in SOLVERS} | set(BEYOND)
    assert set(own(Schedule)) == set(SCHEDULES)
    assert set(own(Grid)) == set(GRIDS)
    root = Path(__file__).parents[1]
    assert all(name in (root / at).read_text() for name, at in BEYOND.items())
    for row in SOLVERS.values():
        assert (row.order is None) != (row.weak is None)


def normal_data(x, noise, cond):
    """The denoiser of centred normal coordinates."""
    a, s = noise.alpha[:, None], noise.sigma[:, None]
    return a * VARIANCES[None] / (a**2 * VARIANCES[None] + s**2) * x


@ft.cache
def program(name):
    """The samples of a solver, compiled for any grid of as many steps."""
    row = SOLVERS[name]
    denoise = normal_data if row.smooth else THREE.denoise
    run = lambda x, rows: diffusion.sample(denoise, x, rows, solver=row.make()).x
    return jit(run)


def both(make, name):
    """Two grids as columns, the one of twice as many steps as the other."""
    few = 160 if SOLVERS[name].smooth else 80
    return diffusion.columns([make(few), make(2 * few)])


def solved(name, make):
    """From one start: samples over alpha at the end of two grids."""
    row, grid = SOLVERS[name], both(make, name)
    over = lambda v: v.reshape(2, *[1] * (1 if row.smooth else 2))
    unit = np.ones((2, 24)) if row.smooth else np.broadcast_to(POINTS, (2, 64, 2))
    x = program(name)(over(grid.noise.sigma[0]) * unit, row.make().plan(grid))
    return np.asarray(x / over(grid.noise.alpha[-1]))


LOW, HIGH = 0.0292, 14.6146


def levels(schedule, name):
    """Grids from much noise to little; uniform in log s where the problem is smooth."""
    if SOLVERS[name].smooth:
        between = {"low": 0.1, "high": 1000.0, "end": "least"}
        return lambda n: diffusion.exponential(schedule, steps=n, **between)
    between = {"low": LOW, "high": HIGH, "end": "least"}
    return lambda n: diffusion.karras(schedule, steps=n, **between)


@ft.cache
def truth():
    return np.asarray(exact(THREE, jnp.asarray(HIGH * POINTS), HIGH, LOW))


@pytest.mark.parametrize("name", ODE)
def test_the_error_falls_by_the_stated_order(name):
    row = SOLVERS[name]
    x = solved(name, levels(SCHEDULES[row.schedule], name))
    if row.smooth:
        want = 1000 * np.sqrt((VARIANCES + 0.01) / (VARIANCES + 1e6))
        errors = np.median(np.abs(x / want - 1), -1)
    else:
        errors = np.median(np.linalg.norm(x - truth(), axis=-1), -1)
    assert errors[1] < (0.02 if row.order == 1 else 1e-3)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(row.order, abs=0.3)


@pytest.mark.parametrize("name", [n for n in ODE if SOLVERS[n].ratio])
def test_how_a_schedule_scales_its_samples_does_not_matter(name):
    """Only sigma / alpha does: the flow's ODE is the probability flow, too."""
    want = solved(name, levels(SCHEDULES["edm"], name))
    for schedule in ("vp", "flow", "sub_vp"):
        got = solved(name, levels(SCHEDULES[schedule], name))
        scale = 1e3 if SOLVERS[name].smooth else 1.0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * scale)


@ft.cache
def linear(name):
    """A solver's steps as what they are of normal data: maps of the start and noises.

    A sample is here the coefficients of `[start, 1, every draw]`, so that its mean and
    its variance are known without a draw.
    """
    solver = SOLVERS[name].make()

    def run(start, rows):
        count = jax.tree.leaves(rows)[0].shape[0]
        unit = lambda i: jax.nn.one_hot(i, 2 + 2 * count, dtype=float)[None]

        def evaluate(x, noise, state):
            a, s = noise.alpha[:, None], noise.sigma[:, None]
            k = a * VARIANCE / (a**2 * VARIANCE + s**2)
            return k * x + (1 - k * a) * MEAN * unit(1), state

        def step(carry, row):
            (x, memory), (row, i) = carry, row
            draw = lambda j: jnp.broadcast_to(unit(2 + 2 * i + j), x.shape)
            x, memory, _ = solver.step(evaluate, x, memory, (), row, draw)
            return (x, memory), None

        x = start[0][:, None] * MEAN * unit(1) + start[1][:, None] * unit(0)
        steps = rows, jnp.arange(count)
        return jax.lax.scan(step, (x, solver.init(x)), steps)[0][0]

    return jit(run)


def moments(name, make):
    """Mean and variance at the end of two grids, over those of the noisy data."""
    grid = both(make, name)
    spread = lambda i: grid.noise.alpha[i] ** 2 * VARIANCE + grid.noise.sigma[i] ** 2
    rows = jax.tree.map(jnp.asarray, SOLVERS[name].make().plan(grid))
    x = linear(name)((grid.noise.alpha[0], np.sqrt(spread(0))), rows)
    mean, rest = x[:, 1], jnp.delete(x, 1, axis=1)
    return mean / (grid.noise.alpha[-1] * MEAN), jnp.sum(rest**2, 1) / spread(-1)


@pytest.mark.parametrize("name", SDE)
def test_the_variance_converges_by_the_stated_weak_order(name):
    row = SOLVERS[name]
    make = levels(SCHEDULES[row.schedule], name)
    mean, variance = moments(name, make)
    off = np.abs(variance - 1)
    assert 1e-5 < off[1] < (0.05 if row.weak == 1 else 2e-3)
    assert np.log2(off[0] / off[1]) == pytest.approx(row.weak, abs=0.3)
    np.testing.assert_allclose(mean, 1, rtol=0, atol=1e-13 if row.ratio else off.min())
    again = moments(name, levels(SCHEDULES["vp"], name))[1]
    if row.ratio:
        np.testing.assert_allclose(again, variance, rtol=1e-11)
    else:
        assert np.log2(np.abs(again[0] - 1) / np.abs(again[1] - 1)) > 0.8


@pytest.mark.parametrize("name", SOLVERS)
def test_runs_end_clean_and_start_where_nothing_is_left(name):
    row = SOLVERS[name]
    near = lambda n: diffusion.karras(
        SCHEDULES[row.schedule], steps=n, low=0.01, high=50.0
    )
    ends = solved if row.order else lambda *given: moments(*given)[1] * VARIANCE
    x = ends(name, near)
    assert np.isfinite(x).all()
    if row.order and not row.smooth:  # on the data: nearly all within it
        assert np.abs(x).max() < 2.5
    if row.pure:
        x = ends(name, lambda n: diffusion.uniform(PURE[row.schedule], steps=n))
        assert np.isfinite(x).all()
    else:
        with pytest.raises(ValueError, match="cannot serve a level where alpha is 0"):
            row.make().plan(diffusion.uniform(PURE[row.schedule], steps=4))


@pytest.mark.parametrize("name", SOLVERS)
def test_noise_that_rises_inverts_or_is_refused(name):
    row = SOLVERS[name]
    back = lambda n: diffusion.reverse(levels(SCHEDULES[row.schedule], name)(n))
    if row.weak and name != "heun/churn":
        with pytest.raises(ValueError, match="must be 0 where noise rises"):
            row.make().plan(back(4))
    if row.order is None:
        return
    plans = [row.make().plan(back(n)) for n in (80, 160)]
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(plans))
    if row.pure:
        whole = diffusion.reverse(diffusion.uniform(PURE[row.schedule], steps=4))
        assert all(
            np.isfinite(v).all() for v in jax.tree.leaves(row.make().plan(whole))
        )


def test_solvers_of_order_1_are_one():
    """DDIM, Euler in sigma / alpha, Euler of the flow, DPM-Solver++ 1."""
    grid = diffusion.karras(
        SCHEDULES["edm"], steps=160, low=LOW, high=HIGH, end="least"
    )
    x, s = jnp.asarray(HIGH * POINTS), grid.noise.sigma
    for a, b in itertools.pairwise(s):
        noise = diffusion.level(SCHEDULES["edm"], jnp.float64(a))
        x = x + (b - a) / a * (x - THREE.denoise(x, noise))
    for name, schedule in (("ddim", "vp"), ("dpmpp/1", "edm"), ("flow_euler", "flow")):
        got = solved(name, levels(SCHEDULES[schedule], name))[1]
        np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)


def test_coefficients_that_are_the_same():
    grid = diffusion.karras(SCHEDULES["vp"], steps=9, low=0.05, high=20.0)
    close = ft.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    equal = lambda a, b: jax.tree.map(close, a.plan(grid), b.plan(grid))
    equal(diffusion.ddim(), diffusion.dpmpp(order=1))
    equal(diffusion.ddim(eta=1.0), diffusion.dpmpp(order=1, eta=1.0))
    equal(diffusion.ddpm(), diffusion.ddim(eta=1.0))
    equal(diffusion.deis(order=1), diffusion.lms(order=1))
    equal(diffusion.dpmpp_sde(eta=0.0), diffusion.dpmpp_2s())
    equal(diffusion.mrs(), diffusion.dpmpp(exact=True))
    for order in (2, 3):
        none = diffusion.dpmpp(order=order, eta=1e-13).plan(grid)._replace(spread=0)
        plain = diffusion.dpmpp(order=order).plan(grid)._replace(spread=0)
        jax.tree.map(close, none, plain)
    churned, plain = (diffusion.heun(churn=c).plan(grid) for c in (1e-13, 0.0))
    rest = {"lift": None, "churn": None}
    jax.tree.map(ft.partial(close, rtol=1e-9), churned._replace(**rest), plain)
    close(churned.churn, 0, atol=1e-5)
    unipc = diffusion.unipc(corrector=False).plan(grid)  # as released: 2M
    multistep = diffusion.dpmpp(order=2).plan(grid)
    close(unipc.keep, multistep.keep[:, 0])
    close(unipc.first, multistep.stage[:, 0, 0])
    close(unipc.past, multistep.past[:, 0])


def test_ddpm_is_the_posterior_of_the_forward_steps():
    betas = diffusion.beta_schedule("linear", steps=20)
    grid = diffusion.timesteps(diffusion.discrete(betas), steps=20)
    betas, product = betas[::-1], np.cumprod(1 - betas)[::-1]
    before = np.append(product[1:], 1)  # alpha-bar of the step before
    small, large = (diffusion.ddpm(variance=v).plan(grid) for v in ("small", "large"))
    close = ft.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-15)
    close(small.keep[:, 0], np.sqrt(1 - betas) * (1 - before) / (1 - product))
    close(small.stage[:, 0, 0], np.sqrt(before) * betas / (1 - product))
    variance = betas * (1 - before) / (1 - product)
    close(small.spread[:, 0, 0] ** 2, variance, atol=1e-14)
    close(large.spread[:-1, 0, 0] ** 2, betas[:-1], rtol=1e-9)
    assert large.spread[-1] == 0


@pytest.mark.parametrize("name", ["ddim", "dpmpp/2", "heun", "unipc/2/bh2", "dpmpp_2s"])
def test_an_inverted_sample_comes_back(name):
    """By the solver's order; the one of order 1 hardly."""
    row, forth = SOLVERS[name], levels(SCHEDULES["edm"], name)
    grids = diffusion.columns([forth(n) for n in (80, 160)])
    flat = [diffusion.reverse(forth(n)) for n in (80, 160)]
    run, plan = program(name), row.make().plan
    noisy = run(np.broadcast_to(truth(), (2, 64, 2)), plan(diffusion.columns(flat)))
    x = run(noisy, plan(grids))
    off = np.median(np.linalg.norm(np.asarray(x) - truth(), axis=-1), -1)
    assert off[1] < (0.03 if row.order == 1 else 2e-3)
    assert np.log2(off[0] / off[1]) > row.order - 0.35
