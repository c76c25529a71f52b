"""Coefficients of a merge by evolution, where there is no gradient."""

from collections.abc import Callable
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
import numpy as np

from ..types import Params, Stacked
from ._learn import Learned, Loss, score


def search(
    models: Stacked,
    batch: Any,
    *,
    method: Callable[..., Params],
    loss: Loss,
    coefficients: dict[str, Any],
    key: PRNGKeyArray,
    base: Params | None = None,
    generations: int = 50,
    strategy: Callable[..., Any] | None = None,
) -> Learned:
    r"""Searches the coefficients of any merge, without a gradient and without a disk.

    CMA-ES asks for a population $c_i \sim \mathcal N(m, \sigma^2 C)$, `score` merges
    and scores all of it in one compiled program, and the ranks move $m$, $\sigma$, $C$.

    Args:
      models: `[k, *leaf]` models, or whatever `method` takes first.
      batch: what every recipe is scored on.
      method: the merge: `method(models, **coefficients)`.
      loss: `loss(params, batch)`, a scalar to be made small; it need not be
        differentiable, e.g. an error rate.
      coefficients: where the mean $m$ starts: the keywords of `method`, at least 2
        numbers in all.
      key: consumed.
      base: `[*leaf]` as in `learn`.
      generations: at most so many; fewer where the strategy has converged.
      strategy: makes the optimiser from `mean` and `seed`, for instance
        `functools.partial(cmaes.SepCMA, sigma=0.1, population_size=16)`; any object
        with `ask`, `tell`, `should_stop` and `population_size` will do. None is
        `cmaes.CMA` with $\sigma = 0.3$ and its own population, $4 + 3\ln n$.

    Returns:
      `Learned(params, coefficients, losses)`: the best recipe seen, its model, and the
      least loss of each generation `[t]`.

    Raises:
      ValueError: fewer than 2 coefficients, or generations below 1.
      ImportError: the package cmaes is not installed (`jaxlab[search]`).

    Degenerate inputs:
      A recipe whose loss is NaN ranks last. Where all do, the start is returned.

    References:
      Hansen, 2016, "The CMA Evolution Strategy: A Tutorial",
      https://arxiv.org/abs/1604.00772. Akiba et al., 2024, "Evolutionary Optimization
      of Model Merging Recipes", https://arxiv.org/abs/2403.13187.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlab import merge
      >>> found = search({"w": jnp.eye(2)}, jnp.array([0.5, 2.0]),
      ...     loss=lambda p, y: jnp.sum((p["w"] - y) ** 2), key=jax.random.key(0),
      ...     method=merge.task_arithmetic, coefficients={"weights": jnp.ones(2)})
      >>> found.params["w"].round(2)
      Array([0.5, 2. ], dtype=float32)
    """
    start, unravel = ravel_pytree(jax.tree.map(_float, coefficients))
    if start.size < 2 or generations < 1:
        raise ValueError(
            f"search needs at least 2 coefficients and 1 generation, got {start.size} "
            f"and {generations}; score sweeps one coefficient over a grid"
        )
    if strategy is None:
        strategy = _cma
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    optimiser = strategy(mean=np.asarray(start, np.float64), seed=seed)
    run = lambda rows: score(
        models,
        batch,
        method=method,
        loss=loss,
        coefficients=jax.vmap(unravel)(jnp.asarray(rows, start.dtype)),
        base=base,
    )
    best, least, losses = np.asarray(start), np.inf, []
    for _ in range(generations):
        asked = [optimiser.ask() for _ in range(optimiser.population_size)]
        values = np.asarray(run(np.stack(asked)), np.float64)
        values = np.where(np.isnan(values), np.inf, values)
        optimiser.tell(list(zip(asked, values.tolist(), strict=True)))
        losses.append(values.min())
        if losses[-1] < least:
            best, least = asked[int(values.argmin())], losses[-1]
        if optimiser.should_stop():
            break
    found = unravel(jnp.asarray(best, start.dtype))
    one = jax.tree.map(lambda c: c[None], found)
    params = score(
        models, batch, method=method, loss=_itself, coefficients=one, base=base
    )
    params = jax.tree.map(lambda x: x[0], params)
    return Learned(params, found, jnp.asarray(losses, start.dtype))


def _cma(*, mean: np.ndarray, seed: int) -> Any:
    """CMA-ES as its authors set it, with a first step for coefficients near 1."""
    import cmaes

    return cmaes.CMA(mean=mean, sigma=0.3, seed=seed)


def _itself(params: Params, batch: Any) -> Params:
    """The merged model as its own score."""
    del batch
    return params


def _float(c: Any) -> Any:
    """A coefficient as a floating-point array."""
    c = jnp.asarray(c)
    return c if jnp.issubdtype(c.dtype, jnp.floating) else c.astype(jnp.float32)
