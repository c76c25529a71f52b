"""EMR-Merging: elect, mask and rescale (Huang et al., 2024)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from .. import tree
from ..types import Params, Stacked
from ._coefficients import models, narrow, slices, total, wide

By = Literal["entry", "leaf"]
"""What weighs alike in the size of a task vector: its entries, or its leaves."""


class EMR(NamedTuple):
    """What EMR-Merging stores: one task vector, one bit per task and entry, k numbers.

    Attributes:
      unified: `[*leaf]` the elected task vector.
      masks: `[k, *leaf]` booleans: where a task agrees with it in sign.
      rescalers: `[k]` the size of a task vector over that of its masked one.
    """

    unified: Params
    masks: Stacked
    rescalers: Float[Array, " k"]


def emr(deltas: Stacked, *, by: By = "entry") -> EMR:
    r"""One task vector for all tasks, with a mask and a scalar for each.

    $\gamma = \mathrm{sgn}\sum_k\tau_k$, $\tau_{uni} = \gamma\max\{|\tau_k| :
    \mathrm{sgn}\,\tau_k = \gamma\}$, $M_k = [\tau_k\gamma > 0]$ and $\lambda_k =
    \sum|\tau_k| / \sum|M_k \odot \tau_{uni}|$; `emr_task` gives task k back as
    $\lambda_k M_k \odot \tau_{uni}$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      by: "entry" sums all entries alike in $\lambda_k$ (the paper); "leaf" sums the
        means of the leaves (the authors' code, FusionBench).

    Returns:
      `(unified, masks, rescalers)`: `[*leaf]` in the dtypes of `deltas`, `[k, *leaf]`
      booleans, and `[k]` in at least float32.

    Raises:
      ValueError: an unknown `by`, or a leaf that is not floating-point.

    Degenerate inputs:
      A tied election elects -, as in the authors' code. A task that agrees nowhere gets
      the rescaler 1, and the task vector 0. With k = 1 the task comes back exactly.

    References:
      Huang et al., 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging",
      https://arxiv.org/abs/2405.17461, Section 3.2 and Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> parts = emr({"w": jnp.array([[4.0, -1.0], [2.0, 5.0]])})
      >>> parts.unified["w"], parts.rescalers * 36
      (Array([4., 5.], dtype=float32), Array([45., 28.], dtype=float32))
    """
    if by not in ("entry", "leaf"):
        raise ValueError(f"by must be 'entry' or 'leaf', got {by!r}")
    x = wide(deltas, name="deltas")
    positive = jax.tree.map(lambda v: total(slices(v)) > 0, x)
    masks = jax.tree.map(_agrees, x, positive)
    unified = jax.tree.map(_largest, x, masks, positive)
    masked = jax.tree.map(lambda m, u: jnp.where(m, u[None], 0), masks, unified)
    whole, left = _sizes(x, by), _sizes(masked, by)
    empty = left == 0
    rescalers = jnp.where(empty, 1, whole / jnp.where(empty, 1, left))
    return EMR(narrow(unified, deltas), masks, rescalers)


def emr_task(parts: EMR, task: int | Int[Array, ""]) -> Params:
    r"""The task vector of one task: $\lambda_k M_k \odot \tau_{uni}$.

    Args:
      parts: what `emr` gave.
      task: which one, from 0. May be traced.

    Returns:
      `[*leaf]` task vector, in the dtypes of the unified one, rounded once.

    Raises:
      ValueError: there is no such task.

    Degenerate inputs:
      A task whose mask is empty gives 0. A traced number beyond the last task gives the
      last, as JAX indexes.

    References:
      Huang et al., 2024, https://arxiv.org/abs/2405.17461, Equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> emr_task(emr({"w": jnp.array([[4.0, -1.0], [2.0, 3.0]])}), 0)
      {'w': Array([5., 0.], dtype=float32)}
    """
    k = parts.rescalers.shape[0]
    if isinstance(task, int) and not -k <= task < k:
        raise ValueError(f"there are {k} tasks, numbered from 0; got {task}")

    def leaf(u: Array, m: Bool[Array, "k ..."]) -> Array:
        widened = tree.widen(u)
        factor = parts.rescalers[task].astype(widened.dtype)
        return (factor * jnp.where(m[task], widened, 0)).astype(u.dtype)

    return jax.tree.map(leaf, parts.unified, parts.masks)


def _agrees(v: Float[Array, "k ..."], positive: Array) -> Bool[Array, "k ..."]:
    """Which entries of each model have the elected sign."""
    return jnp.where(positive[None], v > 0, v < 0)


def _largest(v: Float[Array, "k ..."], mask: Array, positive: Array) -> Array:
    """The largest magnitude among what agrees, with the elected sign."""
    size = jnp.max(jnp.where(mask, jnp.abs(v), 0), axis=0)
    return jnp.where(positive, size, -size)


def _sizes(x: Stacked, by: By) -> Float[Array, " k"]:
    """The sum of magnitudes of each model, or of the means of its leaves."""
    reduce: Any = jnp.sum if by == "entry" else jnp.mean
    one = lambda v: reduce(jnp.abs(v).reshape(v.shape[0], -1), axis=1)
    parts = [one(v) for v in jax.tree.leaves(x)]
    dtype = np.result_type(np.float32, *(p.dtype for p in parts))
    return total([p.astype(dtype) for p in parts] or [jnp.zeros(models(x), dtype)])
