"""The input and output of an operation on a weight, as rows of a matrix product."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ._sites import POINTWISE, Site, canonical, placed
from ._views import Atom, Axis

RANK = 1 << 30  # the `axis` of an atom that belongs to no leaf


def followed(site: Site) -> Site:
    """The site, or an error that names leaf and primitive where it is only a name."""
    if site.inputs is None or site.outputs is None:
        raise ValueError(
            f"{site.use.path!r} is used by {site.use.primitive!r}, which is no matrix "
            "product and is not followed"
        )
    return site


def rows(site: Site, x: Any) -> Array:
    """The input of an operation as `[*batch, rows, n]`."""
    labels = followed(site).inputs
    name, eqn = site.use.primitive, site.eqn
    if name == "dot_general":
        x = _turned(site, x)
    elif name == "conv_general_dilated":
        x = _patches(eqn, x)
    elif name == "gather":
        x = _one_hot(eqn, x)
    else:
        x = jnp.broadcast_to(x, eqn.outvars[0].aval.shape)
    assert labels is not None
    return canonical(x, labels, site)


def output(site: Site, y: Array) -> Array:
    """The output of an operation as `[*batch, rows, m]`."""
    labels = followed(site).outputs
    assert labels is not None
    return canonical(y.transpose(_channels_last(site, y.ndim)), labels, site)


def place(site: Site, y: Array) -> Array:
    """The inverse of `output`: in the shape and dtype that the program has."""
    labels, aval = followed(site).outputs, site.eqn.outvars[0].aval
    assert labels is not None
    order = _channels_last(site, aval.ndim)
    turned = placed(y, labels, site, [aval.shape[i] for i in order])
    back = sorted(range(len(order)), key=order.__getitem__)
    return turned.transpose(back).astype(aval.dtype)


def project(site: Site, x: Any, a: Array) -> Array:
    """`rows(x) @ a` for `a [*batch, n, r]`, without forming patches or one-hot rows.

    In the wider dtype of the two; that of `a` for a look-up.
    """
    name = followed(site).use.primitive
    if name in POINTWISE:
        raise ValueError(f"{name!r} of {site.use.path!r} is no matrix product")
    if name == "conv_general_dilated":
        return _convolved(site, x, a)
    if name == "gather":
        return _looked_up(site, x, a)
    x, a = _same_dtype(rows(site, x), a)
    return x @ a


def _same_dtype(x: Array, a: Array) -> tuple[Array, Array]:
    """Both in the wider dtype of the two."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(x.dtype, a.dtype)
    return x.astype(dtype), a.astype(dtype)


def _channels_last(site: Site, ndim: int) -> Sequence[int]:
    """The axes of an output in the order of its labels."""
    if site.use.primitive != "conv_general_dilated":
        return range(ndim)
    batch, channels, *space = site.eqn.params["dimension_numbers"].out_spec
    return [batch, *space, channels]


def _turned(site: Site, x: Array) -> Array:
    """The other operand of a product as (batch, rows, contracted)."""
    contract, batch = site.eqn.params["dimension_numbers"]
    summed, shared = contract[1 - site.operand], batch[1 - site.operand]
    rest = [d for d in range(x.ndim) if d not in (*summed, *shared)]
    return x.transpose(*shared, *rest, *summed)


def _patches(eqn: Any, x: Array) -> Array:
    """What each output position of a convolution sees.

    `[batch, *positions, groups, channels per group, *kernel]`: copies, no arithmetic.
    """
    p = eqn.params
    spec = p["dimension_numbers"]
    kernel = [eqn.invars[1].aval.shape[d] for d in spec.rhs_spec[2:]]
    count = [eqn.outvars[0].aval.shape[d] for d in spec.out_spec[2:]]
    x = x.transpose(spec.lhs_spec)
    dilated = zip(p["padding"], p["lhs_dilation"], strict=True)
    widths = [(low, high, step - 1) for (low, high), step in dilated]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *widths])
    for d, (size, n) in enumerate(zip(kernel, count, strict=True)):
        stride, step = p["window_strides"][d], p["rhs_dilation"][d]
        ends = [(k * step, k * step + (n - 1) * stride + 1) for k in range(size)]
        cuts = [jax.lax.slice_in_dim(x, *end, stride, 2 + d) for end in ends]
        x = jnp.stack(cuts, axis=-1)
    groups = p["feature_group_count"]
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    dims = len(kernel)
    return x.transpose(0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))


def _one_hot(eqn: Any, indices: Array) -> Array:
    """What a look-up multiplies its table by: `[*positions, *indexed axes]`."""
    places = eqn.params["dimension_numbers"].start_index_map
    table = eqn.invars[0].aval
    clip = eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
    out = jnp.ones(indices.shape[:-1], table.dtype)
    for i, axis in enumerate(places):
        n, index = table.shape[axis], indices[..., i]
        index = jnp.clip(index, 0, n - 1) if clip else index
        hot = jax.nn.one_hot(index, n, dtype=table.dtype)
        hot = jnp.expand_dims(hot, range(index.ndim, out.ndim))
        out = out[..., None] * hot
    return out


def _convolved(site: Site, x: Array, a: Array) -> Array:
    """A convolution with r output channels per group."""
    assert site.inputs is not None
    assert site.outputs is not None
    p, shape = site.eqn.params, site.eqn.invars[1].aval.shape
    spec, r = p["dimension_numbers"], a.shape[-1]
    groups = site.inputs[len(shape) - 1]  # after the batch and the positions
    out = (*(groups or ()), Atom(RANK, 1, r))
    axes: list[Axis] = list(site.view.axes)
    sizes = list(shape)
    axes[spec.rhs_spec[0]] = out
    sizes[spec.rhs_spec[0]] = p["feature_group_count"] * r
    x, kernel = _same_dtype(x, placed(a, tuple(axes), site, sizes))
    keys = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "precision")
    y = jax.lax.conv_general_dilated(
        x,
        kernel,
        dimension_numbers=spec,
        feature_group_count=p["feature_group_count"],
        **{k: p[k] for k in keys},
    )
    y = y.transpose(_channels_last(site, y.ndim))
    return canonical(y, (*site.outputs[:-1], out), site)


def _looked_up(site: Site, indices: Array, a: Array) -> Array:
    """Rows of `a` in place of rows of the table."""
    p, r = site.eqn.params, a.shape[-1]
    places = p["dimension_numbers"].start_index_map
    shape = site.eqn.invars[0].aval.shape
    axes = [*(site.view.axes[d] for d in places), (Atom(RANK, 1, r),)]
    table = placed(a, tuple(axes), site, [*(shape[d] for d in places), r])
    k, front = len(places), indices.ndim - 1
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(front,),
        collapsed_slice_dims=tuple(range(k)),
        start_index_map=tuple(range(k)),
    )
    y = jax.lax.gather(
        table, indices, numbers, (1,) * k + (r,), mode=p["mode"],
        fill_value=p["fill_value"],
    )  # fmt: skip
    return y.reshape(math.prod(y.shape[:-1]), r)
