"""PEFT's combinations of adapters by their factors, each on its own."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array
import jax.numpy as jnp

from ._factors import Factors, Update, check_same
from ._places import method as name_of
from ._state import State


def separate(
    states: Sequence[State], *, weights: Any, method: Callable[..., Any]
) -> Update:
    r"""Merges all A by themselves and all B by themselves, as PEFT does.

    $A = m(A_k; \operatorname{sgn}(w_k s_k)\sqrt{|w_k s_k|})$ and
    $B = m(B_k; \sqrt{|w_k s_k|})$. Even for the plain sum this is not
    $\sum_k w_k s_k A_k B_k$: it adds $A_i B_j$ of different adapters. `linear` and
    `combine` are exact; this is for results that must equal PEFT's "linear", "ties",
    "dare_linear", "dare_ties" and "magnitude_prune".

    Args:
      states: of plain `lora`, of one base and one rank.
      weights: $w_k$: a number or `[k]`; may be traced.
      method: a merge of stacked trees that takes `weights=`, a tree of `[k]` by leaf,
        such as `functools.partial(merge.ties, density=0.5, per="leaf")`.

    Returns:
      `{path: Factors}` of the states' rank.

    Raises:
      ValueError: other bases or leaves; other adapters than plain LoRA, or of other
        ranks (names the leaf).

    Degenerate inputs:
      One state with the weight 1 gives its own update.

    References:
      Mangrulkar et al., PEFT 0.21.2, `LoraModel.add_weighted_adapter`,
      https://github.com/huggingface/peft.

    Example:
      >>> import jax
      >>> from jaxlab import lowrank, merge
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> _, state = lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.lora(rank=2), x, where="w", key=jax.random.key(0))
      >>> separate([state], weights=1.0, method=merge.task_arithmetic)["w"].a.shape
      (4, 2)
    """
    states = list(states)
    check_same(states)
    w = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (len(states),))
    stacked: dict[str, dict[str, Array]] = {"a": {}, "b": {}}
    roots: dict[str, dict[str, Array]] = {"a": {}, "b": {}}
    for path in (p.path for p in states[0].spec.places):
        scales = jnp.array([_scale(state, path) for state in states], w.dtype)
        total = w * scales
        root = jnp.sqrt(jnp.abs(total))
        roots["a"][path] = jnp.where(total >= 0, root, -root)
        roots["b"][path] = root
        for name, found in stacked.items():
            parts = [state[path][name] for state in states]
            if len({part.shape for part in parts}) > 1:
                raise ValueError(f"{path!r} has adapters of several ranks")
            found[path] = jnp.stack(parts)
    merged = method(stacked, weights=roots)
    return {path: Factors(a, merged["b"][path]) for path, a in merged["a"].items()}


def _scale(state: State, path: str) -> float:
    """The scale of a plain LoRA adapter; raises where it is another."""
    place = next(p for p in state.spec.places if p.path == path)
    options = dict(place.adapter.config[1:])
    if name_of(place.adapter) != "lora" or "bias" in state[path]:
        what = name_of(place.adapter)
        raise ValueError(f"{path!r} has {what}, not plain LoRA: use linear or combine")
    return options["scale"]
