"""A Gaussian mixture whose diffusion is known in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.types import Noise


class Mixture(NamedTuple):
    """k components of d independent coordinates."""

    weights: np.ndarray  # [k]
    means: np.ndarray  # [k, d]
    variances: np.ndarray  # [k, d]

    def denoise(self, x, noise, _=None):
        """E[x0 | x] of x `[..., d]`, at scalar noise or one for each of axis 0."""
        weight, _, means = self._posterior(x, noise)
        return jnp.sum(weight * means, -2)

    def score(self, x, noise):
        """The gradient of the log-density of the noisy samples."""
        weight, pull, _ = self._posterior(x, noise)
        return jnp.sum(weight * pull, -2)

    def log_density(self, x, noise):
        """`[...]`, of the noisy samples."""
        return jax.nn.logsumexp(self._parts(x, noise)[0], -1)

    def _parts(self, x, noise):
        like = lambda v: jnp.asarray(v, x.dtype)
        over = lambda v: jnp.reshape(
            like(v), jnp.shape(v) + (1,) * (x.ndim + 1 - jnp.ndim(v))
        )
        a, s = over(noise.alpha), over(noise.sigma)
        inner = lambda v: like(v).reshape((1,) * (x.ndim - 1) + np.shape(v))
        means, variances = inner(self.means), inner(self.variances)
        spread, off = a**2 * variances + s**2, x[..., None, :] - a * means
        size = jnp.sum(off**2 / spread + jnp.log(2 * np.pi * spread), -1)
        return inner(np.log(self.weights)) - size / 2, a, means, variances, spread, off

    def _posterior(self, x, noise):
        """Of each component: its weight, its score, its clean sample."""
        logits, a, means, variances, spread, off = self._parts(x, noise)
        weight = jax.nn.softmax(logits, -1)[..., None]
        return weight, -off / spread, means + a * variances / spread * off


THREE = Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]]),
    np.array([[0.04, 0.09], [0.05, 0.02], [0.1, 0.06]]),
)


def exact(mixture, x, start, end, *, steps=1500):
    """The probability-flow map of x between two ratios sigma / alpha, where alpha is 1.

    dx / d log s = x - D(x), by the Runge-Kutta method of order 4: to 1e-11.
    """
    logs = np.linspace(np.log(start), np.log(end), steps + 1)
    h = (logs[-1] - logs[0]) / steps

    def slope(x, log):
        return x - mixture.denoise(x, Noise(log, 1.0, jnp.exp(log)))

    def step(x, log):
        a = slope(x, log)
        b = slope(x + h / 2 * a, log + h / 2)
        c = slope(x + h / 2 * b, log + h / 2)
        d = slope(x + h * c, log + h)
        return x + h / 6 * (a + 2 * b + 2 * c + d), None

    return jax.jit(lambda x: jax.lax.scan(step, x, jnp.asarray(logs[:-1], x.dtype))[0])(
        x
    )
