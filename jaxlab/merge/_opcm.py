"""Projection-based continual merging, OPCM (Tang et al., 2025)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .. import tree
from ..types import Params, PerModel, Stacked
from ._coefficients import narrow, slices, spread, total, wide, wide_one
from ._gram import root
from ._matrices import Axes, per_matrix
from ._svd import product, significant, svd, t


class Continual(NamedTuple):
    """What a continual merge knows: as much after a thousand models as after one."""

    delta: Params
    """`[*leaf]` the merged task vector, in at least float32."""
    scale: Float[Array, ""]
    """$\\lambda_t$: the merged task vector times this is the sum of what was added."""
    norm: Float[Array, ""]
    """The mean norm of the task vectors so far."""
    count: Float[Array, ""]
    """How many there were."""


def opcm(deltas: Stacked, *, alpha: PerModel = 0.5, axes: Axes = "nm") -> Params:
    r"""Merges task vectors one after another, each projected away from the merged ones.

    $\tau^{(t)} = \frac{1}{\lambda_t}\bigl(\lambda_{t-1}\tau^{(t-1)} + P\tau_t\bigr)$;
    with $\tau^{(t-1)} = U\Sigma V^T$, $P$ zeroes of $U^T\tau_t V$ the diagonal and the
    block of the first r rows and columns, and $\lambda_t$ makes the norm of
    $\tau^{(t)}$, of the whole tree, the mean norm of $\tau_1, \dots, \tau_t$.

    Args:
      deltas: `[k, *leaf]` task vectors, in their order; the order matters. To merge
        models that arrive one by one, see `opcm_step`.
      alpha: $\alpha$ in [0, 1]: r is the number of singular values that together make
        up no more than this part of their sum. A scalar, or a tree of scalars by leaf.
        May be traced.
      axes: as in `iso_c`. Transposing in and out transposes the result.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `deltas`, rounded once. Leaves that
      are no matrices are added up without a projection.

    Raises:
      ValueError: an alpha out of range, or letters that do not fit a leaf.

    Degenerate inputs:
      One task gives itself. The projection leaves alone what a singular value of 0
      stands for, and everything while the merged task vector is 0; what adds up to 0
      stays 0.

    References:
      Tang et al., 2025, "Merging Models on the Fly Without Retraining",
      https://arxiv.org/abs/2501.09522, Section 4 and Algorithm 1, as in the authors'
      code, which keeps the rows and columns beyond the block where they meet the first
      r. It also clears the diagonal of null directions, and so does not depend on the
      input alone there.

    Example:
      >>> import jax.numpy as jnp
      >>> deltas = {"w": jnp.array([[[2.0, 0.0]], [[3.0, 4.0]]])}
      >>> out = opcm(deltas)["w"]
      >>> bool(jnp.allclose(out, 3.5 * jnp.array([[2.0, 4.0]]) / 20**0.5))
      True
    """
    x = wide(deltas, name="deltas")
    each = zip(*map(slices, jax.tree.leaves(x)), strict=True)
    one, *others = [jax.tree.unflatten(jax.tree.structure(x), m) for m in each]
    state = opcm_step(opcm_init(one), one, alpha=alpha, axes=axes)
    if others:
        rest = jax.tree.map(lambda v: v[1:], x)
        step = lambda s, d: (opcm_step(s, d, alpha=alpha, axes=axes), None)
        state, _ = jax.lax.scan(step, state, rest)
    return narrow(state.delta, deltas)


def opcm_init(like: Params) -> Continual:
    r"""The state of a continual merge that has seen no model.

    $\tau^{(0)} = 0$.

    Args:
      like: `[*leaf]` one model or task vector, arrays or shapes; its values do not
        matter.

    Returns:
      A `Continual` of the size of one model, in at least float32.

    Raises:
      ValueError: a leaf is not floating-point; names it.

    Degenerate inputs:
      None.

    References:
      Tang et al., 2025, https://arxiv.org/abs/2501.09522, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> opcm_init({"w": jnp.ones(2)}).delta
      {'w': Array([0., 0.], dtype=float32)}
    """
    shapes = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), like)
    delta = jax.tree.map(lambda v: v[0], wide(shapes, name="like"))
    one = jnp.ones((), _dtype(delta))
    return Continual(delta, one, jnp.zeros_like(one), jnp.zeros_like(one))


def opcm_step(
    state: Continual, delta: Params, *, alpha: PerModel = 0.5, axes: Axes = "nm"
) -> Continual:
    r"""Merges one more task vector into what a continual merge knows.

    As in `opcm`, which is this step over all models; the state takes the memory of one
    model, whatever their number.

    Args:
      state: from `opcm_init`, or from the step before.
      delta: `[*leaf]` the next task vector $\tau_t$: model minus base.
      alpha: as in `opcm`.
      axes: as in `opcm`.

    Returns:
      The next state; `merge.add(base, state.delta)` is the merged model.

    Raises:
      ValueError: as `opcm`, or the trees differ.

    Degenerate inputs:
      As in `opcm`; a task vector of 0 shortens what is merged: the mean norm
      shrinks.

    References:
      Tang et al., 2025, https://arxiv.org/abs/2501.09522, Algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> state = opcm_init({"w": jnp.zeros((1, 2))})
      >>> state = opcm_step(state, {"w": jnp.array([[3.0, 4.0]])})
      >>> state.delta["w"].tolist(), float(state.norm)
      ([[3.0, 4.0]], 5.0)
    """
    tree.check_like(delta, state.delta, name="delta")
    stacked = jax.tree.map(lambda x: x[None], state.delta)
    new = wide_one(delta, name="delta")
    new = jax.tree.map(lambda d, x: d.astype(x.dtype), new, state.delta)
    part = spread(
        alpha, stacked, name="alpha", valid=lambda a: (a >= 0) & (a <= 1),
        expected="in [0, 1]", per_model=False,
    )  # fmt: skip
    other = lambda _, *rest: rest[0]
    kept = per_matrix(_projected, stacked, new, part, axes=axes, vector=other)
    grown = jax.tree.map(
        lambda x, d: state.scale.astype(x.dtype) * x + d, state.delta, kept
    )
    count = state.count + 1
    mean = state.norm + (_norm(new) - state.norm) / count
    norm = _norm(grown)
    safe = lambda x: jnp.where(x > 0, x, 1)
    shrink = jnp.where(norm > 0, mean / safe(norm), 0)
    scale = jnp.where(mean > 0, norm / safe(mean), 1)
    merged = jax.tree.map(lambda x: shrink.astype(x.dtype) * x, grown)
    return Continual(merged, scale, mean, count)


def _projected(merged: Array, delta: Array, alpha: Any) -> Float[Array, "*batch n m"]:
    """The new matrix without what it shares with the merged `[1, *batch, n, m]`."""
    (x,) = merged
    u, s, vt = svd(x)
    whole = jnp.sum(s, -1, keepdims=True)
    first = jnp.cumsum(s, -1) <= jnp.asarray(alpha, x.dtype) * whole
    found = significant(s, x)
    pair = lambda a: a[..., None, :] & a[..., :, None]
    diagonal = jnp.broadcast_to(jnp.eye(s.shape[-1], dtype=bool), pair(found).shape)
    inside = product(t(u), delta, t(vt))
    inside = jnp.where(pair(found) & (pair(first) | diagonal), inside, 0)
    return delta - product(u, inside, vt)


def _dtype(params: Params) -> Any:
    """The widest dtype of a tree."""
    dtypes = [x.dtype for x in jax.tree.leaves(params)]
    return max(dtypes, key=lambda d: d.itemsize, default=jnp.dtype(jnp.float32))


def _norm(params: Params) -> Float[Array, ""]:
    """The norm of a whole tree, with gradient 0 at 0."""
    dtype = _dtype(params)
    squares = [jnp.sum(x.astype(dtype) ** 2) for x in jax.tree.leaves(params)]
    return root(total(squares)) if squares else jnp.zeros((), dtype)
