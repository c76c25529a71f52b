"""Every public type of jaxlab: a model is a pytree, a method is a function of it.

Axis letters, everywhere: k models, b batch, n in, m out, r rank, t steps, g groups,
h heads, s sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Adapter(NamedTuple):
    """One weight `w [n, m]` with `y = x @ w`, and a small trainable state `s`.

    Laws: `merge(w, init(key, w)) == w` and `apply(x, w, s) ~= x @ merge(w, s)`.
    """

    init: Callable[..., dict[str, Any]]
    """`(key, w) -> s`; `(key, w, statistic) -> s` where it starts from data."""
    apply: Callable[..., Any] | None
    """`(x [..., n], w, s) -> y [..., m]`, cheaper than merging; None: merge each time.

    `x @ w` and `x @ a` are all that most need; `lowrank.rows(x)` and `lowrank.dense(w)`
    are the arrays."""
    merge: Callable[..., Any] | None
    """`(w, s) -> w'`; None where no weight computes what `apply` does."""
    fixed: tuple[str, ...] = ()
    """The entries of `s` that are not trained."""
    bias: Callable[..., Any] | None = None
    """`(b [m], s) -> b'`: what becomes of the layer's bias; b is None without one."""
    shared: Callable[..., dict[str, Any]] | None = None
    """`(key, sizes) -> s`: entries that all leaves share, of their sizes (n, m)."""
    matrix: bool = True
    """False: `init` and `merge` take any leaf as it is, and `apply` is None."""
    config: tuple[Any, ...] = ()
    """The method's name and its options: adapters of one configuration are equal."""

    def __eq__(self, other: object) -> bool:
        """By configuration, where there is one."""
        return isinstance(other, Adapter) and _identity(self) == _identity(other)

    def __ne__(self, other: object) -> bool:
        """The opposite of equal."""
        return not self == other

    def __hash__(self) -> int:
        """That of what makes it equal."""
        return hash(_identity(self))


def _identity(adapter: Adapter) -> tuple[Any, ...]:
    """What makes two adapters equal: their configuration, or their functions."""
    return adapter.config or tuple(adapter)
