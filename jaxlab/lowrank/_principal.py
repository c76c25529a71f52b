"""The singular vectors of a weight, as the methods that start from them share them."""

from jax import Array
import jax.numpy as jnp

from ._rank import wide


def principal(w: Array) -> tuple[Array, Array, Array]:
    """`a [n, k]`, `d [k]`, `b [k, m]` with `w = a diag(d) b`, k = min(n, m).

    Of the transpose, the weight `[out, in]`, so that signs are those of a file that
    leaves out what a decomposition gives.
    """
    u, d, v = jnp.linalg.svd(w.T.astype(wide(w)), full_matrices=False)
    return v.T, d, u.T
