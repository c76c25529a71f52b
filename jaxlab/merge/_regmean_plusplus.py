"""RegMean++ (Nguyen et al., 2025)."""

from collections.abc import Callable, Iterator, Sequence
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
import numpy as np

from .. import rewrite, tree
from ..types import Apply, Params, PerModel, Stacked, Where
from ._coefficients import models as count_models, spread, wide
from ._regmean import Uses, regmean


def regmean_plusplus(
    apply: Apply,
    models: Stacked,
    batches: Sequence[Sequence[tuple[Any, ...]]],
    *,
    where: Where | None = None,
    block: Callable[[str], str] | None = None,
    off_diagonal: PerModel = 0.9,
    weights: PerModel = 1.0,
    ridge: PerModel = 1e-6,
) -> Params:
    r"""RegMean, layer after layer, on the features of what is merged so far.

    $W^l = \big(\sum_k G_k^l\big)^{-1}\sum_k G_k^l W_k^l$ with the Gram matrices $G_k^l$
    of $X_k^l = f_M^{l-1}(X_k^{l-1})$: the data of task k through the merged layers
    below $l$, where RegMean sends them through those of model k.

    Args:
      apply: the function `apply(params, *inputs)`.
      models: `[k, *leaf]` models.
      batches: for each of the k tasks a list of batches, each a tuple of inputs. They
        are read once per block, so they must not be used up.
      where: which of the leaves that are multiplied as matrices or kernels are merged
        by regression; all where None. The others are averaged, with their block.
      block: from a path to the name of its layer. Within a layer a model runs with its
        own weights. Where None every such leaf begins a layer, and what follows it in
        the program belongs to it. `lambda path: path.split("/")[0]` has the paper's
        transformer layers. Layers stacked for `scan` are merged one by one.
      off_diagonal: as in `regmean`.
      weights: as in `regmean`.
      ridge: as in `regmean`.

    Returns:
      `[*leaf]` the merged model, in the dtypes of `models`. Its cost is k forwards per
      batch and layer, each up to that layer where `jax.jit` drops the rest.

    Raises:
      ValueError: not one list of batches per model, an empty one, nothing selected, or
        as `regmean`.

    Degenerate inputs:
      As in `regmean`. With one layer it is `regmean` of Grams divided by their rows.

    References:
      Nguyen et al., 2025, "RegMean++: Enhancing Effectiveness and Generalization of
      Regression Mean for Model Merging", https://arxiv.org/abs/2508.03121, Section 3.
      Grams are means over rows, as in the authors' code, so tasks count alike.

    Example:
      >>> model, w = lambda w, x: x @ w, jnp.array([[[1.0]], [[4.0]]])
      >>> data = [[(jnp.array([[2.0]]),)], [(jnp.array([[1.0]]),)]]
      >>> round(float(regmean_plusplus(model, w, data, ridge=0.0)[0, 0]), 4)
      1.6
    """
    x = wide(models, name="models")
    _check(batches, count_models(x))
    first = jax.tree.map(lambda v: v[0], models)
    uses = rewrite.uses(apply, first, *batches[0][0])
    picked = _selected(uses, first, where)
    flat = lambda value: dict(zip(tree.paths(x), jax.tree.leaves(value), strict=True))
    options = {
        "weights": flat(spread(weights, x, name="weights")),
        "off_diagonal": flat(
            spread(off_diagonal, x, name="off_diagonal", per_model=False)
        ),
        "ridge": flat(spread(ridge, x, name="ridge", per_model=False)),
    }
    state, given = flat(models), flat(models)
    measured = {}
    for names, j in _steps(_blocks(uses, picked, block), uses):
        mine = frozenset(names) & picked
        if mine and mine not in measured:
            measured[mine] = _measured(apply, mine)
        grams = {}
        if mine:
            parts = [
                _grams(measured[mine], _model(state, models, i), batches[i])
                for i in range(len(batches))
            ]
            grams = jax.tree.map(lambda *g: jnp.stack(g), *parts)
        bound = {n: {p: v[p] for p in names} for n, v in options.items()}
        merged = regmean({p: given[p] for p in names}, grams, uses=uses, **bound)
        for path in names:
            here = _slice(uses[path], j, merged[path])
            state[path] = jnp.where(here[None], merged[path][None], state[path])
    return _model(state, models, 0)


