"""SHiRA: Bhardwaj et al., 2024."""

from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from ..types import Adapter
from ._rank import check_rank, plus, wide
from ._torch_random import torch_random

SEED = 67280421310721  # of a generator of torch that was given none


def shira(
    *,
    rank: int,
    mask: Literal["random", "magnitude", "statistic"] = "random",
    seed: int | None = None,
) -> Adapter:
    r"""Trains a few entries of each weight, at fixed places: $W' = W + M \odot S$.

    M has $r (n + m)$ ones: as many trained numbers as LoRA of rank r, and an update of
    any rank.

    Args:
      rank: r; $r (n + m) \le n m$.
      mask: where the entries are. "random": the same places in all weights of one
        shape; "magnitude": those of the largest $|W|$; "statistic": those of the
        largest entries of the statistic [n, m], such as $|G|$ of a gradient
        (SHiRA-Grad) or $|W \odot G|$ (SHiRA-SNIP).
      seed: of the random places, drawn as PEFT draws them; None is PEFT's default.

    Returns:
      An adapter with state `values` and the fixed `rows` and `columns`, each
      [r (n + m)], in the order of a weight [out, in].

    Raises:
      ValueError: an unknown mask; (from `init`) more entries than the weight has, or a
        statistic that is missing or not asked for.

    Degenerate inputs:
      Fresh, S = 0: the layer is unchanged. Equal scores: the first in order win.

    References:
      Bhardwaj et al., 2024, "Sparse High Rank Adapters",
      https://arxiv.org/abs/2406.13175.

    Example:
      >>> s = shira(rank=1).init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["values"].shape, sorted(s)
      ((7,), ['columns', 'rows', 'values'])
    """
    check_rank(rank)
    if mask not in ("random", "magnitude", "statistic"):
        raise ValueError(f'mask must be "random", "magnitude" or "statistic": {mask!r}')

    def init(key: Array, w: Array, statistic: Array | None = None) -> dict[str, Any]:
        del key
        n, m = w.shape
        count = rank * (n + m)
        if count > n * m:
            raise ValueError(
                f"rank {rank} has {count} entries, above those of [{n}, {m}]"
            )
        if (statistic is None) == (mask == "statistic"):
            given = "no" if statistic is None else "a"
            raise ValueError(f"mask={mask!r} with {given} statistic")
        if mask == "random":
            drawn = torch_random(SEED if seed is None else seed).randperm(n * m, count)
            flat = jnp.asarray(np.sort(drawn), jnp.int32)
        else:
            score = jnp.abs(w) if statistic is None else statistic
            flat = jnp.sort(jax.lax.top_k(score.T.ravel(), count)[1])
        values = jnp.zeros(count, wide(w))
        return {"values": values, "rows": flat % n, "columns": flat // n}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        zero = jnp.zeros(w.shape, wide(w, s["values"]))
        return plus(w, zero.at[s["rows"], s["columns"]].add(s["values"]))

    config = ("shira", ("rank", rank), ("mask", mask), ("seed", seed))
    return Adapter(init, None, merge, fixed=("rows", "columns"), config=config)
