"""Means and covariances that pool (Chan et al., 1979), and how far two are apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ._sums import second_moment


class Gaussian(NamedTuple):
    """The first two moments of n features, and how many rows they are of."""

    count: Float[Array, "*batch"]
    mean: Float[Array, "*batch n"]
    covariance: Float[Array, "*batch n n"]  # centred, divided by the count


def gaussian(x: Float[Array, "*batch b n"]) -> Gaussian:
    r"""The mean and the covariance of rows, in two passes.

    $\mu = \frac1b\sum_i x_i$, $\Sigma = \frac1b\sum_i(x_i - \mu)(x_i - \mu)^\top$.

    Args:
      x: `[*batch, b, n]` rows, in any sharding.

    Returns:
      `Gaussian(count [*batch], mean [*batch, n], covariance [*batch, n, n])` in at
      least float32. Those of batches are joined by `pool`.

    Raises:
      ValueError: not floating-point, or fewer than two axes.

    Degenerate inputs:
      No rows give zeros, the neutral element of `pool`. One row has covariance 0.

    References:
      Chan, Golub & LeVeque, 1979, "Updating Formulae and a Pairwise Algorithm for
      Computing Sample Variances", http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773,
      for `pool`.

    Example:
      >>> gaussian(jnp.array([[0.0], [2.0]])).covariance
      Array([[1.]], dtype=float32)
    """
    if x.ndim < 2:
        raise ValueError(f"expected rows [*batch, b, n], got the shape {x.shape}")
    x = tree.widen(x)
    b = x.shape[-2]
    mean = jnp.sum(x, -2, keepdims=True) / max(b, 1)
    covariance = second_moment(x - mean) / max(b, 1)
    return Gaussian(jnp.full(x.shape[:-2], b, x.dtype), mean[..., 0, :], covariance)


def pool(a: Gaussian, b: Gaussian) -> Gaussian:
    r"""The moments of the rows of both, without cancellation.

    $\mu = \mu_a + \frac{n_b}{n}\delta$ and $\Sigma = \frac{n_a}n\Sigma_a +
    \frac{n_b}n\Sigma_b + \frac{n_an_b}{n^2}\delta\delta^\top$, with $\delta = \mu_b -
    \mu_a$ and $n = n_a + n_b$.

    Args:
      a: moments of some rows.
      b: moments of other rows, of the same shapes.

    Returns:
      The moments of all. Associative and commutative up to rounding: batches may be
      pooled in any order, and across hosts.

    Degenerate inputs:
      A count of 0 on one side gives the other side; on both, zeros.

    References:
      Chan, Golub & LeVeque, 1979,
      http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773, Section 2.

    Example:
      >>> one = gaussian(jnp.array([[0.0]]))
      >>> pool(one, gaussian(jnp.array([[2.0]]))).covariance
      Array([[1.]], dtype=float32)
    """
    n = a.count + b.count
    share = b.count / jnp.where(n > 0, n, jnp.ones_like(n))
    v = share[..., None]
    delta = b.mean - a.mean
    mean = a.mean + v * delta
    outer = delta[..., :, None] * delta[..., None, :]
    v = v[..., None]
    between = v * (1 - v) * outer
    return Gaussian(n, mean, (1 - v) * a.covariance + v * b.covariance + between)


def frechet(a: Gaussian, b: Gaussian, *, unbiased: bool = False) -> Float[Array, "*b"]:
    r"""The squared Fréchet (2-Wasserstein) distance of two Gaussians.

    $d^2 = \|\mu_a - \mu_b\|^2 + \mathrm{tr}\big(\Sigma_a + \Sigma_b -
    2(\Sigma_a^{1/2}\Sigma_b\Sigma_a^{1/2})^{1/2}\big)$: the FID, where the features are
    those of Inception.

    Args:
      a: moments `[n]` and `[n, n]`, or batches of those.
      b: moments of the same shapes.
      unbiased: divide covariances by the count less 1, as the code of FID does.

    Returns:
      `[*batch]` squared distances, at least 0. Differentiable, also where a covariance
      is singular (there the derivative is that within its range) or both are equal.

    Degenerate inputs:
      Covariances need not have full rank; eigenvalues that rounding made negative count
      as 0. With `unbiased`, a count below 2 leaves the covariance as it is.

    References:
      Dowson & Landau, 1982, "The Fréchet distance between multivariate normal
      distributions", https://doi.org/10.1016/0047-259X(82)90077-X; Heusel et
      al., 2017, "GANs trained by a two time-scale update rule",
      https://arxiv.org/abs/1706.08500, eq. 6. The trace of the root is the sum of the
      singular values of $\Sigma_b^{1/2}\Sigma_a^{1/2}$: half the digits are lost where
      the product of the covariances is formed.

    Example:
      >>> one = gaussian(jnp.array([[0.0], [2.0]]))
      >>> round(float(frechet(one, one._replace(mean=one.mean + 3))), 4)
      9.0
    """
    first, other = (_covariance(g, unbiased) for g in (a, b))
    trace = lambda m: jnp.trace(m, axis1=-2, axis2=-1)
    means = jnp.sum(jnp.square(a.mean - b.mean), -1)
    spread = trace(first) + trace(other) - 2 * _fidelity(first, other)
    return jnp.maximum(means + spread, 0)


def _covariance(g: Gaussian, unbiased: bool) -> Float[Array, "*batch n n"]:
    """The covariance of a Gaussian, by either divisor."""
    if not unbiased:
        return g.covariance
    less = jnp.where(g.count > 1, g.count - 1, g.count)
    ratio = g.count / jnp.where(less > 0, less, jnp.ones_like(less))
    return g.covariance * ratio[..., None, None]


@jax.custom_jvp
def _fidelity(a: Array, b: Array) -> Float[Array, "*batch"]:
    """The trace of the root of $a^{1/2} b a^{1/2}$."""
    product = _power(b, 0.5) @ _power(a, 0.5)
    return jnp.sum(jnp.linalg.svd(product, compute_uv=False), -1)


@_fidelity.defjvp
def _fidelity_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Half the transport map from either side: no derivative of an eigenvector."""
    a, b = primals
    slope = lambda x, y, t: 0.5 * jnp.sum(_transport(x, y) * t, (-2, -1))
    return _fidelity(a, b), slope(a, b, tangents[0]) + slope(b, a, tangents[1])


def _transport(a: Array, b: Array) -> Float[Array, "*batch n n"]:
    """The optimal map from N(0, a) to N(0, b), within the range of both."""
    root = _power(b, 0.5)
    return root @ _power(root @ a @ root, -0.5) @ root


def _power(x: Array, exponent: float) -> Float[Array, "*batch n n"]:
    """A power of a symmetric matrix, within its range."""
    values, vectors = jnp.linalg.eigh(x)
    least = x.shape[-1] * jnp.finfo(x.dtype).eps * jnp.max(values, -1, keepdims=True)
    inside = values > jnp.maximum(least, 0)
    powers = jnp.where(inside, jnp.where(inside, values, 1) ** exponent, 0)
    return (vectors * powers[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
