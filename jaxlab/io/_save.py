"""Writes a tree of arrays as a checkpoint that is whole or not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from ._atomic import atomic_bytes, atomic_folder
from ._dtypes import little, to_code
from ._errors import show
from ._folder import PICKLES, refuse_pickle
from ._header import Entry
from ._load import is_key
from ._names import leaf_paths, to_name
from ._safetensors import safetensors_writer
from ._shards import INDEX, MANIFEST, Listed, index_bytes, manifest_bytes, plan_shards

if TYPE_CHECKING:
    from ._orbax_save import Pending

Format = Literal["safetensors", "npz", "msgpack", "orbax", "compeft"]

_SUFFIXES: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".msgpack": "msgpack",
    ".orbax": "orbax",
    ".compeft": "compeft",
}


def save(
    path: str | Path,
    tree: Any,
    *,
    format: Format | None = None,  # noqa: A002  (the handbook's word)
    shard_size: float = 5e9,
    metadata: Mapping[str, str] | None = None,
    wait: bool = True,
) -> "Pending | None":
    """Writes a tree of arrays; a crash at any moment leaves the old file or the new.

    Args:
      path: a file `.safetensors`, `.npz`, `.msgpack` or `.compeft` (ternary tensors, as
        `merge.compeft` makes them), which is replaced; or a folder, which must be
        missing or empty: of safetensors, or Orbax where it ends in `.orbax`. Its parent
        must exist.
      tree: nested dicts, NNX state, Linen params, any tree of arrays. A leaf's name is
        its path with dots for slashes; the keys of a flat dict of arrays are names as
        they are. Random keys are saved as their data.
      format: where the suffix does not say it.
      shard_size: bytes per file of a safetensors folder.
      metadata: string pairs for the file.
      wait: return when all is on disk. Orbax alone can go on in the background: the
        values have been copied by then, so arrays may be changed or donated.

    Returns:
      The save under way where `wait` is False: its `wait()` returns or raises.

    Raises:
      ValueError: a leaf is no array, has a dtype or values the format lacks, or shares
        its path with another; names the leaf. Or a format that cannot go on by itself.
      OSError: disk full, target read-only or folder not empty. Nothing is left behind.

    Example:
      >>> import tempfile
      >>> from jaxlab import io
      >>> folder = tempfile.mkdtemp()
      >>> io.save(folder, {"a": np.ones(3), "b": np.zeros(2)}, shard_size=24)
      >>> sorted(p.name for p in Path(folder).glob("*-of-*"))
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    path = Path(path)
    kind = _format(path, format)
    if not wait and kind != "orbax":
        raise ValueError(f"{path}: only Orbax saves in the background, not {kind}")
    flat = flatten(tree, spread=kind == "orbax")
    if kind == "npz":
        from ._npz import save_npz

        save_npz(path, flat, metadata)
    elif kind == "msgpack":
        from ._msgpack import save_msgpack

        save_msgpack(path, flat, metadata)
    elif kind == "compeft":
        from ._compeft import save_compeft

        save_compeft(path, flat, metadata)
    elif kind == "orbax":
        from ._orbax import save_orbax

        pending = save_orbax(path, flat, metadata, wait=wait)
        return None if wait else pending
    elif path.suffix == ".safetensors":
        _write(path, _entries(flat), flat, metadata)
    else:
        _save_folder(path, flat, shard_size, metadata)
    return None


def flatten(tree: Any, *, spread: bool = False) -> dict[str, Any]:
    """The leaves of a tree by dotted name, in leaf order.

    Args:
      tree: any tree of arrays.
      spread: allow arrays that are spread over several processes.

    Returns:
      Arrays as they are, except that random keys become their data.

    Raises:
      ValueError: a leaf is no array, or two leaves share a path.

    Example:
      >>> flatten({"a": {"b": np.ones(1)}})
      {'a.b': array([1.])}
    """
    flat = {}
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            kind = type(leaf).__name__
            raise ValueError(f"the leaf {path!r} is no array but {kind} {show(leaf)}")
        if not (spread or getattr(leaf, "is_fully_addressable", True)):
            why = "is spread over several processes; save it as Orbax (.orbax)"
            raise ValueError(f"the leaf {path!r} {why}")
        flat[to_name(path)] = jax.random.key_data(leaf) if is_key(leaf) else leaf
    return flat


def _format(path: Path, asked: str | None) -> Format:
    """The format to write: asked for, or that of the suffix."""
    if path.suffix.lower() in PICKLES:
        raise refuse_pickle(path)
    implied = _SUFFIXES.get(path.suffix)
    if asked is None:
        return implied or "safetensors"
    if asked not in _SUFFIXES.values():
        raise ValueError(f"no format {asked!r}; there are {[*_SUFFIXES.values()]}")
    if implied not in (None, asked):
        raise ValueError(f"{path} ends in {path.suffix}, but format is {asked!r}")
    return asked  # pyright: ignore[reportReturnType]


def _entries(flat: Mapping[str, Any]) -> list[Entry]:
    """What to write, widest dtype first, so that every tensor starts aligned."""
    entries = []
    for name, leaf in flat.items():
        dtype = little(np.dtype(leaf.dtype))
        try:
            to_code(dtype)
        except ValueError as error:
            raise ValueError(f"the tensor {show(name)}: {error}") from None
        entries.append(Entry(name, dtype, tuple(leaf.shape)))
    return sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))


def _save_folder(
    path: Path,
    flat: Mapping[str, Any],
    shard_size: float,
    metadata: Mapping[str, str] | None,
) -> None:
    """Shards, then their index, then the manifest, in a folder that appears at once."""
    shards = plan_shards(_entries(flat), shard_size)
    with atomic_folder(path) as staging:
        listed = {f: _write(staging / f, held, flat, metadata) for f, held in shards}
        if len(shards) > 1:
            index = index_bytes(shards)
            atomic_bytes(staging / INDEX, index)
            listed[INDEX] = Listed.of(index)
        atomic_bytes(staging / MANIFEST, manifest_bytes(listed))


def _write(
    path: Path,
    entries: list[Entry] | tuple[Entry, ...],
    flat: Mapping[str, Any],
    metadata: Mapping[str, str] | None,
) -> Listed:
    """One safetensors file; one tensor on the host at a time."""
    with safetensors_writer(path, entries, metadata) as write:
        for entry in entries:
            host = np.asarray(flat[entry.name])
            write(np.ascontiguousarray(host, dtype=entry.dtype))
    return Listed(write.size, write.sha256)
