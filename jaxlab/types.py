"""Every public type of jaxlab: a model is a pytree, a method is a function of it.

Axis letters, everywhere: k models, b batch, n in, m out, r rank, t steps, g groups,
h heads, s sequence.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, PyTree

Params = PyTree[Array]
"""One model: any pytree of arrays."""

Stacked = PyTree[Array]
"""k models of one structure, stacked on axis 0 of every leaf: `[k, *leaf]`."""

Where = Callable[[str, Array], bool]
"""A predicate on (slash path, leaf): touch this leaf?"""

Apply = Callable[..., Any]
"""The pure function of a model: `apply(params, *inputs)`."""

PerModel = PyTree[Array] | Array | float
"""A coefficient: one number, one per model `[k]`, or a tree of either, by leaf."""
