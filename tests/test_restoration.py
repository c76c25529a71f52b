"""Restoration: what was measured is there at the end, the rest is the denoiser's."""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import diffusion
from jaxlab.types import Noise

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
GRID = diffusion.karras(diffusion.vp(), steps=6)
SIZE = 6
ROOT = np.tril(np.random.default_rng(0).normal(size=(SIZE, SIZE)))
COVARIANCE = ROOT @ ROOT.T
MASK = np.array([True, False, False, True, True, False])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def correlated(x, noise, cond=None):
    """The denoiser of N(0, C)."""
    a, s, now = (jnp.asarray(v, jnp.float64) for v in (noise.alpha, noise.sigma, x))
    gain = jnp.linalg.inv(a**2 * COVARIANCE + s**2 * jnp.eye(SIZE)) @ COVARIANCE
    return (a * now @ gain).astype(x.dtype)


def independent(x, noise, cond=None):
    variance = jnp.arange(1.0, SIZE + 1)[None].astype(x.dtype)
    a, s = noise.alpha, noise.sigma
    return a * variance / (a**2 * variance + s**2) * x


def run(denoise, x, solver=None, grid=GRID, **more):
    given = {"solver": solver or diffusion.dpmpp(), "key": KEY} | more
    return jit(lambda x: diffusion.sample(denoise, x, grid, **given))(x)


def start(*shape):
    return GRID.noise.sigma[0] * normal(1, *shape)


# --- any linear measurement ---


def measured(rows=3):
    """A matrix, its pseudo-inverse and what it measured."""
    matrix = np.random.default_rng(1).normal(size=(rows, SIZE))
    inverse = np.linalg.pinv(matrix)
    ops = {
        "forward": lambda x: x @ matrix.T.astype(x.dtype),
        "pseudo_inverse": lambda y: y @ inverse.T.astype(y.dtype),
    }
    return matrix, inverse, ops


def test_samples_meet_the_measurement():
    matrix, _, ops = measured()
    y = normal(2, 4, 3)
    denoise = diffusion.project(correlated, measurement=y, **ops)
    for solver in (diffusion.heun(), diffusion.ddim(eta=1.0)):
        x = run(denoise, start(4, SIZE), solver).x
        np.testing.assert_allclose(x @ matrix.T, y, rtol=0, atol=1e-11)
    free = correlated(start(4, SIZE), Noise(0.5, 0.5, 0.5))
    assert np.abs(free @ matrix.T - y).max() > 0.1


def test_projecting_twice_is_projecting_once():
    """And leaves the null space alone."""
    matrix, inverse, ops = measured()
    y, x = normal(2, 4, 3), normal(3, 4, SIZE)
    same = lambda x, noise, cond: x
    once = diffusion.project(same, measurement=y, **ops)
    noise = Noise(0.5, 0.5, 0.5)
    first = once(x, noise)
    np.testing.assert_allclose(once(first, noise), first, rtol=0, atol=1e-12)
    null = np.eye(SIZE) - inverse @ matrix
    np.testing.assert_allclose(first @ null.T, x @ null.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(first @ matrix.T, y, rtol=0, atol=1e-12)


def test_what_is_measured_may_come_with_cond():
    """One program for every measurement; and evaluations are counted."""
    matrix, _, ops = measured()
    denoise = diffusion.project(correlated, measurement=lambda c: c["y"], **ops)
    sample = lambda y: diffusion.sample(
        denoise, start(4, SIZE), GRID, solver=diffusion.ddim(), cond={"y": y}
    )
    sample = jit(sample)
    for seed in (2, 3):
        y = normal(seed, 4, 3)
        out = sample(y)
        np.testing.assert_allclose(out.x @ matrix.T, y, rtol=0, atol=1e-11)
        assert out.nfe == 6


# --- inpainting ---


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "dpmpp", "unipc"])
def test_known_values_are_kept_to_the_bit(name, dtype):
    known = normal(2, 4, SIZE).astype(dtype)
    denoise = diffusion.inpaint(correlated, mask=jnp.asarray(MASK)[None], known=known)
    x = run(denoise, start(4, SIZE).astype(dtype), getattr(diffusion, name)()).x
    np.testing.assert_array_equal(x[:, MASK], known[:, MASK])
    assert np.abs((x - known)[:, ~MASK]).min() > 0


