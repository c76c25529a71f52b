"""Guidance by gradients, of classifiers and of losses, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import diffusion
from jaxlab.types import Noise

SEED = 0
RNG = np.random.default_rng(SEED)
A, S = 0.6, 0.8
NOISE = Noise(0.5, np.float64(A), np.float64(S))
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -2.0]])
VARIANCE = 0.25
X = RNG.standard_normal((5, 2))
LABELS = np.array([0, 1, 2, 0, 1])


def run(f, *given):
    level = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda *v: f(*v), compiler_options=level)(*given)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def joint(x, noise, cond=None):
    """Each component's log-density of noisy samples, `[b, k]`."""
    spread = noise.alpha**2 * VARIANCE + noise.sigma**2
    off = x[:, None] - noise.alpha * MEANS[None]
    return np.log(WEIGHTS)[None] - jnp.sum(off**2, -1) / (2 * spread)


def mixture(x, noise, cond):
    part = jax.nn.softmax(joint(x, noise), 1)
    spread = noise.alpha**2 * VARIANCE + noise.sigma**2
    off = x[:, None] - noise.alpha * MEANS[None]
    return jnp.sum(part[..., None] * (MEANS[None] + A * VARIANCE / spread * off), 1)


def chosen(x, noise, cond):
    """The denoiser of one component for each sample."""
    mean = jnp.asarray(MEANS)[cond]
    return mean + A * VARIANCE / (A**2 * VARIANCE + S**2) * (x - A * mean)


def log_prob(x, noise, cond):
    every = jax.nn.log_softmax(joint(x, noise), 1)
    return jnp.take_along_axis(every, cond[:, None], 1)[:, 0]


def test_an_exact_classifier_gives_the_conditional_score():
    guided = diffusion.classifier(log_prob, scale=1.0)(mixture)
    want = chosen(X, NOISE, LABELS)
    np.testing.assert_allclose(run(guided, X, NOISE, LABELS), want, atol=1e-14)
    more = diffusion.classifier(log_prob, scale=np.full(5, 3.0))(mixture)
    plain = run(mixture, X, NOISE, LABELS)
    got = run(more, X, NOISE, LABELS)
    np.testing.assert_allclose(got, plain + 3 * (want - plain), atol=1e-13)
    assert np.abs(plain - want).max() > 0.1
    dark = NOISE._replace(alpha=np.float64(0))
    none, still = (run(f, X, dark, LABELS) for f in (more, mixture))
    np.testing.assert_array_equal(none, still)


def test_elucd_is_its_formula_on_the_predicted_sample():
    matrix = RNG.standard_normal((2, 4))
    schedule, given = diffusion.vp(), {"joint": 1.3, "marginal": 0.4, "scale": 2.0}
    logits = lambda x0: jnp.tanh(x0) @ matrix
    x0 = np.asarray(run(mixture, X, NOISE, None))
    part = np.exp(0.4 * np.tanh(x0) @ matrix)
    part /= part.sum(1, keepdims=True)
    slope = (1.3 * matrix.T[LABELS] - 0.4 * part @ matrix.T) / np.cosh(x0) ** 2
    for sine in (0.0, 0.3):
        guide = diffusion.elucd(
            logits, label=lambda c: c["y"], schedule=schedule, sine=sine, **given
        )
        swell = 1 + sine * np.sin(np.pi / 2) * 20.0 / (0.1 + 0.5 * 19.9)
        want = x0 + S**2 / A * 2.0 * swell * slope
        got = run(guide(mixture), X, NOISE, {"y": LABELS})
        np.testing.assert_allclose(got, want, atol=1e-13)


def test_elucd_at_equal_temperatures_is_classifier_guidance_of_x0():
    logits = lambda x0: joint(x0, Noise(0.0, 1.0, 0.0))
    clean = lambda x, noise, cond: log_prob(x, Noise(0.0, 1.0, 0.0), cond)
    guide = diffusion.elucd(logits, marginal=1.0)
    got = run(guide(mixture), X, NOISE, LABELS)
    x0 = run(mixture, X, NOISE, None)
    slope = run(jax.grad(lambda v: clean(v, None, LABELS).sum()), x0)
    np.testing.assert_allclose(got, x0 + S**2 / A * slope, atol=1e-13)


PRIOR = np.array([[1.0, 0.6], [0.6, 0.8]])


def gaussian(covariance):
    """The denoiser of N(0, covariance)."""
    gain = A * covariance @ np.linalg.inv(A**2 * covariance + S**2 * np.eye(2))
    return gain, lambda x, noise, cond: x @ gain.T


