"""The diagonal Fisher information (Fisher, 1922; Matena & Raffel, 2021)."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from .. import tree
from ..types import Apply, Params
from ._microbatches import length, microbatches
from ._sums import zeros

Likelihood = Literal["categorical", "gaussian"]
"""What the outputs of a model parametrise.

"categorical": logits along the last axis; "gaussian": the mean, with unit variance.
"""

Score = Callable[[Array, Any, Array], tuple[Array, Array]]
"""(output, data, i) -> (weight, gradient of the i-th log-likelihood by the output)."""


def fisher(
    apply: Apply,
    params: Params,
    *inputs: Any,
    likelihood: Likelihood = "categorical",
    batch_size: int | None = None,
) -> Params:
    r"""The exact diagonal Fisher information, summed over examples.

    $\hat F = \sum_i \mathbb E_{y\sim p_\theta(y|x_i)}
    \big(\nabla_\theta\log p_\theta(y|x_i)\big)^2$, with the expectation taken in full:
    one gradient per example and class.

    Args:
      apply: `apply(params, *inputs)` gives `[b, *positions, m]`, example by example.
      params: `[*leaf]` the model $\theta$, of floating-point leaves.
      *inputs: trees of `[b, ...]`, in any sharding.
      likelihood: what the outputs are: logits, or the mean of a Gaussian of unit
        variance. Positions of one example are independent given the outputs.
      batch_size: how many examples go at once, each with a gradient in memory; all
        where None. It does not change the result.

    Returns:
      `[*leaf]` in at least float32. Sums: the results of batches add up to that of all
      data; divided by the number of examples it is the paper's mean.

    Raises:
      ValueError: a leaf is not floating-point, inputs of different length, or a bad
        option.

    Degenerate inputs:
      A leaf without influence has 0. No examples give 0.

    References:
      Matena & Raffel, 2021, "Merging Models with Fisher-Weighted Averaging",
      https://arxiv.org/abs/2111.09832, Section 2.2. A sum where the paper has a mean.

    Example:
      >>> model = lambda w, x: x @ w
      >>> x, w = jnp.ones((1, 1)), jnp.zeros((1, 2))
      >>> fisher(model, w, x)
      Array([[0.25, 0.25]], dtype=float32)
    """
    count, outcome = _outcomes(likelihood)
    return _squares(apply, params, inputs, None, outcome, count, batch_size)


def fisher_monte_carlo(
    apply: Apply,
    params: Params,
    *inputs: Any,
    samples: int = 1,
    likelihood: Likelihood = "categorical",
    batch_size: int | None = None,
    key: PRNGKeyArray,
) -> Params:
    r"""The diagonal Fisher with labels drawn from the model, summed over examples.

    $\hat F = \sum_i \frac1S\sum_s \big(\nabla_\theta\log p_\theta(y_{is}|x_i)\big)^2$,
    $y_{is}\sim p_\theta(y|x_i)$: its expectation is `fisher`.

    Args:
      apply: `apply(params, *inputs)` gives `[b, *positions, m]`, example by example.
      params: `[*leaf]` the model $\theta$, of floating-point leaves.
      *inputs: trees of `[b, ...]`, in any sharding.
      samples: $S$, the draws per example.
      likelihood: as in `fisher`.
      batch_size: as in `fisher`; it changes no draw.
      key: consumed.

    Returns:
      `[*leaf]` in at least float32; sums over examples, as in `fisher`.

    Raises:
      ValueError: as `fisher`, or no samples.

    Degenerate inputs:
      As in `fisher`.

    References:
      Matena & Raffel, 2021, https://arxiv.org/abs/2111.09832, Section 2.2.

    Example:
      >>> model = lambda w, x: x @ w
      >>> x, w = jnp.ones((1, 1)), jnp.zeros((1, 2))
      >>> fisher_monte_carlo(model, w, x, key=jax.random.key(0))
      Array([[0.25, 0.25]], dtype=float32)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    score = _score(likelihood)

    def drawn(f: Array, key: PRNGKeyArray, i: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(key, i)
        if likelihood == "categorical":
            y = jax.random.categorical(key, f)
        else:
            y = f + jax.random.normal(key, f.shape, f.dtype)
        return jnp.asarray(1 / samples, f.dtype), score(f, y)

    keys = jax.random.split(key, length(inputs))
    return _squares(apply, params, inputs, keys, drawn, lambda _: samples, batch_size)


def fisher_empirical(
    apply: Apply,
    params: Params,
    *inputs: Any,
    labels: Array,
    likelihood: Likelihood = "categorical",
    batch_size: int | None = None,
) -> Params:
    r"""The empirical diagonal Fisher, of given labels, summed over examples.

    $\hat F = \sum_i \big(\nabla_\theta\log p_\theta(y_i|x_i)\big)^2$.

    Args:
      apply: `apply(params, *inputs)` gives `[b, *positions, m]`, example by example.
      params: `[*leaf]` the model $\theta$, of floating-point leaves.
      *inputs: trees of `[b, ...]`, in any sharding.
      labels: the $y_i$: classes `[b, *positions]`, or `[b, *positions, m]` targets
        where the likelihood is Gaussian.
      likelihood: as in `fisher`.
      batch_size: as in `fisher`.

    Returns:
      `[*leaf]` in at least float32; sums over examples, as in `fisher`.

    Raises:
      ValueError: as `fisher`, or labels that fit neither the inputs nor the outputs.

    Degenerate inputs:
      An example that the model fits perfectly counts 0, whatever its curvature. A class
      outside of the logits counts as none.

    References:
      Kunstner et al., 2019, "Limitations of the Empirical Fisher Approximation",
      https://arxiv.org/abs/1905.12558, Section 3, for what it is not.

    Example:
      >>> model = lambda w, x: x @ w
      >>> x, w = jnp.ones((1, 1)), jnp.zeros((1, 2))
      >>> fisher_empirical(model, w, x, labels=jnp.array([1]))
      Array([[0.25, 0.25]], dtype=float32)
    """
    score = _score(likelihood)

    def given(f: Array, y: Array, i: Array) -> tuple[Array, Array]:
        del i
        want = f.shape[:-1] if likelihood == "categorical" else f.shape
        if y.shape != want:
            raise ValueError(
                f"labels have the shape {y.shape} per example, expected {want} beside "
                f"outputs of shape {f.shape}"
            )
        return jnp.ones((), f.dtype), score(f, y)

    return _squares(apply, params, inputs, labels, given, lambda _: 1, batch_size)


def _score(likelihood: Likelihood) -> Callable[[Array, Array], Array]:
    """The gradient of the log-likelihood of a label, by the output."""
    if likelihood == "categorical":
        hot = lambda f, y: jax.nn.one_hot(y, f.shape[-1], dtype=f.dtype)
        return lambda f, y: hot(f, y) - jax.nn.softmax(f)
    if likelihood == "gaussian":
        return lambda f, y: y.astype(f.dtype) - f
    raise ValueError(f"likelihood must be 'categorical' or 'gaussian': {likelihood!r}")


def _outcomes(likelihood: Likelihood) -> tuple[Callable[[Array], int], Score]:
    """How many terms the expectation has, and the i-th: a class at a position."""
    score = _score(likelihood)

    def outcome(f: Array, data: None, i: Array) -> tuple[Array, Array]:
        del data
        here = (jnp.arange(f.size) == i).astype(f.dtype).reshape(f.shape)
        if likelihood == "gaussian":
            return jnp.ones((), f.dtype), here
        column = jnp.full(f.shape[:-1], i % f.shape[-1])
        position = jnp.sum(here, -1, keepdims=True)
        return jnp.sum(here * jax.nn.softmax(f)), position * score(f, column)

    return lambda f: f.size, outcome


def _squares(
    apply: Apply,
    params: Params,
    inputs: tuple[Any, ...],
    data: Any,
    score: Score,
    count: Callable[[Array], int],
    batch_size: int | None,
) -> Params:
    """Sums weighted squares of gradients over examples, a microbatch at a time."""
    start = zeros(params)
    b = length((inputs, data))

    def example(x: tuple[Any, ...], data: Any) -> Params:
        alone = jax.tree.map(lambda v: v[None], x)
        out, pull = jax.vjp(lambda p: apply(p, *alone)[0], params)
        wide = tree.widen(out)

        def term(total: Params, i: Int[Array, ""]) -> tuple[Params, None]:
            weight, cotangent = score(wide, data, i)
            (gradient,) = pull(cotangent.astype(out.dtype))
            add = lambda t, g: (
                t + weight.astype(t.dtype) * jnp.square(g.astype(t.dtype))
            )
            return jax.tree.map(add, total, gradient), None

        return jax.lax.scan(term, start, jnp.arange(count(out)))[0]

    def batch(total: Params, args: Any) -> tuple[Params, None]:
        each = jax.vmap(example)(*args)
        return jax.tree.map(lambda t, v: t + jnp.sum(v, 0), total, each), None

    return microbatches(batch, start, (inputs, data), b, batch_size)
