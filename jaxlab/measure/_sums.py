"""Where sums over data begin, and products of rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ..types import Params


def zeros(params: Params) -> Params:
    """Sums of gradients begin here, in at least float32; other leaves are refused."""

    def leaf(path: str, x: Array) -> Array:
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"params has the leaf {path!r} of dtype {x.dtype}, which has no "
                f"gradient: set such leaves apart, e.g. with tree.partition"
            )
        return jnp.zeros_like(tree.widen(x))

    return tree.path_map(leaf, params)


def dot(spec: str, x: Array, y: Array) -> Float[Array, "..."]:
    """An einsum in full precision, accumulated in at least float32."""
    dtype = jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, x, y, precision=exact, preferred_element_type=dtype)


def second_moment(x: Float[Array, "*batch b n"]) -> Float[Array, "*batch n n"]:
    """The sum over rows of $x x^T$."""
    return dot("...bi,...bj->...ij", x, x)
