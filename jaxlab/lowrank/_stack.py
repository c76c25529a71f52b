"""Several states as one, the states on axis 0."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._factors import check_same
from ._places import method
from ._state import Place, Spec, State

PADDED = ("lora", "dora")  # methods that zeros beyond the rank do not change


def stack(states: Sequence[State]) -> State:
    r"""States of one base and method as one, for `choose` and for `jax.vmap`.

    Where the ranks of `lora` or `dora` differ, A gets zero columns and B zero rows up
    to the largest: $A B$ is the same, and so are zero the slopes there, $x^\top (g\,
    0^\top)$ and $(x\,0)^\top g$. An optimiser that moves nothing without a slope (SGD,
    Adam with or without decay) keeps them zero, so that adapters of several ranks
    train side by side and stay of their ranks.

    Args:
      states: k states of the same leaves, whose adapters differ in nothing but rank.

    Returns:
      A state whose every array is `[k, ...]`, of the adapters of the largest rank: for
      an `attach` with those.

    Raises:
      ValueError: no states; states of other bases or leaves; adapters that differ
        otherwise (names the leaf), such as in scale: `from_factors` gives LoRA of
        scale 1.

    Degenerate inputs:
      One state: itself with an axis of size 1.

    Example:
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> start = lambda r: lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.lora(rank=r), x, where="w", key=jax.random.key(0))[1]
      >>> stack([start(1), start(2)])["w"]["a"].shape
      (2, 4, 2)
    """
    states = list(states)
    check_same(states)
    each = [{p.path: p for p in s.spec.places} for s in states]
    places = [_widest([by[p.path] for by in each]) for p in states[0].spec.places]
    prints = [s.spec.fingerprint for s in states]
    spec = Spec(tuple(places), next(filter(None, prints), ""))
    trees = [(s.leaves, s.shared) for s in states]
    leaves, shared = jax.tree.map(lambda *xs: _padded(xs), *trees)
    return State(leaves, shared, spec)


def unstack(states: State, like: Sequence[State] | None = None) -> list[State]:
    r"""The states of which `stack` made one.

    Args:
      states: every array `[k, ...]`.
      like: k states of the ranks to cut back to: those that were stacked. None leaves
        the zeros in place.

    Returns:
      k states.

    Raises:
      ValueError: `like` has another number of states.

    Example:
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> start = lambda r: lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.lora(rank=r), x, where="w", key=jax.random.key(0))[1]
      >>> both = [start(1), start(2)]
      >>> unstack(stack(both), both)[0]["w"]["a"].shape
      (4, 1)
    """
    count = len(jax.tree.leaves(states)[0])
    if like is None:
        return [jax.tree.map(lambda v, i=i: v[i], states) for i in range(count)]
    if len(like) != count:
        raise ValueError(f"like has {len(like)} states, expected {count}")
    cut = lambda i, v, w: v[(i, *map(slice, w.shape))]
    out = []
    for i, one in enumerate(like):
        mine = (states.leaves, states.shared), (one.leaves, one.shared)
        leaves, shared = jax.tree.map(lambda v, w, i=i: cut(i, v, w), *mine)
        out.append(State(leaves, shared, one.spec))
    return out


def _widest(places: list[Place]) -> Place:
    """That of the largest rank, the adapters being alike otherwise."""
    first = places[0]
    if all(p == first for p in places):
        return first
    for place in places:
        same = _without_rank(place.adapter) == _without_rank(first.adapter)
        padded = method(first.adapter) in PADDED
        if place[2:] != first[2:] or not (same and padded):
            raise ValueError(
                f"the adapters of {first.path!r} differ in more than the rank of "
                f"{PADDED}: {first.adapter.config} and {place.adapter.config}"
            )
    return max(places, key=lambda p: dict(p.adapter.config[1:])["rank"])


def _without_rank(adapter: Adapter) -> Any:
    """A configuration but for what does not change a state's function or is its rank.

    `rslora` and `start` say where the scale and the first state came from.
    """
    if not adapter.config:
        return adapter
    name, *options = adapter.config
    return name, {o: v for o, v in options if o not in ("rank", "rslora", "start")}


def _padded(arrays: Sequence[Array]) -> Array:
    """Stacked, with zeros behind up to the longest of each axis."""
    sizes = [max(n) for n in zip(*(x.shape for x in arrays), strict=True)]
    ends = [[(0, n - m) for n, m in zip(sizes, x.shape, strict=True)] for x in arrays]
    return jnp.stack([jnp.pad(x, e) for x, e in zip(arrays, ends, strict=True)])
