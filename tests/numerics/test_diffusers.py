"""The samplers of diffusers 0.42.1 and k-diffusion 0.1.1, through ours that agree.

diffusers keeps its levels in float32, and much of its arithmetic: that is what is left
between it and us. k-diffusion computes in float64, as asked.
"""

import functools as ft
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from mixtures import THREE, exact
import numpy as np
import pytest

from jaxlab import diffusion

GOLDEN = np.load(Path(__file__).with_name("diffusers.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
START = GOLDEN["start"]
VP, EDM, FLOW = diffusion.vp(), diffusion.edm(), diffusion.flow()
PRODUCTS = np.append(1.0, np.float64(GOLDEN["products/stable"]))  # theirs: float32
DISCRETE = diffusion.discrete(1 - PRODUCTS[1:] / PRODUCTS[:-1])
STEPS = ft.partial(diffusion.timesteps, DISCRETE)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def replay(solver, grid, noises=None, start=None):
    """A solver's steps with recorded noise, one by one: too few to be compiled."""
    plan, x = solver.plan(grid), grid.noise.sigma[0] * START if start is None else start
    evaluate = lambda x, noise, state: (THREE.denoise(x, noise), state)
    x = jnp.asarray(x)
    memory = solver.init(x)
    with jax.disable_jit():
        for i in range(len(grid.noise.t) - 1):
            row = jax.tree.map(lambda v, i=i: v[i], plan)
            draw = lambda j, i=i: noises[i].reshape(-1, 16, 2)[j]
            x, memory, _ = solver.step(evaluate, x, memory, (), row, draw)
    return np.asarray(x)


def sigmas(name):
    """The levels that a peer took, some of which it lists twice, and no noise."""
    return np.unique(np.append(0, GOLDEN[f"{name}/sigmas"]))[::-1]


def ratios(schedule, name):
    return diffusion.from_ratios(schedule, sigmas(name))


def flows(name):
    return diffusion.from_times(FLOW, sigmas(name))


def splice(order):
    """3M as k-diffusion begins it: its second step by the exact line."""
    solver, line = (
        diffusion.dpmpp(order=n, eta=1.0, exact=n == 2) for n in (order, order - 1)
    )

    def plan(grid):
        rows, other = solver.plan(grid), line.plan(grid)
        past = rows.past.copy()
        past[1], rows.stage[1] = np.append(other.past[1], [[0.0]], 1), other.stage[1]
        return rows._replace(past=past)

    return solver._replace(plan=plan)


# name: (ours, on the levels it took, which of its samples, tolerance)
OURS = {
    "euler": (diffusion.ddim(), ratios(EDM, "euler"), "final", 3e-6),
    "euler_a": (diffusion.ddim(eta=1.0), ratios(EDM, "euler_a"), "final", 1e-5),
    "heun": (diffusion.heun(), ratios(EDM, "heun"), "final", 1e-13),
    "kdpm2": (diffusion.dpm_2(), ratios(EDM, "kdpm2"), "final", 3e-6),
    "lms": (diffusion.lms(), ratios(EDM, "lms"), "final", 3e-6),
    "dpmpp1": (diffusion.dpmpp(order=1), ratios(VP, "dpmpp1"), "final", 3e-6),
    "dpmpp2": (diffusion.dpmpp(order=2), ratios(VP, "dpmpp2"), "final", 3e-6),
    "dpmpp3": (diffusion.dpmpp(order=3), ratios(VP, "dpmpp3"), "final", 3e-6),
    "dpmpp2_sde": (
        diffusion.dpmpp(order=2, eta=1.0),
        ratios(VP, "dpmpp2_sde"),
        "final",
        3e-6,
    ),
    "edm_euler": (diffusion.ddim(), ratios(EDM, "edm_euler"), "final", 3e-6),
    "edm_dpmpp2": (diffusion.dpmpp(), ratios(EDM, "edm_dpmpp2"), "final", 3e-6),
    "flow_euler": (diffusion.flow_euler(), flows("flow_euler"), "final", 5e-6),
    "flow_heun": (diffusion.flow_heun(), flows("flow_heun"), "final", 1e-6),
    "ddim": (diffusion.ddim(), STEPS(steps=20, end="least"), "final", 1e-6),
    "ddim_eta": (diffusion.ddim(eta=1.0), STEPS(steps=20, end="least"), "final", 5e-6),
    "ddpm": (diffusion.ddpm(), STEPS(steps=50), "final", 5e-6),
    "ddpm_large": (
        diffusion.ddpm(variance="large"),
        STEPS(steps=50),
        "last",
        5e-6,
    ),
    **{
        f"deis{n}": (diffusion.deis(order=n), ratios(VP, f"deis{n}"), "last", 5e-6)
        for n in (1, 2, 3)
    },
    **{
        f"unipc{n}_{b}": (
            diffusion.unipc(order=n, variant=b),
            ratios(VP, f"unipc{n}_{b}"),
            "last",
            3e-6,
        )
        for n in (1, 2, 3)
        for b in ("bh1", "bh2")
    },
    "k_euler": (diffusion.ddim(), ratios(EDM, "k_euler"), "final", 1e-13),
    "k_euler_a": (diffusion.ddim(eta=1.0), ratios(EDM, "k_euler_a"), "final", 1e-13),
    "k_heun": (diffusion.heun(), ratios(EDM, "k_heun"), "final", 1e-13),
    "k_heun_churn": (
        diffusion.heun(churn=8.0, low=0.05, high=5.0, inflate=1.007),
        ratios(EDM, "k_heun_churn"),
        "final",
        1e-13,
    ),
    "k_dpm_2": (diffusion.dpm_2(), ratios(EDM, "k_dpm_2"), "final", 1e-13),
    "k_lms": (diffusion.lms(), ratios(EDM, "k_lms"), "final", 1e-13),
    "k_dpmpp_2m": (diffusion.dpmpp(), ratios(EDM, "k_dpmpp_2m"), "final", 1e-13),
    "k_dpmpp_2s": (diffusion.dpmpp_2s(), ratios(EDM, "k_dpmpp_2s"), "final", 1e-13),
    "k_dpmpp_2s_a": (
        diffusion.dpmpp_2s(eta=1.0),
        ratios(EDM, "k_dpmpp_2s_a"),
        "final",
        1e-13,
    ),
    "k_dpmpp_sde": (diffusion.dpmpp_sde(), ratios(EDM, "k_dpmpp_sde"), "final", 1e-13),
    "k_dpmpp_2m_sde": (
        diffusion.dpmpp(order=2, eta=1.0),
        ratios(EDM, "k_dpmpp_2m_sde"),
        "final",
        1e-13,
    ),
    "k_dpmpp_3m_sde": (splice(3), ratios(EDM, "k_dpmpp_3m_sde"), "final", 1e-13),
}


def start_to_end(name):
    solver, grid, which, _ = OURS[name]
    noise = GOLDEN.get(f"{name}/noise")
    if which == "last":
        grid = grid._replace(noise=grid.noise._make(v[:-1] for v in grid.noise))
    return replay(solver, grid, noise), GOLDEN[f"{name}/{which}"]


@pytest.mark.parametrize("name", OURS)
def test_samples_agree(name):
    ours, theirs = start_to_end(name)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=OURS[name][3])


def test_the_single_step_solver_agrees():
    """Their pairs of steps are one of ours; the last pair is two of order 1."""
    s = sigmas("dpmpp2s")
    pairs, rest = (diffusion.from_ratios(VP, v) for v in (s[:19:2], s[18:]))
    x = replay(diffusion.ddim(), rest, start=replay(diffusion.dpmpp_2s(), pairs))
    np.testing.assert_allclose(x, GOLDEN["dpmpp2s/final"], rtol=0, atol=3e-6)


def test_every_recorded_run_is_tested():
    runs = {name.split("/")[0] for name in GOLDEN.files if name.endswith("/last")}
    runs |= {name for name in ABOUT["samplers"]}
    assert runs - set(OURS) == {"dpmpp2s", "ddim_150", "dpmpp3_twice", "deis3_160"}
    for ours, theirs in zip(THREE, ABOUT["mixture"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_levels_agree():
    close = ft.partial(np.testing.assert_allclose, rtol=2e-6, atol=0)
    for name, kind in (
        ("linear", "linear"),
        ("scaled_linear", "scaled_linear"),
        ("squaredcos_cap_v2", "cosine"),
    ):
        betas = diffusion.beta_schedule(kind)
        np.testing.assert_allclose(betas, GOLDEN[f"betas/{name}"], rtol=0, atol=1e-7)
        t = np.arange(999)  # the cosine's last product is of float32's own
        squares = diffusion.discrete(betas).alpha(t) ** 2
        close(squares, GOLDEN[f"products/{name}"][:-1], rtol=3e-5)
    stable = diffusion.beta_schedule("scaled_linear", beta_min=0.00085, beta_max=0.012)
    close(stable, GOLDEN["betas/stable"])
    stable = diffusion.discrete(stable)
    levels = diffusion.ratios
    for name, steps in (("euler", 20), ("unipc2_bh2", 20), ("deis1", 10)):
        close(levels(diffusion.karras(stable, steps=steps)), sigmas(name), rtol=3e-5)
    close(levels(diffusion.exponential(stable, steps=20)), sigmas("dpmpp2s"), rtol=3e-5)
    close(levels(diffusion.karras(EDM, steps=18)), sigmas("edm_euler"))
    for spacing in ("leading", "trailing"):
        grid = diffusion.timesteps(stable, steps=30, spacing=spacing)
        close(levels(grid), GOLDEN[f"spacing/{spacing}"], rtol=3e-5)
    even = diffusion.timesteps(stable, steps=30, spacing="linspace")
    close(
        levels(even), GOLDEN["spacing/linspace"], rtol=1e-4
    )  # theirs: linear in sigma
    for power, name in ((1.0, "exponential"), (2.0, "polyexponential")):
        grid = diffusion.exponential(EDM, steps=8, power=power, low=0.1, high=10.0)
        close(levels(grid), GOLDEN[f"sigmas/{name}"])
    for name in ("ddim", "ddim_150", "ddpm"):
        times = GOLDEN[f"{name}/times"]
        np.testing.assert_array_equal(STEPS(steps=len(times)).noise.t[:-1], times)


def errors(name, which, solver, grid):
    """Of ours and theirs: the median distance from the exact map of one start."""
    ratios, start = diffusion.ratios(grid), jnp.asarray(grid.noise.sigma[0] * START)
    want = exact(THREE, jnp.asarray(ratios[0] * START), ratios[0], ratios[-1])
    ours = diffusion.sample(THREE.denoise, start, grid, solver=solver).x
    alpha = grid.noise.alpha[-1]
    for x in (ours, GOLDEN[f"{name}/{which}"]):
        yield np.median(np.linalg.norm(x / alpha - np.asarray(want), axis=-1))


def test_ddim_of_steps_that_do_not_divide_theirs_is_not_inherited():
    """Each of their steps ends where the next does not begin."""
    grid = STEPS(steps=150, end="least")
    ours, theirs = errors("ddim_150", "final", diffusion.ddim(), grid)
    assert ours < 0.01
    assert theirs > 3 * ours


def test_the_loss_of_precision_of_deis_is_not_inherited():
    """Their closed integrals cancel in float32; ours are summed in float64."""
    grid = ratios(VP, "deis3_160")
    grid = grid._replace(noise=grid.noise._make(v[:-1] for v in grid.noise))
    ours, theirs = errors("deis3_160", "last", diffusion.deis(order=3), grid)
    assert ours < 3e-6
    assert theirs > 300 * ours


def test_a_level_that_stands_twice_is_refused_where_theirs_is_not_a_number():
    twice = GOLDEN["dpmpp3_twice/sigmas"]
    assert twice[-1] == twice[-2]
    assert np.isnan(GOLDEN["dpmpp3_twice/final"]).all()
    with pytest.raises(ValueError, match=r"levels 9 and 10 .* none may stand twice"):
        diffusion.from_ratios(VP, np.float64(twice))
    grid = diffusion.from_ratios(VP, np.float64(twice[:-1]))
    assert np.isfinite(replay(diffusion.dpmpp(order=3), grid)).all()


def test_a_shifted_grid_ends_where_the_formula_says():
    """FlowMatchEuler shifts its least level a second time: 0.0089, not 0.0030."""
    grid = diffusion.shift(diffusion.uniform(FLOW, steps=19, end="least"), factor=3.0)
    t = np.linspace(1, 1e-3, 20)
    np.testing.assert_allclose(grid.noise.t, 3 * t / (1 + 2 * t), rtol=1e-12)
    assert GOLDEN["flow_euler/sigmas"][-2] > 2.9 * grid.noise.t[-1]
