"""Dotted names of files, slash paths of trees, and nested dicts: one map, no loss.

A file says `model.layers.0.mlp.up_proj.weight`, a tree says
`model/layers/0/mlp/up_proj/weight`. The map between them exchanges `.` and `/`. It is
its own inverse, so every string has exactly one image and comes back from it: a slash
inside a name becomes a dot inside a path and returns. No character is an escape.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from .. import tree as trees

T = TypeVar("T")

_EXCHANGE = str.maketrans("./", "/.")
_DEPTH = 64


def to_path(name: str) -> str:
    """The slash path of a dotted name: exchanges `.` and `/`.

    Args:
      name: any string, as a file spells it.

    Returns:
      The path; `to_name` gives `name` back.

    Example:
      >>> to_path("model.layers.0.weight"), to_path("bert/kernel.w")
      ('model/layers/0/weight', 'bert.kernel/w')
    """
    return name.translate(_EXCHANGE)


def to_name(path: str) -> str:
    """The dotted name of a slash path: exchanges `/` and `.`.

    Args:
      path: any string, as `tree.paths` spells it.

    Returns:
      The name; `to_path` gives `path` back.

    Example:
      >>> to_name("block_0/attn/kernel")
      'block_0.attn.kernel'
    """
    return path.translate(_EXCHANGE)


def nest(flat: Mapping[str, T]) -> dict[str, Any]:
    """Nested dicts whose `tree.paths` are exactly the paths of `flat`.

    A path that goes on below another leaf cannot be nested there: from that leaf on its
    components stay together in one key, slashes included. So do the components beyond
    the 64th, which keeps hostile names from nesting deeper than JAX can walk.

    Args:
      flat: slash paths and their leaves.

    Returns:
      The nested dicts, in the order of `flat`.

    Example:
      >>> nest({"a/b": 1, "a/c": 2, "d": 3, "d/e": 4})
      {'a': {'b': 1, 'c': 2}, 'd': 3, 'd/e': 4}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, last = _components(path, flat)
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def unflatten(flat: Mapping[str, T]) -> dict[str, Any]:
    """The tree that `load` makes: nested, or flat with plain names if nothing nests.

    Args:
      flat: slash paths and their leaves.

    Returns:
      Nested dicts, or one dict by name.

    Example:
      >>> unflatten({"a/b": 1}), unflatten({"a.b": 1})
      ({'a': {'b': 1}}, {'a/b': 1})
    """
    tree = nest(flat)
    if any(isinstance(x, dict) for x in tree.values()):
        return tree
    return {to_name(path): x for path, x in tree.items()}


def leaf_paths(tree: Any) -> list[str]:
    """The slash path of every leaf, as a checkpoint knows it.

    A flat dict of arrays is a state dict: its keys are names already, dots and all.

    Args:
      tree: any tree of arrays.

    Returns:
      One path per leaf, in leaf order.

    Raises:
      ValueError: two leaves share a path.

    Example:
      >>> import numpy as np
      >>> leaf_paths({"a.b": np.ones(1)}), leaf_paths({"c": {"a.b": np.ones(1)}})
      (['a/b'], ['c/a.b'])
    """
    found = trees.paths(tree)
    arrays = np.ndarray | np.generic | jax.Array | jax.ShapeDtypeStruct
    if isinstance(tree, dict) and all(isinstance(v, arrays) for v in tree.values()):
        return [to_path(name) for name in found]
    return unique(found)


def unique(paths: Iterable[str]) -> list[str]:
    """The paths, after a check that no two leaves of a tree share one."""
    listed, seen = list(paths), set()
    for path in listed:
        if path in seen:
            raise ValueError(
                f"two leaves have the path {path!r}: a key that holds a slash reads "
                "like a nested one; rename one of them"
            )
        seen.add(path)
    return listed


def _components(path: str, leaves: Mapping[str, Any]) -> list[str]:
    """The keys that lead to a leaf: never through another leaf, never too deep."""
    parts = path.split("/", _DEPTH)
    for i in range(1, len(parts)):
        if "/".join(parts[:i]) in leaves:
            return [*parts[: i - 1], "/".join(parts[i - 1 :])]
    return parts
