"""EVA: Paischer et al., 2024."""

from collections.abc import Mapping
import math
from typing import Any

from jax import Array
import jax.numpy as jnp
import numpy as np

from .. import tree
from ..types import Adapter
from ._lora import lora
from ._rank import check_rank, wide


def eva(
    *,
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    whiten: bool = False,
) -> Adapter:
    r"""LoRA that starts at the directions in which its inputs vary most.

    $y = x W + \frac{\alpha}{r} (x A) B$ from $A = V_r$, the leading right singular
    vectors of the inputs $X = U \Sigma V^\top$, and $B = 0$.

    Args:
      rank: r, from 1 to min(n, m); `eva_ranks` chooses one for each leaf.
      alpha: the scale's numerator; `rank` by default, a scale of 1, which does not
        change where ranks are redistributed.
      rslora: divide by $\sqrt{r}$ in place of r.
      whiten: divide each direction by the root of its singular value.

    Returns:
      An adapter with state `a [n, r]`, `b [r, m]`, whose `init` takes the Gram matrix
      $X^\top X$ `[n, n]` of the leaf's inputs: `attach(..., statistics=gram(...))`
      with `jaxlab.measure.gram`, summed over batches.

    Raises:
      ValueError: a rank below 1, or (from `init`) above min(n, m); no statistic, or one
        of another shape.

    Degenerate inputs:
      Fresh, B = 0: the layer is unchanged. Inputs of rank below r: the other directions
      are orthonormal, and with `whiten` of length 0.

    References:
      Paischer et al., 2024, "One Initialization to Rule them All: Fine-tuning via
      Explained Variance Adaptation", https://arxiv.org/abs/2410.07170, section 3. The
      inputs are not centred and the decomposition is exact, in place of incremental;
      the centred covariance of `jaxlab.measure.covariance` will do as well.

    Example:
      >>> import jax
      >>> gram = jnp.diag(jnp.array([1.0, 9.0, 4.0]))
      >>> s = eva(rank=1).init(jax.random.key(0), jnp.ones((3, 2)), gram)
      >>> jnp.abs(s["a"]).T.tolist()
      [[0.0, 1.0, 0.0]]
    """
    plain = lora(rank=rank, alpha=alpha, rslora=rslora)

    def init(key: Array, w: Array, statistic: Array | None = None) -> dict[str, Any]:
        del key
        check_rank(rank, w)
        dtype = wide(w)
        gram = square("eva", w, statistic)
        values, vectors = jnp.linalg.eigh(gram)
        a = vectors[:, ::-1][:, :rank]
        if whiten:
            sigma = jnp.sqrt(jnp.maximum(values[::-1][:rank], 0))
            kept = sigma > math.sqrt(jnp.finfo(gram.dtype).eps) * sigma[0]
            a = jnp.where(kept, a / jnp.sqrt(jnp.where(kept, sigma, 1))[None], 0)
        return {"a": a.astype(dtype), "b": jnp.zeros((rank, w.shape[1]), dtype)}

    config = ("eva", *plain.config[1:4], ("whiten", whiten))
    return plain._replace(init=init, config=config)


def eva_ranks(
    statistics: Mapping[str, Any], *, rank: int, rho: float = 2.0
) -> dict[str, int]:
    r"""Ranks by explained variance: the most explaining directions of all leaves.

    Of each leaf's first $\rho r$ directions, ordered by their share
    $\sigma_j^2 / \sum_i \sigma_i^2$ of the variance of its inputs, the r L largest of
    all L leaves are kept.

    Args:
      statistics: by path, the Gram matrices `[*stacked, *batch, n, n]` that `eva`
        takes. A leaf of several matrices counts once, with their mean shares.
      rank: r, the mean rank, at least 1.
      rho: how much above the mean a rank may be, at least 1; 1 leaves all equal.

    Returns:
      `{path: rank}`, sum r L unless the leaves have fewer directions; a leaf that gets
      none is left out. As
      `attach(..., {p: eva(rank=r) for p, r in eva_ranks(...).items()})`.

    Raises:
      ValueError: no leaves; a rank or rho below 1.

    Degenerate inputs:
      Of equal shares, those of the first leaves are kept; a leaf whose inputs are zero
      has shares 0.

    References:
      Paischer et al., 2024, https://arxiv.org/abs/2410.07170, section 3. Leaves of
      equal inputs are decomposed each, and count each.

    Example:
      >>> grams = {"a": jnp.diag(jnp.array([9.0, 1.0])), "b": jnp.eye(2)}
      >>> eva_ranks(grams, rank=1)
      {'a': 1, 'b': 1}
    """
    check_rank(rank)
    if rho < 1 or not statistics:
        raise ValueError(f"eva_ranks needs leaves and rho >= 1, got rho={rho}")
    most, shares, owners = round(rank * rho), [], []
    for path, gram in statistics.items():
        values = np.linalg.eigvalsh(np.asarray(tree.widen(jnp.asarray(gram))))
        values = np.maximum(values[..., ::-1], 0)
        total = values.sum(-1, keepdims=True)
        share = values / np.where(total > 0, total, 1)
        share = share.reshape(-1, share.shape[-1]).mean(0)[:most]
        shares.extend(share)
        owners.extend([path] * len(share))
    order = np.argsort(-np.asarray(shares), kind="stable")[: rank * len(statistics)]
    kept = [owners[i] for i in order]
    return {path: kept.count(path) for path in statistics if path in kept}


def square(method: str, w: Array, statistic: Array | None) -> Array:
    """The Gram matrix of a weight's inputs, wide and symmetric; raises without one."""
    n = w.shape[0]
    if statistic is None or statistic.shape != (n, n):
        got = "none" if statistic is None else f"one of shape {statistic.shape}"
        raise ValueError(
            f"{method} needs statistics=: the Gram matrix [{n}, {n}] of the inputs of "
            f"each leaf, got {got}"
        )
    gram = statistic.astype(wide(w, statistic))
    return (gram + gram.T) / 2
