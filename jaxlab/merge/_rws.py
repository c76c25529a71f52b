"""Robust Weight Signatures (Cai et al., 2023)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import tree
from ..types import Params, PerModel, Stacked, Where
from ._coefficients import mix, narrow, rows, slices, spread, wide, wide_one


class Patched(NamedTuple):
    """A model with signatures added, and how to take them off.

    Attributes:
      params: `[*leaf]` the patched model.
      undo: unsigned integers: the exclusive or of the bits before and after, None where
        a leaf was not signed. Those of patches on top of each other commute.
    """

    params: Params
    undo: Params


def rws(deltas: Stacked, standard: Params, *, where: Where | None = None) -> Stacked:
    r"""What robust training has put into weights that standard training has not.

    $R_k = \tau_k - \frac{\langle\tau_k, \tau_0\rangle}{\|\tau_0\|^2}\,\tau_0$, leaf by
    leaf: the robust task vector without its projection onto the standard one.

    Args:
      deltas: `[k, *leaf]` $\tau_k$: models trained on one corruption each, minus the
        pretrained one they and the standard one started from.
      standard: `[*leaf]` $\tau_0$: the standard model, trained on clean data, minus
        the same.
      where: which leaves are signed; the paper takes a few shallow layers' weights and
        biases. None for all.

    Returns:
      `[k, *leaf]` signatures, in the dtypes of `deltas`, rounded once; None for leaves
      that are not signed, so they need no memory.

    Raises:
      ValueError: the trees differ, or `where` selects nothing.

    Degenerate inputs:
      Where the standard task vector is 0, nothing is projected out.

    References:
      Cai et al., 2023, "Robust Weight Signatures: Gaining Robustness as Easy as
      Patching Weights?", https://arxiv.org/abs/2302.12480, Section 3, as in the
      authors' code. Batch norms are the mean of the robust models' there; here they are
      leaves like others, or left out and re-estimated by `recalibrate`.

    Example:
      >>> import jax.numpy as jnp
      >>> deltas = {"w": jnp.array([[3.0, 4.0]])}
      >>> rws(deltas, {"w": jnp.array([2.0, 0.0])})["w"].tolist()
      [[0.0, 4.0]]
    """
    x = wide(deltas, name="deltas")
    x = x if where is None else tree.partition(x, where)[0]
    base = beside(x, standard, name="standard")
    wide_one(base, name="standard")
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), x)
    tree.check_like(base, like, name="standard")

    def leaf(v: Array, b: Array) -> Array:
        b = jnp.asarray(b).astype(v.dtype)
        square = jnp.sum(b * b)
        unit = b / jnp.where(square > 0, square, 1)
        return jnp.stack([t - jnp.sum(t * b) * unit for t in slices(v)])

    return narrow(jax.tree.map(leaf, x, base), beside(x, deltas))


def rws_patch(params: Params, signatures: Stacked, *, scale: PerModel = 1.0) -> Patched:
    r"""Adds signatures to a model, and remembers how to take them off to the bit.

    $\theta = \theta_0 + \sum_k\alpha_k R_k$.

    Args:
      params: `[*leaf]` $\theta_0$: the standard model, or one of another data set; only
        the signed leaves have to fit.
      signatures: `[k, *leaf]` $R_k$, one or several, from `rws` or `rws_dequantize`.
      scale: $\alpha_k$, the strength: a scalar, `[k]`, or a tree of either by leaf. May
        be traced. To change it later, unpatch and patch anew.

    Returns:
      A `Patched`, in the dtypes of `params`, rounded once.

    Raises:
      ValueError: a signed leaf is not in the model, or not of its shape.

    Degenerate inputs:
      A scale of 0 leaves every bit as it is, except that -0 may become 0 until it is
      unpatched.

    References:
      Cai et al., 2023, https://arxiv.org/abs/2302.12480, Section 4. The authors' code
      multiplies by the strength twice where it is not 1.

    Example:
      >>> import jax.numpy as jnp
      >>> patched = rws_patch({"w": jnp.ones(2)}, {"w": jnp.array([[0.0, 0.1]])})
      >>> patched.params["w"].tolist() == [1.0, jnp.float32(1.1)]
      True
      >>> rws_unpatch(patched)["w"].tolist()
      [1.0, 1.0]
    """
    x = wide(signatures, name="signatures")
    factors = spread(scale, x, name="scale")
    chosen = jax.tree.map(jnp.asarray, beside(x, params))
    like = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), x)
    tree.check_like(chosen, like, name="params")

    def leaf(p: Array, v: Array, c: Any) -> Array:
        dtype = max(v.dtype, tree.widen(p).dtype, key=lambda d: d.itemsize)
        moved = mix(rows(c, v), v).astype(dtype)
        return (p.astype(dtype) + moved).astype(p.dtype)

    new = jax.tree.map(leaf, chosen, x, factors)
    new = jax.lax.optimization_barrier(new)  # one value, both kept and undone
    undo = jax.tree.map(lambda p, q: _word(p) ^ _word(q), chosen, new)
    return Patched(_over(params, new), undo)


def rws_unpatch(patched: Patched) -> Params:
    r"""Takes a patch off: the model as it was, to the bit.

    $\mathrm{bits}(\theta_0) = \mathrm{bits}(\theta) \oplus \mathrm{undo}$.

    Args:
      patched: from `rws_patch`. Where several patches were put on top of each other,
        each one's `undo` has to be applied to the parameters once, in any order.

    Returns:
      `[*leaf]` the model without the patch.

    Raises:
      ValueError: the parts are not of one model.

    Degenerate inputs:
      NaN and infinity come back as they were.

    References:
      Cai et al., 2023, https://arxiv.org/abs/2302.12480, Section 4, where the clean
      model is restored by subtracting, which is not exact.

    Example:
      >>> import jax.numpy as jnp
      >>> clean = {"w": jnp.array([0.1, 3.0])}
      >>> patched = rws_patch(clean, {"w": jnp.array([[1e8, 1e-8]])})
      >>> bool((rws_unpatch(patched)["w"] == clean["w"]).all())
      True
    """
    chosen = jax.tree.map(jnp.asarray, beside(patched.undo, patched.params))
    tree.check_like(patched.undo, chosen, name="undo")
    back = lambda p, u: jax.lax.bitcast_convert_type(_word(p) ^ u, p.dtype)
    return _over(patched.params, jax.tree.map(back, chosen, patched.undo))


def beside(signed: Params, params: Params, *, name: str = "params") -> Params:
    """The leaves of a model that are signed, None for the others."""
    if missing := set(tree.paths(signed)) - set(tree.paths(params)):
        raise ValueError(f"{name} has no leaf {min(missing)!r}")
    none = lambda x: x is None
    return jax.tree.map(
        lambda s, p: None if s is None else p, signed, params, is_leaf=none
    )


def _over(params: Params, new: Params) -> Params:
    """The model with those leaves replaced that are not None."""
    none = lambda x: x is None
    return jax.tree.map(
        lambda q, p: jax.tree.map(jnp.asarray, p) if q is None else q,
        new,
        params,
        is_leaf=none,
    )


def _word(x: Array) -> Array:
    """The bits of floats as unsigned integers."""
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"u{x.dtype.itemsize}"))
