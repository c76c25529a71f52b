"""Random keys by path."""

import zlib

import jax
from jaxtyping import PRNGKeyArray

from ..types import Params
from ._paths import path_map


def path_number(path: str) -> int:
    """The number that `keys_like` folds into a key: the CRC-32 of the path.

    Args:
      path: a slash path.

    Returns:
      A number below 2^32.

    Example:
      >>> path_number("w")
      476252946
    """
    return zlib.crc32(path.encode())


def keys_like(key: PRNGKeyArray, tree: Params) -> Params:
    """One key per leaf, folded from its path: a new leaf disturbs no other draw.

    Args:
      key: consumed.
      tree: the tree to make keys for.

    Returns:
      A tree of keys.

    Example:
      >>> one = keys_like(jax.random.key(0), {"w": 0})
      >>> two = keys_like(jax.random.key(0), {"a": 0, "w": 0})
      >>> bool(one["w"] == two["w"])
      True
    """
    return path_map(lambda path, _: jax.random.fold_in(key, path_number(path)), tree)
