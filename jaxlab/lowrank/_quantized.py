"""A leaf in few bits, as the other modules see it."""

import dataclasses
import functools as ft
from typing import Any

import jax
from jax import Array

from .. import rewrite


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q",),
    meta_fields=("use", "shape", "dtype"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A leaf kept as a `qwix.QArray` of its matrices, one scale per block and output.

    `attach` takes a model with such leaves: inside, each operation dequantizes its own
    weight, one layer of a scan at a time.
    """

    q: Any
    """`[*stacked, *batch, n, m]` in few bits, and the scales of its blocks."""
    use: rewrite.Use
    """How the leaf is a matrix."""
    shape: tuple[int, ...]
    """That of the leaf."""
    dtype: Any
    """That of the leaf: what it dequantizes to."""

    @property
    def matrix(self) -> Array:
        """The values as `[*stacked, *batch, n, m]`; also of one layer's slice."""
        import qwix

        return qwix.dequantize(self.q).astype(self.dtype)

    def dequantized(self) -> Array:
        """The leaf."""
        like: Any = jax.ShapeDtypeStruct(self.shape, self.dtype)
        return rewrite.from_matrix(self.matrix, self.use, like)


def is_quantized(x: Any) -> bool:
    """Whether this is a quantized leaf."""
    return isinstance(x, Quantized)


def matrices(w: Any, use: rewrite.Use) -> Any:
    """The matrices of a leaf; a quantized one is kept as it is."""
    return w if is_quantized(w) else rewrite.as_matrix(w, use)


def dense_matrices(w: Any, use: rewrite.Use) -> Array:
    """The matrices of a leaf, plain or quantized."""
    return w.matrix if is_quantized(w) else rewrite.as_matrix(w, use)


def dense_leaf(w: Any) -> Array:
    """The values of a leaf, plain or quantized."""
    return w.dequantized() if is_quantized(w) else w