def test_inpainting_is_projecting_on_the_mask():
    known = normal(2, 4, SIZE)
    forward, back = (
        (lambda x: x[:, MASK]),
        (lambda y: jnp.zeros((len(y), SIZE), y.dtype).at[:, MASK].set(y)),
    )
    ops = {"forward": forward, "pseudo_inverse": back, "measurement": known[:, MASK]}
    ours = diffusion.inpaint(correlated, mask=jnp.asarray(MASK)[None], known=known)
    for solver in (diffusion.dpmpp(), diffusion.heun()):
        one, other = (
            run(denoise, start(4, SIZE), solver).x
            for denoise in (ours, diffusion.project(correlated, **ops))
        )
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def test_what_is_independent_is_left_alone():
    known = jnp.where(jnp.asarray(MASK), 7.0, jnp.nan)[None]  # nothing else is read
    mask = jnp.asarray(MASK)[None]
    denoise = diffusion.inpaint(independent, mask=mask, known=known)
    free = run(independent, start(4, SIZE)).x
    for found in (
        run(denoise, start(4, SIZE)).x,
        run(
            independent,
            start(4, SIZE),
            diffusion.replacement(diffusion.dpmpp(), mask=mask, known=known),
        ).x,
    ):
        np.testing.assert_allclose(found[:, ~MASK], free[:, ~MASK], rtol=1e-12)
        np.testing.assert_array_equal(found[:, MASK], 7.0)


def test_replacement_noises_what_is_known():
    """To each level; at the end it is there to the bit."""
    known, count = normal(2, 1, SIZE), 3000
    solver = diffusion.replacement(
        diffusion.ddim(eta=1.0), mask=jnp.asarray(MASK)[None], known=known
    )
    out = run(correlated, start(count, SIZE), solver, path=True)
    want = np.broadcast_to(known[:, MASK], (count, MASK.sum()))
    np.testing.assert_array_equal(out.x[:, MASK], want)
    for level in (2, 4):
        found = np.asarray(out.path[level][:, MASK])
        a, s = GRID.noise.alpha[level], GRID.noise.sigma[level]
        off = found.mean(0) - a * np.asarray(known)[0, MASK]
        assert (np.abs(off) < 4 * s / math.sqrt(count)).all()
        assert (np.abs(found.var(0) / s**2 - 1) < 4 * math.sqrt(2 / count)).all()
    with pytest.raises(ValueError, match="pass key="):
        run(correlated, start(2, SIZE), solver, key=None)


# --- colour ---


def test_colours_have_the_gray_given():
    gray, x, noise = normal(2, 2, 3, 4, 1), normal(1, 2, 3, 4, 3), Noise(0.5, 0.5, 0.5)
    half = lambda x, noise, cond: x / 2
    found = diffusion.colourise(half, gray=gray)(x, noise)
    np.testing.assert_allclose(found.mean(-1, keepdims=True), gray, rtol=0, atol=1e-12)
    weights = np.array([0.3, 0.6, 0.1])
    found = diffusion.colourise(half, gray=gray, weights=weights)(x, noise)
    np.testing.assert_allclose((found @ weights)[..., None], gray, rtol=0, atol=1e-12)


def test_an_orthonormal_basis_decouples_gray():
    """One of its channels is what is known; the others are the denoiser's."""
    basis, _ = np.linalg.qr(np.stack([np.ones(3), [1, -1, 0], [1, 1, -2]], 1))
    x0, gray = normal(2, 2, 3, 4, 3), normal(3, 2, 3, 4, 1)
    channels = np.array(x0 @ basis)
    channels[..., 0] = (jnp.broadcast_to(gray, x0.shape) @ basis)[..., 0]
    denoise = diffusion.colourise(lambda x, noise, cond: x, gray=gray)
    found = denoise(x0, Noise(0.5, 0.5, 0.5))
    np.testing.assert_allclose(found, channels @ basis.T, rtol=0, atol=1e-12)


# --- blur ---


