"""Leaves as the matrices that the methods of singular vectors work on.

The rule, where nothing is declared, goes by the number of axes: `[n, m]` is a matrix;
`[e, n, m]` one for each e (experts, stacked layers); with four axes or more the last
is m and all others are n (a convolution's `[height, width, in, out]`). A leaf with
fewer than two axes is a vector. n counts inputs and m outputs: $y = xW$.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, Literal

import jax
from jaxtyping import Array, Float

from .. import rewrite, tree
from ..types import Params, Stacked
from ._coefficients import mix

Axes = Literal["nm", "mn"] | Mapping[str, Any]
"""What the axes of a leaf are.

"nm": the rule above; "mn": the same for PyTorch's layouts, `[m, n]`, `[e, m, n]` and
`[m, n, ...]`; a mapping of paths or globs to a letter per axis ("b" for one matrix
each, "n" for in, "m" for out; "" for a vector), or to what `rewrite.uses` says of the
leaf, and "nm" for leaves that are not in it.
"""


def per_matrix(
    method: Callable[..., Array],
    stacked: Stacked,
    *rest: Any,
    axes: Axes,
    vector: Callable[..., Array] | None = None,
) -> Params:
    """Applies a method of `[k, *batch, n, m]` to every leaf that holds matrices.

    It returns `[*batch, n, m]`. Vectors get `vector`, their mean where None. Leaves of
    `rest` come along: those of the shape of one model's leaf as matrices too.
    """

    def leaf(path: str, x: Array, *more: Any) -> Array:
        use = matrix_use(path, x.shape[1:], axes)
        if use is None:
            return (vector or mean)(x, *more)
        like: Any = jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        alike = [
            rewrite.as_matrix(m, use) if m.shape == like.shape else m for m in more
        ]
        return rewrite.from_matrix(method(as_matrices(x, use), *alike), use, like)

    return tree.path_map(leaf, stacked, *rest)


def as_matrices(x: Array, use: rewrite.Use) -> Float[Array, "k *batch n m"]:
    """The matrices of k stacked leaves."""
    return jax.vmap(lambda w: rewrite.as_matrix(w, use))(x)


def mean(x: Float[Array, "k ..."], *rest: Any) -> Array:
    """The plain mean of k models."""
    del rest
    return mix([x.dtype.type(1 / len(x))] * len(x), x)


def matrix_use(path: str, shape: tuple[int, ...], axes: Axes) -> rewrite.Use | None:
    """How a leaf is a matrix, or None where it is a vector; raises on bad letters."""
    if not math.prod(shape):
        return None
    declared: Any = axes
    leaf: Any = None  # a glob looks at the path alone
    if isinstance(axes, Mapping):
        found = [v for name, v in axes.items() if tree.glob(name)(path, leaf)]
        declared = axes[path] if path in axes else found[0] if found else "nm"
    if declared in ("nm", "mn"):
        declared = _rule(len(shape), declared == "nm")
    if isinstance(declared, str):
        return _spelled(path, shape, declared)
    uses = (declared,) if isinstance(declared, rewrite.Use) else tuple(declared)
    products = [u for u in uses if u.contracted and u.free]
    return products[0] if products else None


def _rule(ndim: int, inputs_first: bool) -> str:
    """The letters of a leaf that nothing is said about."""
    if ndim < 2:
        return ""
    if ndim == 3:
        return "bnm" if inputs_first else "bmn"
    ends = "n" * (ndim - 1)
    return ends + "m" if inputs_first else "m" + ends


def _spelled(path: str, shape: tuple[int, ...], letters: str) -> rewrite.Use | None:
    """The use that letters spell, one per axis."""
    if not letters:
        return None
    where = {c: tuple(i for i, x in enumerate(letters) if x == c) for c in "bnm"}
    known = sum(map(len, where.values())) == len(letters) == len(shape)
    if not (known and where["n"] and where["m"]):
        raise ValueError(
            f"axes of {path!r} are {letters!r}: a leaf of shape {shape} needs one of "
            f"'b', 'n', 'm' per axis, with an 'n' and an 'm', or '' for a vector"
        )
    return rewrite.Use(path, "", (), where["b"], where["n"], where["m"], shape)
