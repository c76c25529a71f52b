"""How an operation uses a weight, and the weight as the matrix of that use."""

import math
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp


class Use(NamedTuple):
    """One operation that consumes one params leaf.

    Axes count in the leaf viewed in `shape`: the leaf's own shape, but where parts of
    one axis play different roles (the groups of a grouped convolution, experts folded
    into an axis) that axis is split, row-major. An elementwise use, and one that is
    not followed, has `stacked` axes only.
    """

    path: str
    """Slash path of the leaf."""
    primitive: str
    """The operation: "dot_general", "conv_general_dilated", "gather", "add"..."""
    stacked: tuple[int, ...]
    """Axes sliced away by enclosing scans: layers."""
    batch: tuple[int, ...]
    """Axes that input and output share: experts, groups."""
    contracted: tuple[int, ...]
    """Axes summed over: the n of `w[n, m]`."""
    free: tuple[int, ...]
    """Axes that go to the output: the m."""
    shape: tuple[int, ...]
    """What the leaf is reshaped to before its axes are counted."""


def as_matrix(w: Array, use: Use) -> Array:
    """The matrices that a use multiplies its input by: $y = x W$.

    n counts the contracted axes in the order of the leaf, the last one fastest: an
    HWIO kernel has the n of `[height, width, in]`, an OIHW one that of
    `[in, height, width]`, which is how `capture` lays out its patches. A table that is
    looked up has n = rows, as if its input were one-hot.

    Args:
      w: the leaf.
      use: one of its `uses`.

    Returns:
      `[*stacked, *batch, n, m]` in the dtype of `w`.

    Raises:
      ValueError: the use is no matrix product, or `w` has not the shape of its leaf.

    Example:
      >>> from jaxlab.rewrite import uses
      >>> apply = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"])
      >>> params = {"q": jnp.zeros((4, 2, 3))}
      >>> (use,) = uses(apply, params, jnp.zeros((1, 4)))["q"]
      >>> as_matrix(params["q"], use).shape
      (4, 6)
    """
    _check(w, use, "w")
    size = lambda axes: math.prod(use.shape[a] for a in axes)
    front = [use.shape[a] for a in (*use.stacked, *use.batch)]
    turned = jnp.reshape(w, use.shape).transpose(_order(use))
    return turned.reshape(*front, size(use.contracted), size(use.free))


def from_matrix(matrix: Array, use: Use, like: Array) -> Array:
    """The leaf whose `as_matrix` is the given one.

    Args:
      matrix: `[*stacked, *batch, n, m]`.
      use: the use that `as_matrix` was given.
      like: the leaf, for its shape and dtype; a `ShapeDtypeStruct` will do.

    Returns:
      The leaf, in the shape and dtype of `like`.

    Raises:
      ValueError: the use is no matrix product, or a shape is not that of its leaf.

    Example:
      >>> from jaxlab.rewrite import uses
      >>> apply = lambda p, x: x @ p["w"].T
      >>> params = {"w": jnp.arange(6.0).reshape(2, 3)}
      >>> (use,) = uses(apply, params, jnp.zeros((1, 3)))["w"]
      >>> matrix = as_matrix(params["w"], use)
      >>> bool((from_matrix(matrix, use, params["w"]) == params["w"]).all())
      True
    """
    _check(like, use, "like")
    order = _order(use)
    sizes = [use.shape[a] for a in order]
    if math.prod(matrix.shape) != math.prod(sizes):
        raise ValueError(f"a matrix of shape {matrix.shape} is not {use.path!r}: {use}")
    back = sorted(range(len(order)), key=order.__getitem__)
    turned = jnp.reshape(matrix, sizes).transpose(back)
    return turned.reshape(like.shape).astype(like.dtype)


def _order(use: Use) -> tuple[int, ...]:
    return (*use.stacked, *use.batch, *use.contracted, *use.free)


def _check(leaf: Array, use: Use, name: str) -> None:
    """Raises where the use is no matrix product of a leaf of this shape."""
    if len(_order(use)) != len(use.shape):
        raise ValueError(f"{use.primitive} of {use.path!r} is no matrix product")
    if math.prod(leaf.shape) != math.prod(use.shape):
        raise ValueError(
            f"{name} has shape {tuple(leaf.shape)}, but {use.path!r} is used as "
            f"{use.shape}"
        )
