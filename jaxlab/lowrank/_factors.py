"""Adapters as factors, and factors as adapters."""

from collections.abc import Mapping, Sequence
import functools as ft
from typing import Any, NamedTuple

import jax.numpy as jnp

from ..types import Adapter, Params
from ._adapted import Adapted, joined
from ._as_lora import lora_of
from ._full import full
from ._lora import lora
from ._lora_gain import lora_gain
from ._places import method, named
from ._quantized import dense_leaf, dense_matrices
from ._state import Place, Spec, State, check_base


class Factors(NamedTuple):
    r"""What an adapter does to one leaf: $W' = W\,\mathrm{diag}(1 + g) + A B$.

    Closed under linear combinations: ranks add up, all else is summed.
    """

    a: Any
    """`[*stacked, *batch, n, r]`; None where the leaf is no matrix."""
    b: Any
    """`[*stacked, *batch, r, m]`, the adapter's scale in it."""
    gain: Any = None
    """`[*stacked, *batch, m]`: g, of DoRA; None is 0."""
    bias: Any = None
    """`[*stacked, *batch, m]`: what is added to the layer's bias; None is 0."""
    delta: Any = None
    """The update of a leaf that is no matrix, in its shape."""


Update = dict[str, Factors]
"""The factors of each adapted leaf, by path."""


def factors(
    states: Sequence[State],
    params: Params | None = None,
    adapted: Sequence[Adapted] | None = None,
) -> list[Update]:
    r"""What adapters of one base do to its leaves, in factored form and exactly.

    LoRA and its kin (see `as_lora`) are $\Delta W = s (A B - A_0 B_0)$, whatever their
    ranks and scales; DoRA is $W' = (W + s A B)\,\mathrm{diag}(c)$ with
    $c = \mu / \|W + s A B\|_c$, so $g = c - 1$ and the factors are $A$ and
    $s B\,\mathrm{diag}(c)$.

    Args:
      states: what was trained, of the same leaves of the same base.
      params: the base; needed where an update depends on it (DoRA, `full`).
      adapted: one per state, needed where its adapters keep anything fixed.

    Returns:
      For each state `{path: Factors}`, in float32 or wider: a pytree, for `linear`,
      `compress`, `combine` and `from_factors`.

    Raises:
      ValueError: the states are of other bases or other leaves; an adapter is no
        low-rank update; `params` is needed or is not the base (names the leaf).

    Degenerate inputs:
      A fresh state gives factors whose product is 0. A DoRA output of norm 0 counts
      as one of norm 1.

    References:
      Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation 3. Liu et al., 2024,
      "DoRA", https://arxiv.org/abs/2402.09353, equation 5.

    Example:
      >>> import jax
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> _, state = lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.lora(rank=2), x, where="w", key=jax.random.key(0))
      >>> factors([state])[0]["w"].b.shape
      (2, 3)
    """
    states = list(states)
    check_same(states)
    leaves = None if params is None else check_base(params, states[0].spec)
    fixed = [None] * len(states) if adapted is None else list(adapted)
    out = []
    for state, kept in zip(states, fixed, strict=True):
        entries, update = joined(state, kept), {}
        for place in state.spec.places:
            s = entries[place.path]
            update[place.path] = named(place.path, _factors, place, s, leaves)
        out.append(update)
    return out