def _selected(uses: Uses, params: Params, where: Where | None) -> frozenset[str]:
    """The leaves to regress: multiplied as matrices or kernels, and not looked up."""
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    able = [p for p, every in uses.items() if any(map(_product, every))]
    chosen = [p for p in able if where is None or where(p, leaves[p])]
    if not chosen:
        raise ValueError(f"no leaf to regress is selected among {able}")
    return frozenset(chosen)


def _product(use: rewrite.Use) -> bool:
    return bool(use.contracted) and use.primitive != "gather"


def _blocks(
    uses: Uses, picked: frozenset[str], block: Callable[[str], str] | None
) -> list[list[str]]:
    """The leaves of every layer, in program order."""
    found: dict[str, list[str]] = {}
    name = ""
    for path in uses:
        if block is not None:
            name = block(path)
        elif path in picked:
            name = path
        found.setdefault(name, []).append(path)
    return list(found.values())


def _steps(blocks: list[list[str]], uses: Uses) -> Iterator[tuple[list[str], int]]:
    """Blocks in order; those of one scan take turns, one iteration at a time."""
    length = lambda names: max(_iterations(uses[p]) for p in names)
    for times, run in itertools.groupby(blocks, length):
        turns = list(run)
        for j in range(times):
            for names in turns:
                yield names, j


def _iterations(every: Sequence[rewrite.Use]) -> int:
    """How many layers a leaf holds."""
    return math.prod(every[0].shape[a] for a in every[0].stacked) if every else 1


def _slice(every: Sequence[rewrite.Use], j: int, leaf: Array) -> Bool[Array, "..."]:
    """Which entries of a leaf belong to its j-th layer; all where it holds one."""
    if _iterations(every) == 1:
        return jnp.ones((1,) * leaf.ndim, bool)
    use = every[0]
    sizes = [n if a in use.stacked else 1 for a, n in enumerate(use.shape)]
    here = (np.arange(math.prod(sizes)) == j).reshape(sizes)
    return jnp.asarray(np.broadcast_to(here, use.shape).reshape(leaf.shape))


def _measured(apply: Apply, mine: frozenset[str]) -> Callable[..., Any]:
    """Rows and Gram matrices of the inputs of some leaves, on one batch."""

    def moments(x: Array) -> tuple[Array, Array]:
        x = tree.widen(x)
        exact = jax.lax.Precision.HIGHEST
        gram = jnp.einsum("...bi,...bj->...ij", x, x, precision=exact)
        return jnp.full(x.shape[:-2], x.shape[-2], x.dtype), gram

    where = lambda path, _: path in mine
    captured = rewrite.capture(apply, where=where, reduce=moments, only=_product)
    return jax.jit(lambda params, *inputs: captured(params, *inputs)[1])


def _grams(
    measured: Callable[..., Any], params: Params, batches: Sequence[tuple[Any, ...]]
) -> dict[str, Array]:
    """Gram matrices over all batches of a task, divided by the number of rows."""
    first, *rest = (measured(params, *inputs) for inputs in batches)
    for other in rest:
        first = jax.tree.map(jnp.add, first, other)
    mean = lambda rows, gram: gram / jnp.maximum(rows, 1)[..., None, None]
    return {path: mean(*parts) for path, parts in first.items()}


def _model(state: dict[str, Array], models: Stacked, i: int) -> Params:
    """The i-th model as it is by now."""
    leaves = [state[path][i] for path in tree.paths(models)]
    return jax.tree.unflatten(jax.tree.structure(models), leaves)


def _check(batches: Sequence[Sequence[tuple[Any, ...]]], k: int) -> None:
    """Raises where the data are not of the k tasks."""
    sizes = [len(task) for task in batches]
    if len(sizes) != k or 0 in sizes:
        raise ValueError(
            f"batches needs a list of at least one batch for each of the {k} models, "
            f"got lists of {sizes}"
        )
