"""Adapters on the weights of any model."""

from collections.abc import Mapping
import inspect
import math
from typing import Any

import jax
from jax import Array
from jaxtyping import PRNGKeyArray

from .. import rewrite, tree
from ..types import Adapter, Apply, Params, Where
from ._adapted import Adapted, Form
from ._places import chosen_adapters, lead, mapped, method, named, place_of, sides
from ._quantized import dense_matrices
from ._state import Entries, Place, Spec, State, by_path, fingerprint, plain_shapes


def attach(
    apply: Apply,
    params: Params,
    adapter: Adapter | Mapping[str, Adapter],
    *inputs: Any,
    where: str | Where | None = None,
    key: PRNGKeyArray,
    form: Form = "substituted",
    dropout: float = 0.0,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[Adapted, State]:
    r"""The model with adapters on its weights, and all that is to be trained.

    $y = x W$ becomes $y = \mathrm{adapter.apply}(x, W, s)$ wherever the program of
    `apply` multiplies by a chosen leaf: dense layers, attention projections stored by
    head, convolutions, embeddings, experts, layers stacked for a scan. A leaf used
    twice (a tied embedding) is adapted in both places.

    Args:
      apply: the function `apply(params, *inputs)`.
      params: its parameters; they stay as they are.
      adapter: what to put on each leaf; or one by `tree.glob` pattern, the first that
        matches, which is how ranks differ by path.
      *inputs: inputs of `apply`, for their shapes; `ShapeDtypeStruct`s will do.
      where: which leaves: a `tree.glob` pattern or a predicate (path, leaf). Needed
        unless `adapter` is a mapping, whose patterns it narrows.
      key: consumed; every leaf draws by its path.
      form: "merged" computes each adapted weight in every call, for comparison, or
        where an adapter's `apply` would form the patches of a convolution.
      dropout: the rate at which an adapter's input is dropped, where the model is
        called with `key=`.
      statistics: by path `[*stacked, *batch, ...]`, for an `init` that takes one.

    Returns:
      `(adapted, state)`: `adapted(params, state, *inputs)` is the function; `state`
      is a pytree of float32 (or wider) arrays, those that are trained and no others.

    Raises:
      ValueError: nothing is chosen; a chosen leaf is in no matrix product; an option
        does not fit a leaf, such as a rank above min(n, m); a statistic is missing
        (names the leaf).

    Degenerate inputs:
      With a fresh state the output is that of `apply`, where the adapter's `init` says
      so.

    References:
      Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP",
      https://arxiv.org/abs/1902.00751, for the idea of training added state alone.

    Example:
      >>> import jax.numpy as jnp; from jaxlab import lowrank
      >>> apply = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> key, lora = jax.random.key(0), lowrank.lora(rank=2)
      >>> adapted, state = attach(apply, params, lora, x, where="w", key=key)
      >>> adapted(params, state, x).tolist() == apply(params, x).tolist()
      True
    """
    leaves = by_path(params)
    chosen = chosen_adapters(params, adapter, where)
    uses = rewrite.uses(apply, plain_shapes(params), *inputs)
    places = tuple(place_of(p, a, leaves, uses[p]) for p, a in chosen.items())
    trained, fixed = {}, {}
    keys = {p: jax.random.fold_in(key, tree.path_number(p)) for p in chosen}
    for place in places:
        statistic = _statistic(place, statistics or {})
        s = _initial(place, keys[place.path], leaves[place.path], statistic)
        trained[place.path], fixed[place.path] = _parted(place.adapter, s)
    shared, fixed_shared = _shared(places, key)
    spec = Spec(places, fingerprint({p: leaves[p] for p in chosen}))
    adapted = Adapted(fixed, fixed_shared, apply, spec, form, dropout)
    return adapted, State(trained, shared, spec)


def _statistic(place: Place, statistics: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `init` takes beside key and weight, of this leaf."""
    accepted = list(inspect.signature(place.adapter.init).parameters.values())[2:]
    if accepted and place.path in statistics:
        return (statistics[place.path],)
    if accepted and accepted[0].default is accepted[0].empty:
        raise ValueError(
            f"{method(place.adapter)} starts from data: statistics has nothing for "
            f"{place.path!r}"
        )
    return ()


def _initial(place: Place, key: Array, w: Array, statistic: tuple[Any, ...]) -> Any:
    """The fresh entries of one leaf, its stacked and batch axes in front."""
    adapter, front = place.adapter, lead(place)
    if place.use is None:
        return named(place.path, adapter.init, key, w, *statistic)
    w = dense_matrices(w, place.use)
    keys = jax.random.split(key, front) if front else key
    init = mapped(adapter.init, len(front))
    return named(place.path, init, keys, w, *statistic)


def _parted(adapter: Adapter, s: dict[str, Any]) -> tuple[dict, dict]:
    """The trained and the fixed entries."""
    fixed = {n: v for n, v in s.items() if n in adapter.fixed}
    return {n: v for n, v in s.items() if n not in fixed}, fixed


def _shared(places: tuple[Place, ...], key: Array) -> tuple[Entries, Entries]:
    """What the leaves of each method share, trained and fixed."""
    trained, fixed = {}, {}
    for adapter in dict.fromkeys(p.adapter for p in places if p.adapter.shared):
        name = method(adapter)
        if name in trained:
            raise ValueError(f"two {name} adapters of other options share one state")
        mine = [(p, p.use) for p in places if p.adapter == adapter and p.use]
        sizes = [sides(use) for p, use in mine for _ in range(math.prod(lead(p)))]
        number = jax.random.fold_in(key, tree.path_number(name))
        assert adapter.shared is not None
        s = adapter.shared(number, tuple(sizes))
        trained[name], fixed[name] = _parted(adapter, s)
    return trained, fixed