def from_factors(
    update: Update, states: Sequence[State], params: Params | None = None
) -> State:
    r"""The state whose adapters do what factors say.

    Args:
      update: factors of any rank; those of `compress` or `combine` too.
      states: some of the same leaves, which say where these are: those that gave the
        factors.
      params: the base; needed for leaves that are no matrices.

    Returns:
      A state of `lora` with scale 1, of `lora_gain` where there is a gain, and of
      `full`; for `fold`, and for the function of an `attach` with the same adapters.

    Raises:
      ValueError: other leaves; a bias where none of the states says which leaf that
        is; `params` is needed or is not the base (names the leaf).

    Degenerate inputs:
      A rank may be above min(n, m): `compress` gives it back its bound.

    Example:
      >>> import jax
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> _, state = lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.lora(rank=2), x, where="w", key=jax.random.key(0))
      >>> from_factors(lowrank.linear(factors([state, state])), [state])["w"]["a"].shape
      (4, 4)
    """
    states = list(states)
    check_same(states)
    spec = states[0].spec
    leaves = None if params is None else check_base(params, spec)
    biases = {p.path: p.bias for s in states for p in s.spec.places if p.bias}
    check_paths(update, {p.path: None for p in spec.places}, "the update")
    places, entries = [], {}
    for place in spec.places:
        path, f = place.path, update[place.path]
        adapter, entries[path] = named(path, _entries, f, path, leaves)
        if f.bias is not None and path not in biases:
            raise ValueError(f"no state says which leaf is the bias of {path!r}")
        bias = None if f.bias is None else biases[path]
        places.append(place._replace(adapter=adapter, bias=bias))
    return State(entries, {}, Spec(tuple(places), spec.fingerprint))


def check_same(states: Sequence[State]) -> None:
    """Raises unless the states are of the same leaves of one base."""
    if not states:
        raise ValueError("there are no states")
    first = states[0].spec
    shapes = {p.path: p.shape for p in first.places}
    for state in states[1:]:
        other = state.spec
        check_paths({p.path: None for p in other.places}, shapes, "a state")
        for place in other.places:
            if place.shape != shapes[place.path]:
                raise ValueError(
                    f"{place.path!r} has shape {place.shape} in one state and "
                    f"{shapes[place.path]} in another"
                )
        known = first.fingerprint and other.fingerprint
        if known and first.fingerprint != other.fingerprint:
            raise ValueError(
                f"the states are of other bases (fingerprints {first.fingerprint} and "
                f"{other.fingerprint})"
            )


def check_paths(found: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> None:
    """Raises unless both are of the same paths; names one that is not."""
    for path in sorted(found.keys() ^ wanted.keys()):
        has = "lacks" if path in wanted else "has"
        raise ValueError(f"{name} {has} {path!r}, unlike the first")


def _base(path: str, leaves: Mapping[str, Any] | None) -> Any:
    """A leaf of the base; raises where it is not at hand."""
    if leaves is None:
        raise ValueError("the update depends on the base: pass params")
    return leaves[path]


def _factors(
    place: Place, s: dict[str, Any], leaves: Mapping[str, Any] | None
) -> Factors:
    """The factors of one leaf."""
    name = method(place.adapter)
    if name == "full":
        base = dense_leaf(_base(place.path, leaves))
        return Factors(None, None, delta=s["w"] - base.astype(s["w"].dtype))
    if name == "lora_gain":
        return Factors(s["a"], s["b"], s["gain"], s.get("bias"))
    if name != "dora":
        adapter, own = lora_of(place.adapter, s)
        scale = dict(adapter.config[1:])["scale"]
        bias = scale * own["bias"] if "bias" in own else None
        return Factors(own["a"], scale * own["b"], bias=bias)
    assert place.use is not None
    w = dense_matrices(_base(place.path, leaves), place.use)
    b = dict(place.adapter.config[1:])["scale"] * s["b"]
    norm = jnp.linalg.norm(w.astype(b.dtype) + s["a"] @ b, axis=-2)
    c = s["magnitude"] / jnp.where(norm > 0, norm, 1)
    return Factors(s["a"], b * c[..., None, :], c - 1)


def _entries(
    f: Factors, path: str, leaves: Mapping[str, Any] | None
) -> tuple[Adapter, dict[str, Any]]:
    """The adapter and the state of one leaf."""
    if f.a is None:
        base = dense_leaf(_base(path, leaves))
        return full(), {"w": base.astype(f.delta.dtype) + f.delta}
    s = {"a": f.a, "b": f.b} | ({} if f.bias is None else {"bias": f.bias})
    make = ft.partial(lora if f.gain is None else lora_gain, rank=f.a.shape[-1])
    s |= {} if f.gain is None else {"gain": f.gain}
    return make(bias=f.bias is not None), s
