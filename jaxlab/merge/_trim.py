"""Trimming task vectors by magnitude."""

from typing import Any, Literal

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from .. import tree
from ..types import PerModel, Stacked
from ._coefficients import all_ones, narrow, spread, wide

Per = Literal["tree", "leaf"]
"""Rank a model's entries all together ("tree"), or within each leaf ("leaf")."""


def trim(deltas: Stacked, *, density: PerModel, per: Per = "tree") -> Stacked:
    r"""Zeroes all but the largest entries of each task vector.

    Keeps $|\delta_k| \ge c_k$, where $c_k$ is the exact $\lfloor dn\rfloor$-th largest
    magnitude of model k.

    Args:
      deltas: `[k, *leaf]` task vectors.
      density: $d$, the fraction kept, in (0, 1]: a scalar or `[k]`; with `per="leaf"`
        also a tree of either by leaf. May be traced.
      per: "tree" ranks the entries of a model together (the TIES paper), "leaf" those
        of each leaf alone (mergekit, PEFT).

    Returns:
      `[k, *leaf]` trimmed task vectors, in the dtypes of `deltas`.

    Raises:
      ValueError: a density outside (0, 1], NaN, or by leaf with `per="tree"`.

    Degenerate inputs:
      At least one entry is kept. Entries as large as the threshold are all kept, so
      ties (common in bfloat16) keep more than $\lfloor dn\rfloor$. NaN counts as
      largest.

    References:
      Yadav et al., 2023, "TIES-Merging", https://arxiv.org/abs/2306.01708, Algorithm 1,
      step 1.

    Example:
      >>> import jax.numpy as jnp
      >>> trim({"w": jnp.array([[4.0, -1.0, 0.5, 2.0]])}, density=0.5)
      {'w': Array([[4., 0., 0., 2.]], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    fraction = check_density(density, x)
    total = _sizes(x, per)
    if all_ones(fraction):
        return narrow(x, deltas)
    cut = _thresholds(x, _ranks(tree.count, fraction, total, per), per)
    keep = lambda v, c: jnp.where(_reaches(v, c), v, 0)
    return narrow(jax.tree.map(keep, x, cut), deltas)


def trim_outliers(
    deltas: Stacked, *, density: PerModel, gamma: PerModel = 0.01, per: Per = "leaf"
) -> Stacked:
    r"""Zeroes the largest and the smallest entries of each task vector.

    In order of magnitude, skips the $\lfloor\gamma n\rfloor$ largest entries of a model
    and keeps the next $\lfloor dn\rfloor$; skips fewer where too few would be left.

    Args:
      deltas: `[k, *leaf]` task vectors.
      density: $d$, the fraction kept, in (0, 1]: a scalar, `[k]`, or a tree of either
        by leaf. May be traced.
      gamma: $\gamma$, the fraction of outliers, in [0, 1); likewise.
      per: "leaf" ranks the entries of each leaf alone (the paper, mergekit), "tree"
        those of a model together.

    Returns:
      `[k, *leaf]` trimmed task vectors, in the dtypes of `deltas`.

    Raises:
      ValueError: a fraction out of range, NaN, or by leaf with `per="tree"`.

    Degenerate inputs:
      Entries as large as either threshold are kept. A gamma of 0 gives `trim`.

    References:
      Davari & Belilovsky, 2023, "Model Breadcrumbs", https://arxiv.org/abs/2312.06795,
      Section 3. The paper gives the two masked fractions ($\beta$ smallest, $\gamma$
      largest); as in mergekit, here $\beta = 1 - d - \gamma$.

    Example:
      >>> import jax.numpy as jnp
      >>> x = {"w": jnp.array([[4.0, -1.0, 0.5, 2.0]])}
      >>> trim_outliers(x, density=0.5, gamma=0.25)
      {'w': Array([[ 0., -1.,  0.,  2.]], dtype=float32)}
    """
    x = wide(deltas, name="deltas")
    fraction = check_density(density, x)
    outliers = spread(
        gamma, x, name="gamma", valid=lambda g: (g >= 0) & (g < 1), expected="in [0, 1)"
    )
    total = _sizes(x, per)
    if all_ones(fraction):
        return narrow(x, deltas)
    kept = _ranks(tree.count, fraction, total, per)
    most = _ranks(floor_count, outliers, total, per)
    window = jax.tree.map(_window, kept, most, total)
    pick = lambda i: jax.tree.map(lambda _, w: w[i], x, window)
    high, low = _thresholds(x, pick(0), per), _thresholds(x, pick(1), per)

    def keep(v: Array, h: Array, c: Array) -> Array:
        return jnp.where(_reaches(v, c) & ~_exceeds(v, h), v, 0)

    return narrow(jax.tree.map(keep, x, high, low), deltas)


def check_density(density: PerModel, stacked: Stacked) -> Any:
    """Densities by leaf, each in (0, 1] where concrete."""
    return spread(
        density,
        stacked,
        name="density",
        valid=lambda d: (d > 0) & (d <= 1),
        expected="in (0, 1]",
    )


def floor_count(fraction: Any, total: Any) -> Any:
    r"""Exact $\lfloor fn\rfloor$ of concrete or traced numbers; int64."""
    if not isinstance(fraction, Tracer) and isinstance(total, int):
        return np.floor(np.asarray(fraction, np.float64) * total).astype(np.int64)
    with jax.enable_x64(True):
        exact = jnp.asarray(fraction, jnp.float64) * jnp.asarray(total, jnp.float64)
        return jnp.floor(exact).astype(jnp.int64)


def _sizes(x: Stacked, per: Per) -> Any:
    """How many entries are ranked together, by leaf."""
    if per not in ("tree", "leaf"):
        raise ValueError(f"per must be 'tree' or 'leaf', got {per!r}")
    sizes = jax.tree.map(lambda v: v.size // v.shape[0], x)
    every = sum(jax.tree.leaves(sizes))
    return sizes if per == "leaf" else jax.tree.map(lambda _: every, sizes)


def _ranks(counter: Any, fraction: Any, total: Any, per: Per) -> Any:
    """The counts that a fraction of each total makes, by leaf."""
    leaves = jax.tree.leaves(fraction)
    if per == "tree" and any(f is not leaves[0] for f in leaves):
        raise ValueError(
            "a fraction by leaf needs per='leaf': with per='tree' all leaves of a "
            "model share one threshold"
        )
    return jax.tree.map(counter, fraction, total)


def _thresholds(x: Stacked, ranks: Any, per: Per) -> Any:
    """The magnitude of each rank, per model, by leaf."""
    size = jax.tree.map(jnp.abs, x)
    if per == "leaf":
        return tree.kth_largest(size, ranks, per="leaf", stacked=True)
    leaves = jax.tree.leaves(ranks)
    cut = tree.kth_largest(size, leaves[0], stacked=True) if leaves else None
    return jax.tree.map(lambda _: cut, x)


def _reaches(v: Float[Array, "k ..."], c: Float[Array, " k"]) -> Array:
    """Is the magnitude at least the threshold of its model? In the wider dtype."""
    return jnp.abs(v).astype(c.dtype) >= c.reshape(c.shape + (1,) * (v.ndim - 1))


def _exceeds(v: Float[Array, "k ..."], c: Float[Array, " k"]) -> Array:
    """Is the magnitude above the threshold of its model?"""
    return jnp.abs(v).astype(c.dtype) > c.reshape(c.shape + (1,) * (v.ndim - 1))


def _window(kept: Any, most: Any, total: int) -> tuple[Any, Any]:
    """The first and the last rank that stay where at most `most` outliers go."""
    with jax.enable_x64(True):
        kept = jnp.asarray(kept, jnp.int64)
        skip = jnp.minimum(jnp.asarray(most, jnp.int64), total - kept)
        return skip + 1, skip + kept
