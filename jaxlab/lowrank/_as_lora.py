"""Plain LoRA from the methods that are one underneath."""

import dataclasses
from typing import Any

from jax import Array

from ..types import Adapter
from ._adapted import Adapted, joined
from ._kasa import kasa_pair
from ._lora import lora
from ._places import method, named
from ._shifted import pair
from ._state import State

SHIFTED = ("pissa", "olora", "corda", "lora_ga")
PLAIN = ("lora", "eva", "mica")


def as_lora(adapted: Adapted, state: State) -> tuple[Adapted, State]:
    r"""The same function with plain LoRA on every leaf, whatever it was trained as.

    $s (A B - A_0 B_0) = s [A \; A_0] [B; -B_0]$: PiSSA, OLoRA, CorDA and LoRA-GA of
    rank r are LoRA of rank 2 r on the base as it was, and so is KaSA; AdaLoRA, EVA and
    MiCA are LoRA of rank r.

    Args:
      adapted: the adapted model.
      state: what was trained.

    Returns:
      `(adapted, state)` with the adapter `lora` on every leaf, both factors trained.

    Raises:
      ValueError: an adapter is none of these (names the leaf).

    Degenerate inputs:
      A leaf that has plain LoRA keeps it. The rank may be above min(n, m).

    References:
      Meng et al., 2024, "PiSSA", https://arxiv.org/abs/2404.02948, appendix C.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.eye(3)}, jnp.ones((2, 3))
      >>> pair = lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.pissa(rank=1), x, where="w", key=jax.random.key(0))
      >>> as_lora(*pair)[1]["w"]["a"].shape
      (3, 2)
    """
    entries, places, leaves = joined(state, adapted), [], {}
    for place in state.spec.places:
        s = entries[place.path]
        adapter, leaves[place.path] = named(place.path, lora_of, place.adapter, s)
        places.append(place._replace(adapter=adapter))
    spec = state.spec._replace(places=tuple(places))
    fixed: dict[str, dict[str, Any]] = {path: {} for path in leaves}
    plain = dataclasses.replace(adapted, spec=spec, fixed=fixed, fixed_shared={})
    return plain, State(leaves, {}, spec)


def lora_of(adapter: Adapter, s: dict[str, Any]) -> tuple[Adapter, dict[str, Array]]:
    """An adapter's update as plain LoRA; all of its entries, fixed ones too, in `s`."""
    name, options = method(adapter), dict(adapter.config[1:])
    if name not in (*SHIFTED, *PLAIN, "kasa", "adalora"):
        raise ValueError(f"{name} is no plain LoRA underneath")
    scale, b = options["scale"], s["b"]
    if name in SHIFTED:
        a, b = pair(s)
    elif name == "kasa":
        a, b = kasa_pair(s, scale)
        scale = 1.0
    elif name == "adalora":
        a = s["a"] * s["diag"][..., None, :]
    else:
        a = s["a"]
    rank = a.shape[-1]
    bias = {"bias": s["bias"]} if "bias" in s else {}
    plain = lora(rank=rank, alpha=scale * rank, bias=bool(bias))
    return plain, {"a": a, "b": b} | bias
