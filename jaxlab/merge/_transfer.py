"""Fine-tuning transfer between versions of a base model (Lin et al., 2025)."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._base import add, task_vectors
from ._coefficients import narrow, slices, spread, wide


def transfer(models: Stacked, *, scale: PerModel = 1.0) -> Params:
    r"""Moves what one base model learnt onto another version of it.

    $m_t + \lambda\Delta_s$ with the diff vector $\Delta_s = m'_s - m_s$.

    Args:
      models: `[3, *leaf]` the tuned source $m'_s$, the source $m_s$, the target $m_t$.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced. 1 in the
        paper.

    Returns:
      `[*leaf]` the model, in the dtypes of `models`, rounded once.

    Raises:
      ValueError: there are not exactly three models, or a leaf is not floating-point.

    Degenerate inputs:
      A scale of 0 gives the target; a target equal to the source gives the tuned source
      (to rounding).

    References:
      Lin et al., 2025, "Efficient Model Development through Fine-tuning Transfer",
      https://arxiv.org/abs/2503.20110, Section 2. It works best between bases that are
      linearly connected: see `measure.linear_connectivity`. The authors' code pads a
      smaller vocabulary with zero rows; here the trees must have equal shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> transfer({"w": jnp.array([[3.0], [1.0], [10.0]])})
      {'w': Array([12.], dtype=float32)}
    """
    x = wide(models, name="models", k=3)
    factor = spread(scale, x, name="scale", per_model=False)

    def leaf(v: Float[Array, "3 ..."], s: Any) -> Float[Array, "..."]:
        tuned, source, target = slices(v)
        return target + s.astype(v.dtype) * (tuned - source)

    return narrow(jax.tree.map(leaf, x, factor), models)


def recycle(
    bases: Iterable[Params],
    finetune: Callable[[Params], Params],
    *,
    scale: float = 1.0,
) -> Iterator[Params]:
    r"""Tunes each version of a base model, starting from what the last one learnt.

    $m_1' = \mathrm{tune}(m_1)$ and $m_i' = \mathrm{tune}(m_i + \lambda\Delta_{i-1})$
    with $\Delta_i = m_i' - m_i$: the diff vectors accumulate over the versions.

    Args:
      bases: the versions $m_1, m_2, \dots$, oldest first. They are taken one at a time.
      finetune: from initial parameters to tuned ones, of the same structure.
      scale: $\lambda$: how much of the last diff vector the next start takes; 0 tunes
        every version from scratch.

    Yields:
      The tuned models $m_i'$, one per version.

    Raises:
      ValueError: a version, or what `finetune` returns, has another structure.

    Degenerate inputs:
      No version gives no model; a `finetune` that changes nothing gives the bases.

    References:
      Lin et al., 2025, https://arxiv.org/abs/2503.20110, Algorithm 1,
      "recycling-then-finetuning".

    Example:
      >>> import jax.numpy as jnp
      >>> bases = [{"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}]
      >>> halfway = lambda params: {"w": (params["w"] + 9.0) / 2}
      >>> [float(tuned["w"][0]) for tuned in recycle(bases, halfway)]
      [5.0, 7.5]
    """
    delta = None
    for base in bases:
        start = base if delta is None else add(base, delta, scale=scale)
        tuned = finetune(start)
        yield tuned
        stack = jax.tree.map(lambda x: x[None], tuned)
        delta = jax.tree.map(lambda x: x[0], task_vectors(stack, base))