def squares(x0, y):
    return jnp.sum((x0 - y) ** 2, 1)


def test_a_quadratic_loss_through_a_linear_denoiser():
    gain, denoise = gaussian(PRIOR)
    y = RNG.standard_normal((5, 2))
    x0 = X @ gain.T
    slope = 2 * (x0 - y) @ gain
    guide = lambda **more: diffusion.loss_guidance(squares, scale=0.7, **more)(denoise)
    at = lambda y, **more: run(guide(**more), X, NOISE, y)
    want = x0 - S**2 / A * 0.7 * slope
    np.testing.assert_allclose(at(y), want, atol=1e-14)
    size = np.linalg.norm(x0 - y, axis=1, keepdims=True)
    want = x0 - S**2 / A * 0.7 * slope / size
    np.testing.assert_allclose(at(y, normalise=True), want, atol=1e-14)
    none = lambda x0, y: 0 * squares(x0, y)
    same = diffusion.loss_guidance(none, scale=0.7, normalise=True)(denoise)
    np.testing.assert_allclose(run(same, X, NOISE, y), x0, atol=1e-15)
    state = guide().apply(X, NOISE, y, guide().init(X, y))[1]
    assert int(state.rows) == 5
    # Only through the denoiser: half of the loss's own gradient is another thing.
    assert np.abs(x0 - S**2 / A * 1.4 * (x0 - y) - at(y)).max() > 0.1


def test_refining_descends_and_universal_guidance_is_both():
    gain, denoise = gaussian(PRIOR)
    y, rate, steps = RNG.standard_normal((5, 2)), 0.1, 6
    x0 = X @ gain.T
    down = lambda v: y + (1 - 2 * rate) ** steps * (v - y)
    given = {"steps": steps, "optimizer": optax.sgd(rate)}
    got = run(diffusion.refine(squares, **given)(denoise), X, NOISE, y)
    np.testing.assert_allclose(got, down(x0), atol=1e-14)
    forward = x0 - S**2 / A * 0.7 * 2 * (x0 - y) @ gain
    both = diffusion.universal(squares, scale=0.7, **given)(denoise)
    np.testing.assert_allclose(run(both, X, NOISE, y), down(forward), atol=1e-14)
    alone = diffusion.universal(squares, scale=0.7)(denoise)
    np.testing.assert_allclose(run(alone, X, NOISE, y), forward, atol=1e-14)


@pytest.mark.parametrize("deviation", [0.0, 0.3])
def test_linear_observations_of_a_gaussian_give_its_posterior_mean(deviation):
    operator = np.array([[1.0, -0.5]])
    y = RNG.standard_normal((5, 1))

    def posterior(covariance):
        """E[x0 | x, y] by conditioning (x, y) jointly."""
        rows = np.vstack([A * np.eye(2), operator])
        noise = np.diag([S**2, S**2, deviation**2])
        cross = covariance @ rows.T
        seen = np.hstack([X, y])
        return seen @ np.linalg.solve(rows @ cross + noise, cross.T)

    def guided(covariance, kind, **more):
        given = {"deviation": deviation, "covariance": kind, "iterations": 2}
        guide = diffusion.pigdm(lambda v: v @ operator.T, **(given | more))
        return run(guide(gaussian(covariance)[1]), X, NOISE, y)

    unit = posterior(0.49 * np.eye(2))
    tight = {"atol": 1e-13}
    one = guided(0.49 * np.eye(2), "isotropic", variance=0.49, iterations=1)
    np.testing.assert_allclose(one, unit, **tight)
    np.testing.assert_allclose(guided(0.49 * np.eye(2), "tweedie"), unit, **tight)
    np.testing.assert_allclose(guided(PRIOR, "tweedie"), posterior(PRIOR), **tight)
    assert np.abs(guided(PRIOR, "isotropic") - posterior(PRIOR)).max() > 0.05


def test_several_observations_take_as_many_iterations():
    operator = RNG.standard_normal((2, 2))
    y = RNG.standard_normal((5, 2))
    rows = np.vstack([A * np.eye(2), operator])
    cross = PRIOR @ rows.T
    noise = np.diag([S**2, S**2, 0.01, 0.01])
    want = np.hstack([X, y]) @ np.linalg.solve(rows @ cross + noise, cross.T)

    def error(iterations):
        guide = diffusion.pigdm(
            lambda v: v @ operator.T,
            observed=lambda cond: cond["y"],
            deviation=0.1,
            covariance="tweedie",
            iterations=iterations,
        )
        got = run(guide(gaussian(PRIOR)[1]), X, NOISE, {"y": y})
        return float(jnp.abs(got - want).max())

    assert error(2) < 1e-12
    assert error(5) < 1e-12  # converged early: no division by nothing
    assert error(1) > 1e-3