def circulant(kernel, shape):
    """The matrix of a circular blur of images, by its definition."""
    h, w = shape
    out = np.zeros((h, w, h, w))
    for i, j in np.ndindex(*kernel.shape):
        for a, b in np.ndindex(h, w):
            r, c = (
                (a - i + kernel.shape[0] // 2) % h,
                (b - j + kernel.shape[1] // 2) % w,
            )
            out[a, b, r, c] += kernel[i, j]
    return out.reshape(h * w, h * w)


@pytest.mark.parametrize(("shape", "size"), [((4, 6), (3, 3)), ((5, 3), (2, 1))])
def test_blur_is_inverted_where_it_kept_something(shape, size):
    kernel = np.random.default_rng(0).random(size)
    matrix = circulant(kernel, shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    gaps = values[:-1] / values[1:]
    cut = int(np.argmax(gaps * (np.arange(len(gaps)) >= len(gaps) // 2)))
    threshold = math.sqrt(values[cut] * values[cut + 1]) / values[0]
    inverse = np.linalg.pinv(matrix, rcond=threshold)
    x, blurred = normal(1, 2, *shape, 2), normal(2, 2, *shape, 2)
    same = lambda x, noise, cond: x
    given = {"kernel": kernel, "blurred": blurred, "threshold": threshold}
    denoise = diffusion.deblur(same, **given)
    flat = lambda v: np.moveaxis(np.asarray(v), -1, 1).reshape(2, 2, -1)
    want = flat(x) + (flat(blurred) - flat(x) @ matrix.T) @ inverse.T
    found = denoise(x, Noise(0.5, 0.5, 0.5))
    np.testing.assert_allclose(flat(found), want, rtol=0, atol=1e-9)
    again = denoise(found, Noise(0.5, 0.5, 0.5))
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-9)


def test_deblurred_samples_blur_to_what_was_given():
    kernel = np.outer([1, 2, 1], [1, 3, 1]) / 20
    matrix, truth = circulant(kernel, (4, 5)), normal(2, 2, 4, 5, 1)
    blurred = (truth.reshape(2, 20) @ matrix.T).reshape(truth.shape)
    half = lambda x, noise, cond: x / 2
    denoise = diffusion.deblur(half, kernel=kernel, blurred=blurred, threshold=1e-6)
    x = run(denoise, start(2, 4, 5, 1).astype(jnp.float32)).x
    assert x.dtype == jnp.float32
    found = np.asarray(x).reshape(2, 20) @ matrix.T
    np.testing.assert_allclose(found, blurred.reshape(2, 20), rtol=0, atol=1e-5)


def test_blurs_that_are_none():
    image = jnp.ones((1, 4, 4, 1))
    same = lambda x, noise, cond: x
    for threshold in (0.0, 1.0):
        with pytest.raises(ValueError, match="threshold must be"):
            diffusion.deblur(same, kernel=image, blurred=image, threshold=threshold)
    large = diffusion.deblur(same, kernel=jnp.ones((5, 1)), blurred=image)
    with pytest.raises(ValueError, match="larger than the image"):
        large(image, Noise(0.5, 0.5, 0.5))


# --- spectrograms ---


def test_spectrograms_there_and_back():
    x = jax.lax.complex(normal(1, 3, 5), normal(2, 3, 5))
    for exponent, factor in ((0.5, 0.15), (1.0, 2.0), (0.3, 1.0)):
        given = {"exponent": exponent, "factor": factor}
        y = diffusion.compress_spectrogram(x, **given)
        np.testing.assert_allclose(jnp.abs(y), factor * jnp.abs(x) ** exponent)
        np.testing.assert_allclose(jnp.angle(y), jnp.angle(x), rtol=0, atol=1e-12)
        back = diffusion.expand_spectrogram(y, **given)
        np.testing.assert_allclose(back, x, rtol=1e-12)


def test_silence_stays_silent():
    x = jnp.array([0j, 4 + 0j])
    np.testing.assert_allclose(diffusion.compress_spectrogram(x), [0, 0.3])
    np.testing.assert_array_equal(diffusion.expand_spectrogram(0 * x), 0 * x)
    real = lambda r: jax.lax.complex(r, jnp.zeros_like(r))
    loud = lambda r: jnp.sum(diffusion.compress_spectrogram(real(r)).real)
    slope = jax.grad(loud)(jnp.array([0.0, 4.0]))
    np.testing.assert_allclose(slope, [0, 0.15 * 0.5 / 2])
    for name in ("compress_spectrogram", "expand_spectrogram"):
        with pytest.raises(ValueError, match="above 0"):
            getattr(diffusion, name)(x, exponent=0.0)
