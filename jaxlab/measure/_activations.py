"""Moments of what the weights of a model multiply."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import rewrite, tree
from ..types import Apply, Params, Where
from ._gaussian import Gaussian
from ._sums import second_moment

Only = Callable[[rewrite.Use], bool]
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


class Norms(NamedTuple):
    """Sums of squares of n features; those of batches add up."""

    count: Float[Array, "*batch"]  # of rows
    squares: Float[Array, "*batch n"]


def gram(
    apply: Apply,
    params: Params,
    *inputs: Any,
    where: Where | None = None,
    only: Only | None = None,
) -> dict[str, Array]:
    r"""The Gram matrix of the inputs of weights: $G = X^\top X$, not centred.

    Args:
      apply: the function `apply(params, *inputs)`.
      params: its parameters.
      *inputs: its inputs, in any sharding: one batch.
      where: which leaves; where None all that are multiplied as matrices or kernels.
      only: which of their uses; by default those products, so that a table that is
        looked up and is the output layer too counts as the latter.

    Returns:
      `{path: [*stacked, *batch, n, n]}` in at least float32, n as in
      `rewrite.as_matrix`: the input features of a dense layer, the patches of a
      convolution. Sums over rows (examples, positions): the results of batches add up.

    Raises:
      ValueError: nothing is selected, or a leaf has no such use; names it.

    Degenerate inputs:
      No rows give zeros.

    References:
      Jin et al., 2022, "Dataless Knowledge Fusion by Merging Weights of Language
      Models", https://arxiv.org/abs/2212.09849, Section 3.

    Example:
      >>> apply = lambda p, x: x @ p["w"]
      >>> params = {"w": jnp.ones((2, 1))}
      >>> gram(apply, params, jnp.array([[1.0, 2.0]]))["w"].tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    return _captured(apply, params, inputs, where, only, second_moment)


def activation_norms(
    apply: Apply,
    params: Params,
    *inputs: Any,
    where: Where | None = None,
    only: Only | None = None,
) -> dict[str, Norms]:
    r"""The squared norm of every input feature of weights: $\|X_j\|_2^2$.

    Args:
      apply: the function `apply(params, *inputs)`.
      params: its parameters.
      *inputs: its inputs, in any sharding: one batch.
      where: as in `gram`.
      only: as in `gram`.

    Returns:
      `{path: Norms(count [*stacked, *batch], squares [*stacked, *batch, n])}`. Both add
      up over batches; the root of `squares` is Wanda's norm, `squares / count` the
      mean square.

    Raises:
      ValueError: as `gram`.

    Degenerate inputs:
      No rows give zeros.

    References:
      Sun et al., 2023, "A Simple and Effective Pruning Approach for Large Language
      Models", https://arxiv.org/abs/2306.11695, eq. 1.

    Example:
      >>> apply = lambda p, x: x @ p["w"]
      >>> params = {"w": jnp.ones((2, 1))}
      >>> activation_norms(apply, params, jnp.array([[3.0, 0.0], [4.0, 1.0]]))["w"]
      Norms(count=Array(2., dtype=float32), squares=Array([25.,  1.], dtype=float32))
    """

    def norms(x: Array) -> Norms:
        x = tree.widen(x)
        return Norms(_rows(x), jnp.sum(jnp.square(x), -2))

    return _captured(apply, params, inputs, where, only, norms)


def covariance(
    apply: Apply,
    params: Params,
    *inputs: Any,
    where: Where | None = None,
    only: Only | None = None,
    per_feature: bool = False,
) -> dict[str, Gaussian]:
    r"""The mean and the centred covariance of the inputs of weights.

    Args:
      apply: the function `apply(params, *inputs)`.
      params: its parameters.
      *inputs: its inputs, in any sharding: one batch.
      where: as in `gram`.
      only: as in `gram`; elementwise uses too, as that of a norm's mean.
      per_feature: only variances: n Gaussians of one feature each, `[..., n, 1]`.

    Returns:
      `{path: Gaussian}` with the leading axes `[*stacked, *batch]`, divided by the
      number of rows. Those of batches are joined by `pool`.

    Raises:
      ValueError: as `gram`.

    Degenerate inputs:
      No rows give zeros, the neutral element of `pool`.

    References:
      Chan, Golub & LeVeque, 1979,
      http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773, Section 2. The uses of a
      tied leaf are joined by their sums, so there, and there alone, a mean far above
      the deviation costs digits.

    Example:
      >>> apply = lambda p, x: x @ p["w"]
      >>> params = {"w": jnp.ones((1, 1))}
      >>> covariance(apply, params, jnp.array([[0.0], [2.0]]))["w"].covariance
      Array([[1.]], dtype=float32)
    """
    alone = lambda x: _sums(jnp.swapaxes(x, -1, -2)[..., None])
    reduce = alone if per_feature else _sums
    sums = _captured(apply, params, inputs, where, only, reduce)
    return {path: _gaussian(*parts) for path, parts in sums.items()}


def products(use: rewrite.Use) -> bool:
    """Is the leaf multiplied as a matrix or a kernel, rather than looked up?"""
    return use.primitive in PRODUCTS and bool(use.contracted)


def _captured(
    apply: Apply,
    params: Params,
    inputs: tuple[Any, ...],
    where: Where | None,
    only: Only | None,
    reduce: Callable[[Array], Any],
) -> dict[str, Any]:
    """A statistic of the inputs of the selected leaves."""
    only = only or products
    if where is None:
        uses = rewrite.uses(apply, params, *inputs)
        where = lambda path, _: any(only(use) for use in uses[path])
    captured = rewrite.capture(apply, where=where, reduce=reduce, only=only)
    return captured(params, *inputs)[1]


def _rows(x: Float[Array, "*batch b n"]) -> Float[Array, "*batch"]:
    """How many rows there are."""
    return jnp.full(x.shape[:-2], x.shape[-2], x.dtype)


def _sums(x: Float[Array, "*batch b n"]) -> tuple[Array, Array, Array, Array]:
    """What adds up: rows, their sum, and the scatter within and of this use."""
    x = tree.widen(x)
    count, total = _rows(x), jnp.sum(x, -2)
    mean = _mean(count, total)
    within = second_moment(x - mean[..., None, :])
    return count, total, within, _scatter(count, mean)


def _gaussian(count: Array, total: Array, within: Array, between: Array) -> Gaussian:
    """The moments; with one use, what is between uses is 0 to the bit."""
    mean = _mean(count, total)
    scatter = within + (between - _scatter(count, mean))
    return Gaussian(count, mean, scatter / _least(count)[..., None, None])


def _scatter(count: Array, mean: Array) -> Float[Array, "*batch n n"]:
    """The scatter of as many rows that all are the mean."""
    outer = mean[..., :, None] * mean[..., None, :]
    return jax.lax.optimization_barrier(count[..., None, None] * outer)


def _mean(count: Array, total: Array) -> Float[Array, "*batch n"]:
    """The mean; 0 of no rows."""
    return total / _least(count)[..., None]


def _least(count: Array) -> Array:
    """The count, or 1 where it is 0."""
    return jnp.maximum(count, 1)
