"""Reads a checkpoint into a tree of arrays, anywhere on any mesh."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
import numpy as np

from .. import tree
from ._checkpoint import Tensor
from ._errors import refuse
from ._names import leaf_paths, to_path, unflatten
from ._open import open  # noqa: A004  (ours)


def load(
    path: str | Path,
    *,
    like: Any = None,
    sharding: Sharding | Any = None,
) -> Any:
    """Reads a checkpoint of any format into a tree of arrays.

    Args:
      path: as for `open`.
      like: a tree that gives the structure: NNX state, Linen params, the arrays of an
        Equinox model, or `jax.eval_shape` of any of them. Shapes and dtypes must agree,
        and its shardings are kept. None gives nested dicts, one level per component; a
        flat dict, where nothing nests, has the names of the file as they are.
      sharding: one sharding for all leaves, or a tree of them with the same paths. Each
        device reads only the rows it holds.

    Returns:
      A tree of arrays, in the dtypes of the file: 64-bit ones too, whatever
      `jax_enable_x64` says.

    Raises:
      FormatError: as `open`, or where tensors are missing, left over or of another
        shape or dtype than in `like`; names the leaf.
      ValueError: `like` holds something that is no array, or `sharding` misses a leaf.

    Example:
      >>> import tempfile
      >>> file = tempfile.mkdtemp() + "/a.safetensors"
      >>> from jaxlab import io
      >>> io.save(file, {"block": {"w": np.ones(2, np.float32)}})
      >>> io.load(file)
      {'block': {'w': Array([1., 1.], dtype=float32)}}
    """
    with open(path) as checkpoint:
        flat = {to_path(name): t for name, t in checkpoint.tensors.items()}
        if like is None:
            where = _shardings(sharding, list(flat))
            return unflatten({p: _put(t, where.get(p)) for p, t in flat.items()})
        wanted = dict(zip(leaf_paths(like), jax.tree.leaves(like), strict=True))
        _check_paths(checkpoint.path, flat, wanted)
        own = {p: _sharding_of(x) for p, x in wanted.items()}
        where = own if sharding is None else _shardings(sharding, list(flat))
        leaves = [_restore(p, flat[p], x, where[p]) for p, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _restore(path: str, tensor: Tensor, like: Any, sharding: Sharding | None) -> Any:
    """One leaf, after a check of shape and dtype; random keys are wrapped again."""
    if not (hasattr(like, "shape") and hasattr(like, "dtype")):
        raise ValueError(f"like has no array at {path!r} but {type(like).__name__}")
    if is_key(like):
        impl = None

        def data(key: jax.Array) -> jax.Array:
            nonlocal impl  # a shape alone does not tell its generator; a trace does
            impl = jax.random.key_impl(key)
            return jax.random.key_data(key)

        raw = _restore(path, tensor, jax.eval_shape(data, like), None)
        return jax.random.wrap_key_data(raw, impl=impl)
    want = tuple(like.shape), np.dtype(like.dtype)
    if (tensor.shape, tensor.dtype) != want:
        found = f"{tensor.dtype}{list(tensor.shape)}, expected {want[1]}{list(want[0])}"
        raise refuse(tensor.file, f"leaf {path!r}: {found}", tensor=tensor.name)
    return _put(tensor, sharding)


def _put(tensor: Tensor, sharding: Sharding | None) -> jax.Array:
    """The tensor as an array; each device gets the rows it holds."""
    wide = tensor.dtype.itemsize >= 8
    with jax.enable_x64(True) if wide else nullcontext():
        if sharding is None:
            return jax.device_put(tensor.read())
        read: dict[str, np.ndarray] = {}  # devices that hold the same part share it

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            key = str(index)
            if key not in read:
                read[key] = tensor[index] if index else tensor.read()
            return read[key]

        return jax.make_array_from_callback(
            tensor.shape, sharding, piece, dtype=tensor.dtype
        )


def _check_paths(file: Path, found: Mapping[str, Tensor], wanted: Mapping) -> None:
    """Refuses a checkpoint that lacks leaves of `like`, or has more."""
    missing = [p for p in wanted if p not in found]
    extra = [p for p in found if p not in wanted]
    if missing:
        why = f"no tensor for the leaf {missing[0]!r} ({len(missing)} are missing"
        raise refuse(file, why + f", {len(extra)} are left over)")
    if extra:
        why = f"no leaf for the tensor at {extra[0]!r} ({len(extra)} are left over)"
        raise refuse(file, why, tensor=found[extra[0]].name)


def _shardings(sharding: Any, paths: list[str]) -> dict[str, Sharding | None]:
    """The sharding of each path: the same for all, or from a tree."""
    if sharding is None or isinstance(sharding, Sharding):
        return dict.fromkeys(paths, sharding)
    given = dict(zip(tree.paths(sharding), jax.tree.leaves(sharding), strict=True))
    if missing := [p for p in paths if p not in given]:
        raise ValueError(f"sharding has no leaf {missing[0]!r}")
    return given


def _sharding_of(leaf: Any) -> Sharding | None:
    """Where a leaf of `like` was put on purpose."""
    placed = getattr(leaf, "committed", True)
    return getattr(leaf, "sharding", None) if placed else None


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
