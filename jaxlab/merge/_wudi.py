"""WUDI-Merging (Cheng et al., 2025)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, spread, total, wide
from ._matrices import Axes, per_matrix
from ._svd import product, t


def wudi(
    deltas: Stacked,
    *,
    steps: int = 300,
    learning_rate: PerModel = 1e-5,
    axes: Axes = "nm",
) -> Params:
    r"""Moves the summed task vectors until they disturb no task's own directions.

    Minimises $\sum_k \|(\tau - \tau_k)\,\tau_k^T\|_F^2 / \|\tau_k\|_F^2$ for each
    linear layer (in the paper's layout `[out, in]`), by Adam from $\sum_k\tau_k$. Its
    gradient is $\tau H - C$ with $H = 2\sum_k \tau_k^T\tau_k/\|\tau_k\|^2$ and $C =
    2\sum_k \tau_k\tau_k^T\tau_k/\|\tau_k\|^2$: one matrix product per step.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      steps: how many steps of Adam.
      learning_rate: of Adam: a scalar, or a tree of scalars by leaf. May be traced. It
        is a length in weight space: with another scale of weights it wants another
        value.
      axes: as in `iso_c`. Directions are those of the inputs n.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices get the mean.

    Raises:
      ValueError: a negative number of steps, or letters that do not fit a leaf.

    Degenerate inputs:
      A task vector of 0 asks for nothing. With `steps=0` the result is the sum, and one
      model gives itself.

    References:
      Cheng et al., 2025, "Whoever Started the Interference Should End It: Guiding
      Data-Free Model Merging via Task Vectors", https://arxiv.org/abs/2503.08099,
      Equation 9 and Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> deltas = {"w": jnp.array([[[1.0, 0.0]], [[0.0, 2.0]]])}
      >>> wudi(deltas, steps=0)["w"].tolist()
      [[1.0, 2.0]]
    """
    import optax  # of use here alone, and slow to import

    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    stacked = wide(deltas, name="deltas")
    rate = spread(learning_rate, stacked, name="learning_rate", per_model=False)

    def matrix(x: Float[Array, "k *batch n m"], rate: Any) -> Array:
        if len(x) == 1:
            return x[0]
        # 1e-30 is nothing to a value, and keeps the root's derivative finite at 0.
        adam = optax.adam(jnp.asarray(rate, x.dtype), eps_root=1e-30)
        square = jnp.sum(x**2, (-2, -1), keepdims=True)
        unit = 2 * x / jnp.where(square > 0, square, 1)
        inner = [product(u, t(v)) for u, v in zip(slices(unit), slices(x), strict=True)]
        hessian = total(inner)
        pull = total([product(h, v) for h, v in zip(inner, slices(x), strict=True)])

        def step(carry: Any, _: None) -> tuple[Any, None]:
            tau, state = carry
            slope = product(hessian, tau) - pull
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                update, state = adam.update(slope, state)
            return (tau + update, state), None

        start = total(slices(x))
        first: Any = start, adam.init(start)
        return jax.lax.scan(step, first, length=steps)[0][0]

    return narrow(per_matrix(matrix, stacked, rate, axes=axes), deltas)
