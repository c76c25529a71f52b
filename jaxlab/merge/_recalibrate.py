"""Batch statistics of a merged model, from data (Izmailov et al., 2018)."""

from collections.abc import Mapping, Sequence
import functools as ft
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import measure, rewrite, tree
from ..types import Apply, Params

NAMES = {"mean": "var", "running_mean": "running_var", "moving_mean": "moving_var"}


def recalibrate(
    apply: Apply,
    params: Params,
    batches: Sequence[tuple[Any, ...]],
    *,
    statistics: Mapping[str, str] | None = None,
    passes: int | None = None,
) -> Params:
    r"""Measures anew the statistics that a model's batch norms subtract and divide by.

    A merge of running means and variances is not the mean and variance of what the
    merged model computes: activations shrink, and accuracy with them. Here $\mu_l
    \leftarrow \mathbb E\,x_l$ and $\sigma_l^2 \leftarrow \mathrm{Var}\,x_l$ of the
    input $x_l$ of norm $l$, over all data.

    Args:
      apply: `apply(params, *inputs)`, with norms that use the statistics in `params`.
      params: the model, the statistics among its leaves.
      batches: tuples of inputs, in any sharding; read once per pass.
      statistics: `{path of a mean: path of its variance}`; where None, the leaves
        named `mean` and `var` (also `running_` and `moving_`) side by side.
      passes: how often; each pass settles one more norm of those that feed each other,
        so by default as many as there are norms, in layers of a `scan` too.

    Returns:
      The model, its statistics replaced, in its own dtypes. With all passes the input
      of every norm has exactly the mean and (biased) variance stored for it.

    Raises:
      ValueError: batch statistics are absent, a mean is not subtracted from anything,
        a pair is of different shapes, no batches, or no passes.

    Degenerate inputs:
      A constant feature gets the variance 0; the norm's own epsilon then stands alone.

    References:
      Izmailov et al., 2018, "Averaging Weights Leads to Wider Optima and Better
      Generalization", https://arxiv.org/abs/1803.05407, Section 3.2; Jordan et al.,
      2022, "REPAIR", https://arxiv.org/abs/2211.08403, Section 2. They run norms in
      training mode and average over batches; here all rows count alike, so the result
      does not depend on how data are split into batches.

    Example:
      >>> norm = lambda p, x: (x - p["mean"][None]) / jnp.sqrt(p["var"])[None]
      >>> stale = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
      >>> recalibrate(norm, stale, [(jnp.array([[1.0], [5.0]]),)])
      {'mean': Array([3.], dtype=float32), 'var': Array([4.], dtype=float32)}
    """
    if not batches:
        raise ValueError("recalibrate needs at least one batch")
    pairs = _pairs(params) if statistics is None else dict(statistics)
    _check(params, pairs)
    uses = rewrite.uses(apply, params, *batches[0])
    found = {path: _subtracted(uses[path], path) for path in pairs}
    if passes is None:
        layers = lambda u: math.prod(u.shape[a] for a in u.stacked)
        passes = sum(layers(use) for use in found.values())
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    where, only = (lambda path, _: path in pairs), (lambda u: u.primitive == "sub")
    one = jax.jit(
        lambda p, *inputs: measure.covariance(
            apply, p, *inputs, where=where, only=only, per_feature=True
        )
    )
    for _ in range(passes):
        parts = [one(params, *inputs) for inputs in batches]
        new: dict[str, Array] = {}
        for path, variance in pairs.items():
            moments = ft.reduce(measure.pool, [part[path] for part in parts])
            new[path] = _placed(moments.mean, found[path])
            new[variance] = _placed(moments.covariance, found[path])
        put = lambda path, v, new=new: (
            new[path].reshape(v.shape).astype(v.dtype) if path in new else v
        )
        params = tree.path_map(put, params)
    return params


def _pairs(params: Params) -> dict[str, str]:
    """Means and variances side by side, by their names."""
    paths, found = tree.paths(params), {}
    for path in paths:
        parts = path.split("/")
        for i, part in enumerate(parts):
            beside = "/".join([*parts[:i], NAMES.get(part, ""), *parts[i + 1 :]])
            if part in NAMES and beside in paths:
                found[path] = beside
    return found


def _check(params: Params, pairs: Mapping[str, str]) -> None:
    """Raises where there are no statistics, or not those that were named."""
    shapes = {}
    tree.path_map(lambda p, x: shapes.update({p: jnp.shape(x)}), params)
    if not pairs:
        raise ValueError(
            f"batch statistics absent: no leaf is named like {list(NAMES)} beside its "
            f"variance in {list(shapes)[:5]}...; name them with `statistics`. A "
            f"norm that takes its statistics from the batch needs no recalibration"
        )
    for mean, variance in pairs.items():
        for path in (mean, variance):
            if path not in shapes:
                raise ValueError(f"batch statistics absent: params has no {path!r}")
        if shapes[mean] != shapes[variance]:
            raise ValueError(
                f"{mean!r} of shape {shapes[mean]} and {variance!r} of shape "
                f"{shapes[variance]} are no mean and variance of one norm"
            )


def _subtracted(every: Sequence[rewrite.Use], path: str) -> rewrite.Use:
    """How a mean is subtracted; raises where it is not."""
    for use in every:
        if use.primitive == "sub":
            return use
    names = ", ".join(sorted({repr(u.primitive) for u in every})) or "nothing"
    raise ValueError(
        f"{path!r} is not subtracted from what a norm normalises: it is used by {names}"
    )


def _placed(x: Array, use: rewrite.Use) -> Array:
    """A statistic with its stacked axes where the leaf has them."""
    rest = [n for a, n in enumerate(use.shape) if a not in use.stacked]
    front = [use.shape[a] for a in use.stacked]
    x = x.reshape(*front, *rest)
    return jnp.moveaxis(x, range(len(front)), use.stacked)