GRID = diffusion.karras(diffusion.vp(), steps=5)


def test_a_repeated_step_is_noised_back_to_where_it_began():
    rows = diffusion.recurrent(diffusion.ddim(), times=3).plan(GRID)
    alpha, sigma = GRID.noise.alpha, GRID.noise.sigma
    np.testing.assert_allclose(rows[1] * alpha[1:], alpha[:-1], rtol=1e-14)
    back = (rows[1] * sigma[1:]) ** 2 + rows[2] ** 2
    np.testing.assert_allclose(back, sigma[:-1] ** 2, rtol=1e-13)
    assert diffusion.recurrent(once := diffusion.ddim(), times=1) is once


def test_recurrence_evaluates_and_forgets():
    y = np.zeros((3, 2)) + 2.0
    guide = diffusion.loss_guidance(squares, scale=0.5)
    denoise = guide(lambda x, noise, cond: x * noise.alpha)
    x = jnp.asarray(RNG.standard_normal((3, 2)))
    many = diffusion.recurrent(diffusion.dpmpp(order=2), times=3)

    def sampled(denoise, x, y):
        given = {"cond": y, "key": jax.random.key(0), "solver": many}
        return run(lambda x, y: diffusion.sample(denoise, x, GRID, **given), x, y)

    out = sampled(denoise, x, y)
    assert float(out.nfe) == 15
    assert np.isfinite(out.x).all()
    first = sampled(denoise, x[:1], y[:1])
    np.testing.assert_allclose(first.x[0], out.x[0], atol=1e-13)
    known = sampled(lambda x, *_: 0 * x + 2, x, y)
    np.testing.assert_allclose(known.x, 2, atol=1e-12)


def test_noise_drawn_in_recurrence_is_of_the_level_it_returns_to():
    """One step of a point mass, twice: it returns to the noise of the start."""
    grid = diffusion.from_ratios(diffusion.edm(), [3.0, 1.0])
    seen = []

    def denoise(x, noise, cond):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), x)
        return 0 * x

    x = 3.0 * jnp.asarray(RNG.standard_normal((4000, 1)))
    solver = diffusion.recurrent(diffusion.ddim(), times=2)
    diffusion.sample(denoise, x, grid, solver=solver, key=jax.random.key(3))
    jax.effects_barrier()
    assert [round(float(v.std()) / 3, 1) for v in seen] == [1.0, 1.0]
    share = np.mean(seen[0] * seen[1]) / 9  # the third that the step kept
    assert abs(share - 1 / 3) < 0.05


def test_bad_input_is_named():
    plain = lambda x, noise, cond: x
    with pytest.raises(ValueError, match="scale"):
        diffusion.loss_guidance(squares, scale=float("nan"))
    whole = diffusion.loss_guidance(lambda x0, cond: jnp.sum(x0), scale=1.0)(plain)
    with pytest.raises(ValueError, match="loss must give one number"):
        whole(X, NOISE, LABELS)
    flat = diffusion.classifier(lambda x, *_: x, scale=1.0)(plain)
    with pytest.raises(ValueError, match="log_prob must give one number"):
        flat(X, NOISE, LABELS)
    short = diffusion.elucd(lambda x0: x0[:, 0])(plain)
    with pytest.raises(ValueError, match="logits must be"):
        short(X, NOISE, LABELS)
    for schedule in (None, diffusion.flow()):
        with pytest.raises(ValueError, match="sine"):
            diffusion.elucd(lambda x0: x0, schedule=schedule, sine=0.3)
    other = diffusion.pigdm(lambda v: v)(plain)
    with pytest.raises(ValueError, match="observed"):
        other(X, NOISE, np.zeros((5, 3)))
    with pytest.raises(ValueError, match="times"):
        diffusion.recurrent(diffusion.ddim(), times=0)
    with pytest.raises(ValueError, match="falls"):
        diffusion.recurrent(diffusion.ddim(), times=2).plan(diffusion.reverse(GRID))
    for bad in ({"deviation": -1.0}, {"variance": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="want deviation"):
            diffusion.pigdm(lambda v: v, **bad)
    with pytest.raises(ValueError, match="covariance"):
        diffusion.pigdm(lambda v: v, covariance="full")
    with pytest.raises(ValueError, match="steps"):
        diffusion.refine(squares, steps=-1, optimizer=optax.sgd(0.1))
