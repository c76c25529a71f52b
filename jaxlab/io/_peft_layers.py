"""A model's leaves as the parameters of torch modules."""

from collections.abc import Collection, Mapping
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import rewrite
from ..lowrank._quantized import dense_leaf
from ..lowrank._state import fingerprint
from . import _peft_form as forms, _peft_names as modules
from ._peft_names import Leaf


def torch_weights(leaf: Leaf, w: Any) -> dict[str, Any]:
    """A leaf as the parameters that torch has for it, by module."""
    modules.check(leaf)
    w = jnp.asarray(dense_leaf(w))
    form = forms.of_use(leaf.use)
    if leaf.use is None:
        return {m: np.asarray(w[at]) for m, at in leaf.modules().items()}
    matrices = np.asarray(rewrite.as_matrix(w, leaf.use))
    return {m: forms.weight(matrices[at], form) for m, at in leaf.modules().items()}


def base_print(
    named: Mapping[str, Leaf], leaves: Mapping[str, Any], layers: Collection[str]
) -> str:
    """A fingerprint of the adapted layers, whatever tree they are in."""
    prints: dict[str, str] = {}
    for leaf in named.values():
        if leaf.role == "weight" and leaf.use is not None:
            mine = leaf.modules().keys() & layers
            if mine and not isinstance(leaves[leaf.path], jax.ShapeDtypeStruct):
                every = torch_weights(leaf, leaves[leaf.path])
                prints |= {m: fingerprint({"": every[m]}) for m in mine}
    return joint_print(prints)


def joint_print(prints: Mapping[str, str]) -> str:
    """One fingerprint of several, by module; "" of none."""
    if not prints or not all(prints.values()):
        return ""
    lines = "".join(f"{m} {p}\n" for m, p in sorted(prints.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def stacked(xs: Any, leaf: Leaf) -> np.ndarray:
    """What each layer of a leaf has, with the leaf's axes in front."""
    return np.stack(xs).reshape((*leaf.front, *np.shape(xs[0])))
