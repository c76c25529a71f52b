"""Adaptive projective gradient descent, DOGE-TA (Wei et al., 2025)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, spread, total, wide
from ._gram import root
from ._matrices import Axes, per_matrix
from ._svd import product, significant, svd, t
from ._trim import Per, trim


def doge_ta(
    deltas: Stacked,
    *,
    density: PerModel = 0.3,
    scale: PerModel = 0.07,
    subspace: int = 6,
    steps: int = 400,
    learning_rate: PerModel = 1e-4,
    per: Per = "tree",
    axes: Axes = "nm",
) -> Params:
    r"""Task arithmetic with a shift of all tasks that lessens their conflicts.

    For each matrix (in the paper's layout `[out, in]`), with $\lambda_k =
    \lambda/\|\tau_k\|$ of the leaf, and row r of $\tau_k$ called $v_{kr}$: $\Delta$
    minimises $\sum_{k,r} \langle v_{kr}, v_{kr} - \sum_j\lambda_j(v_{jr} +
    \delta_r)\rangle^2$ by Adam from 0, its gradient projected away from the tasks'
    first left singular vectors. Then $\tau = \sum_k\lambda_k\,m_k \odot (\tau_k +
    \Delta)$.

    Args:
      deltas: `[k, *leaf]` task vectors $\tau_k$.
      density: the fraction of each $\tau_k$ that its mask $m_k$ keeps, in (0, 1], as in
        `trim`. May be traced.
      scale: $\lambda$, the length that each task adds to a leaf: a scalar, or a tree of
        scalars by leaf. May be traced.
      subspace: a matrix of full rank r protects `r // subspace` directions.
      steps: how many steps of Adam.
      learning_rate: of Adam: a scalar, or a tree of scalars by leaf. May be traced.
      per: "tree" or "leaf", as in `trim`.
      axes: as in `iso_c`. Rows are those of the outputs m.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices are merged with $\Delta = 0$.

    Raises:
      ValueError: an option out of range, or letters that do not fit a leaf.

    Degenerate inputs:
      A task vector of 0 has the weight 0. An entry of 0 is not shifted.

    References:
      Wei et al., 2025, "Modeling Multi-Task Model Merging as Adaptive Projective
      Gradient Descent", https://arxiv.org/abs/2501.01230, Section 3, as in the authors'
      code, whose masks keep one entry more, and which leaves leaves out that are no
      matrices.

    Example:
      >>> import jax.numpy as jnp
      >>> deltas = {"b": jnp.array([[3.0, 4.0]])}
      >>> doge_ta(deltas, density=1.0, scale=0.5)["b"]
      Array([0.3, 0.4], dtype=float32)
    """
    if subspace < 1 or steps < 0:
        raise ValueError(
            f"subspace must be at least 1 and steps at least 0, got {subspace}, {steps}"
        )
    x = wide(deltas, name="deltas")
    length = spread(scale, x, name="scale", per_model=False)
    rate = spread(learning_rate, x, name="learning_rate", per_model=False)

    def matrix(v: Float[Array, "k *batch n m"], length: Any, rate: Any) -> Array:
        return t(_shift(t(v), _weights(v, length), subspace, steps, rate))

    none = lambda v, *_: jnp.zeros_like(v[0])
    shift = per_matrix(matrix, x, length, rate, axes=axes, vector=none)

    def leaf(v: Array, kept: Array, d: Array, c: Any) -> Array:
        parts = zip(slices(v), slices(kept), _weights(v, c), strict=True)
        return total([w * jnp.where(m != 0, y + d, 0) for y, m, w in parts])

    kept = trim(x, density=density, per=per)
    return narrow(jax.tree.map(leaf, x, kept, shift, length), deltas)


def _weights(v: Float[Array, "k ..."], length: Any) -> list[Array]:
    """The length over the norm of each task vector, 0 for one of 0."""
    norms = [root(jnp.sum(y**2)) for y in slices(v)]
    length = jnp.asarray(length, v.dtype)
    return [jnp.where(n > 0, length / jnp.where(n > 0, n, 1), 0) for n in norms]


def _shift(
    w: Float[Array, "k *batch m n"],
    weights: list[Array],
    subspace: int,
    steps: int,
    rate: Any,
) -> Float[Array, "*batch m n"]:
    """The shift of one matrix's tasks, in the paper's layout."""
    import optax  # slow to import

    adam = optax.adam(jnp.asarray(rate, w.dtype), eps_root=1e-30)
    left = _protected(w, subspace)
    mean = total([c * v for c, v in zip(weights, slices(w), strict=True)])
    rest = w - mean[None]
    weight = total(weights)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        shift, state = carry
        missed = jnp.sum(w * (rest - weight * shift[None]), -1, keepdims=True)
        slope = -2 * weight * jnp.sum(missed * w, 0)
        slope = slope - product(left, product(t(left), slope))
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            update, state = adam.update(slope, state)
        return (shift + update, state), None

    first: Any = jnp.zeros_like(mean), adam.init(jnp.zeros_like(mean))
    return jax.lax.scan(step, first, length=steps)[0][0]


def _protected(w: Float[Array, "k *batch m n"], subspace: int) -> Array:
    """The first left singular vectors that the tasks have together."""
    full = min(w.shape[-2:])
    u, s, _ = svd(w)
    each = max(1, full // len(w))
    keep = jnp.where(significant(s, w), 1, 0).astype(w.dtype)
    own = (u * keep[..., None, :])[..., :each]
    joint = jnp.concatenate(slices(own), -1)
    u, s, _ = svd(joint)
    keep = jnp.where(significant(s, joint), 1, 0).astype(w.dtype)
    return (u * keep[..., None, :])[..., : full // subspace]
