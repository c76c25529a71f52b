"""Leaves of a tree and the modules of a torch model: one name for each."""

from collections.abc import Callable, Collection, Mapping
import itertools as it
from typing import Any, NamedTuple

from ..lowrank._places import sides
from ..rewrite import Use

Names = Mapping[str, str] | Callable[[str], str | None] | None
"""Path of a leaf -> module name, with one `{}` per stacked axis; None: by the path."""

_LAST = frozenset("weight kernel w embedding scale bias b value raw_value".split())


class Leaf(NamedTuple):
    """A leaf as torch has it: a parameter of a module, or of one per layer."""

    path: str
    module: str
    """With a `{}` for each axis of `front`."""
    role: str
    """The parameter: "weight" or "bias"."""
    front: tuple[int, ...]
    """Its stacked and batch axes: layers, experts."""
    use: Use | None
    """How it is a matrix."""

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Its modules, and the index of each on the axes in front."""
        places = it.product(*map(range, self.front))
        return {self.module.format(*place): place for place in places}


def leaves(uses: Mapping[str, tuple[Use, ...]], names: Names) -> dict[str, Leaf]:
    """Every leaf by path, as torch has it, in the order of `uses`."""
    out = {}
    for path, mine in uses.items():
        use = next((u for u in mine if u.contracted), None)
        front: tuple[int, ...] = ()
        for u in (use,) if use else mine[:1]:
            axes = (*u.stacked, *u.batch) if use else u.stacked
            front = tuple(u.shape[a] for a in axes)
        module, role = _named(path, names)
        out[path] = Leaf(path, module, role, front, use)
    return out


def check(leaf: Leaf) -> None:
    """Raises where the name does not say which of several layers it is."""
    if leaf.module.count("{}") != len(leaf.front):
        raise ValueError(
            f"{leaf.path!r} is {list(leaf.front)} layers in one leaf, but its module "
            f"is {leaf.module!r}: give names={{{leaf.path!r}: 'layers.{{}}.dense'}}, "
            "one {} for each of its axes in front"
        )


def index(found: Mapping[str, Leaf]) -> dict[tuple[str, str], tuple[Leaf, Any]]:
    """(module, role) -> its leaf and the index in it."""
    out: dict[tuple[str, str], tuple[Leaf, Any]] = {}
    for leaf in found.values():
        if leaf.module.count("{}") != len(leaf.front):
            continue
        for module, place in leaf.modules().items():
            known = out.setdefault((module, leaf.role), (leaf, place))
            if known[0] is not leaf:
                raise ValueError(
                    f"{known[0].path!r} and {leaf.path!r} both are the {leaf.role} of "
                    f"{module!r}: names= must tell them apart"
                )
    return out


def peers(
    named: Mapping[str, Leaf], layers: Collection[str]
) -> tuple[tuple[str, int, int], ...]:
    """(module, n, m) of the layers, in the order of the leaves, one layer at a time."""
    out = []
    every = [x for x in named.values() if x.role == "weight" and x.use is not None]
    for _, run in it.groupby(every, key=lambda leaf: leaf.front):
        group = list(run)
        for at in it.product(*map(range, group[0].front)):
            names = [(leaf.module.format(*at), leaf.use) for leaf in group]
            out += [(m, *sides(u)) for m, u in names if u is not None and m in layers]
    return tuple(out)


def _named(path: str, names: Names) -> tuple[str, str]:
    """The module of a leaf, and which of its parameters it is."""
    given = names(path) if callable(names) else (names or {}).get(path)
    dotted = path.replace("/", ".").removesuffix(".raw_value").removesuffix(".value")
    parent, _, last = dotted.rpartition(".")
    role = "bias" if last == "b" or "bias" in last else "weight"
    if given is not None:
        for ending in ("weight", "bias"):
            if given.endswith(f".{ending}"):
                return given.removesuffix(f".{ending}"), ending
        return given, role
    return (parent, role) if last in _LAST and parent else (dotted, role)
