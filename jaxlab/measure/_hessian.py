"""Curvature by random probes (Hutchinson, 1990)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from .. import tree
from ..types import Params
from ._sums import zeros


def hessian_diagonal(
    loss: Callable[..., Array],
    params: Params,
    *args: Any,
    samples: int = 1,
    key: PRNGKeyArray,
) -> Params:
    r"""The diagonal of the Hessian, estimated by Hutchinson's probes.

    $\hat d = \frac1S\sum_s v_s\odot Hv_s$, $v_s$ with independent entries $\pm1$, and
    $Hv$ the derivative of the gradient along $v$.

    Args:
      loss: `loss(params, *args)` gives a scalar; twice differentiable.
      params: `[*leaf]` the point, of floating-point leaves.
      *args: what else the loss takes, in any sharding.
      samples: $S$, the number of probes, each one gradient and its derivative.
      key: consumed. The draws of a leaf depend on its path and shape alone.

    Returns:
      `[*leaf]` in at least float32. Unbiased; exact where the Hessian is diagonal. Of a
      loss that sums over examples, the results of batches add up.

    Raises:
      ValueError: no samples, or a leaf that is not floating-point; names it.

    Degenerate inputs:
      A loss that is linear in a leaf gives 0 there.

    References:
      Bekas et al., 2007, "An estimator for the diagonal of a matrix",
      https://doi.org/10.1016/j.apnum.2007.01.003, eq. 4.

    Example:
      >>> loss = lambda w: jnp.sum(w**3)
      >>> hessian_diagonal(loss, jnp.array([1.0, 2.0]), key=jax.random.key(0))
      Array([ 6., 12.], dtype=float32)
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    gradient = jax.grad(lambda p: loss(p, *args))
    start = zeros(params)

    def probe(total: Params, i: Array) -> tuple[Params, None]:
        keys = tree.keys_like(jax.random.fold_in(key, i), params)
        sign = lambda k, x: jax.random.rademacher(k, jnp.shape(x), jnp.result_type(x))
        v = jax.tree.map(sign, keys, params)
        _, product = jax.jvp(gradient, (params,), (v,))
        add = lambda t, a, h: t + a.astype(t.dtype) * h.astype(t.dtype)
        return jax.tree.map(add, total, v, product), None

    total, _ = jax.lax.scan(probe, start, jnp.arange(samples))
    return jax.tree.map(lambda t: t / samples, total)


def hessian_trace(
    loss: Callable[..., Array],
    params: Params,
    *args: Any,
    samples: int = 1,
    key: PRNGKeyArray,
) -> Params:
    r"""The trace of the Hessian, leaf by leaf, estimated by Hutchinson's probes.

    $\mathrm{tr}\,H_l \approx \frac1S\sum_s v_{sl}^\top(Hv_s)_l$; the sum over leaves
    estimates the trace of the whole.

    Args:
      loss: `loss(params, *args)` gives a scalar; twice differentiable.
      params: `[*leaf]` the point, of floating-point leaves.
      *args: what else the loss takes, in any sharding.
      samples: $S$, the number of probes.
      key: consumed. The draws of a leaf depend on its path and shape alone.

    Returns:
      A tree of scalars, in at least float32. Unbiased, with a variance of
      $2\sum_{i\ne j}H_{ij}^2/S$ for the whole: exact where the Hessian is diagonal.

    Raises:
      ValueError: no samples, or a leaf that is not floating-point; names it.

    Degenerate inputs:
      A loss that is linear in a leaf gives 0 there.

    References:
      Hutchinson, 1990, "A Stochastic Estimator of the Trace of the Influence Matrix",
      https://doi.org/10.1080/03610919008812866; per leaf as in Yao et al., 2020,
      "PyHessian", https://arxiv.org/abs/1912.07145, Algorithm 2.

    Example:
      >>> loss = lambda w: jnp.sum(w**3)
      >>> float(hessian_trace(loss, jnp.array([1.0, 2.0]), key=jax.random.key(0)))
      18.0
    """
    diagonal = hessian_diagonal(loss, params, *args, samples=samples, key=key)
    return jax.tree.map(jnp.sum, diagonal)
