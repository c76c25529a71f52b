"""Randomised singular value decomposition: Halko, Martinsson & Tropp, 2011."""

import functools as ft

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
import numpy as np


def product(*factors: Array) -> Array:
    """The product of matrices from the left, in full precision on every device."""
    return ft.reduce(ft.partial(jnp.matmul, precision="highest"), factors)


def t(x: Array) -> Array:
    """The transposed matrices."""
    return jnp.swapaxes(x, -1, -2)


def randomized_svd(d: Array, omega: Array, power: int) -> tuple[Array, Array, Array]:
    r"""The leading singular triplets: `u [*, n, l]`, `s [*, l]`, `vt [*, l, m]`.

    $Q = \mathrm{orth}((D D^\top)^q D \Omega)$ and $Q^\top D = \tilde U \Sigma V^\top$
    (algorithms 4.4 and 5.1, https://arxiv.org/abs/0909.4061); `omega [m, l]` is the
    random test matrix, `power` is q.
    """
    turned = jax.lax.optimization_barrier(t(d))  # one copy is cheaper than D^T Q twice
    q = _orth(product(d, omega))
    for _ in range(power):
        q = _orth(product(d, _orth(product(turned, q))))
    right, r = jnp.linalg.qr(product(turned, q))  # Q^T D = r^T right^T
    u, s, vt = jnp.linalg.svd(t(r), full_matrices=False)
    return product(q, u), s, product(vt, t(right))


def exact_svd(d: Array) -> tuple[Array, Array, Array]:
    """All singular triplets, by LAPACK on a CPU."""
    u, s, vt = jnp.linalg.svd(d, full_matrices=False)
    return u, s, vt


def random_matrix(key: PRNGKeyArray, m: int, count: int) -> np.ndarray:
    """A random `[m, count]`, the same for all matrices of m columns.

    Drawn by numpy: the compiled draw would cost more than a decomposition.
    """
    seed = np.asarray(jax.random.key_data(key)).tolist()
    return np.random.default_rng([*seed, m]).standard_normal((m, count), np.float32)


def _orth(y: Array) -> Array:
    """An orthonormal basis of the columns."""
    return jnp.linalg.qr(y)[0]
