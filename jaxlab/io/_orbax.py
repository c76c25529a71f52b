"""Orbax checkpoints, opened lazily: tensorstore reads slices, and nothing beside them.

Understood are the folders that Orbax writes: zarr and zarr 3, each in OCDBT or as plain
folders; the item of a step, and the latest step of a manager.
"""

from collections.abc import Mapping
import dataclasses
import functools as ft
import math
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from ._checkpoint import Checkpoint, Tensor
from ._dtypes import DTYPES
from ._errors import refuse, show
from ._json import read_object
from ._names import to_name
from ._orbax_save import Pending as Pending, save_orbax as save_orbax
from ._shards import check_size, read_manifest

_TREE, _STEP, _STRINGS = "_METADATA", "_CHECKPOINT_METADATA", "_strings.json"
_CACHE = 2**27  # bytes of decoded chunks that are kept for the next block
_DTYPES = {*DTYPES.values(), np.dtype(np.complex128)}


@dataclasses.dataclass(frozen=True, repr=False)
class Stored(Tensor):
    """A tensor of a tensorstore: a slice reads the chunks that it touches."""

    store: Any

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a slice along all axes, where it is one of simple steps."""
        keys = index if isinstance(index, tuple) else (index,)
        simple = all(isinstance(k, slice) and k.step in (None, 1) for k in keys)
        if not simple or len(keys) > len(self.shape):
            return super().__getitem__(index)
        spans = [k.indices(n) for k, n in zip(keys, self.shape, strict=False)]
        box = tuple(slice(low, max(low, high)) for low, high, _ in spans)
        return _block(self.file, self.name, self.store[box])


def open_orbax(path: Path | str) -> Checkpoint:
    """Opens an Orbax checkpoint: its structure is read and checked, its arrays are not.

    Args:
      path: the folder of a checkpoint, of a step with one item, or of steps, of which
        the latest is opened.

    Returns:
      A checkpoint whose tensors read their slices from tensorstore.

    Raises:
      FormatError: the folder is incomplete, or not what Orbax writes; names the tensor.
      OSError: it cannot be read.
    """
    folder = _item(Path(path))
    for name, listed in (read_manifest(folder) or {}).items():
        if not (folder / name).is_file():
            raise refuse(folder / name, "missing, but the manifest lists it")
        check_size(folder / name, listed.size)
    tree = read_object(folder / _TREE, constants=True)
    names = _names(folder / _TREE, tree)
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    opening = {
        name: ts.open(_spec(folder, tree, key), open=True, read=True, context=context)
        for name, key in names.items()
    }
    tensors = {n: _tensor(folder, n, future) for n, future in opening.items()}
    metadata = _texts(folder / _STRINGS) | _texts(folder / _STEP, "custom_metadata")
    return Checkpoint(Path(path), "orbax", tensors, metadata)


def _item(path: Path) -> Path:
    """The folder that holds the arrays: this one, its only item, or the latest step."""
    if (path / _TREE).is_file():
        return path
    inner = [f for f in sorted(path.iterdir()) if f.is_dir()]
    items = [f for f in inner if (f / _TREE).is_file()]
    if len(items) == 1 and not items[0].name.isdigit():
        return items[0]
    steps = [f for f in inner if f.name.isdecimal() and f.name.isascii()]
    if steps:
        return _item(max(steps, key=lambda f: int(f.name)))
    if items:
        names = [f.name for f in items]
        raise refuse(path, f"holds the items {names}: open one of them")
    raise refuse(path, f"no Orbax checkpoint: it has no {_TREE}, so it is incomplete")


def _names(file: Path, tree: Mapping[str, Any]) -> dict[str, str]:
    """Dotted names of the arrays, and what Orbax calls them in the store."""
    names: dict[str, str] = {}
    entries = tree.get("tree_metadata")
    if not isinstance(entries, dict):
        raise refuse(file, "no tree_metadata")
    for entry in entries.values():
        try:
            keys = [k["key"] for k in entry["key_metadata"]]
            value = entry["value_metadata"]
            kind, skipped = value["value_type"], value["skip_deserialize"]
        except (KeyError, TypeError):
            raise refuse(file, f"broken entry {show(entry)}") from None
        if skipped or kind == "string":
            continue  # no leaf, or text that is among the metadata
        if not keys or not all(isinstance(k, str) and _plain(k) for k in keys):
            raise refuse(file, f"{show(keys)} is no path of plain keys")
        name = to_name("/".join(keys))
        if name in names:
            raise refuse(file, "two leaves have this path", tensor=name)
        names[name] = ".".join(keys)
    return names


def _texts(file: Path, *keys: str) -> dict[str, str]:
    """The string pairs of a JSON file that may be missing, or of an object in it."""
    content: Any = read_object(file, constants=True) if file.is_file() else {}
    for key in keys:
        content = content.get(key) or {}
    if not isinstance(content, dict):
        raise refuse(file, f"{keys} is no object")
    return {k: v for k, v in content.items() if isinstance(v, str)}


def _plain(key: str) -> bool:
    """Whether a key can name a folder, and no other one."""
    return key not in ("", ".", "..") and not {"/", "\\", "\0"} & set(key)


def _spec(folder: Path, tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Where tensorstore finds an array; a lost chunk is an error, not zeros."""
    root = f"{folder.absolute()}/"
    if tree.get("use_ocdbt", (folder / "manifest.ocdbt").is_file()):
        base = {"driver": "file", "path": root}
        place = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{root}{name}/"}
    return {
        "driver": "zarr3" if tree.get("use_zarr3") else "zarr",
        "kvstore": place,
        "fill_missing_data_reads": not tree.get("store_array_data_equal_to_fill_value"),
    }


def _tensor(folder: Path, name: str, opening: Any) -> Stored:
    """An opened array; it reads with the first use."""
    try:
        store = opening.result()
    except ValueError as error:
        raise refuse(folder, _first_line(error), tensor=name) from None
    dtype = store.dtype.numpy_dtype
    if dtype not in _DTYPES:
        raise refuse(folder, f"dtype {store.dtype.name} is not supported", tensor=name)
    read = ft.partial(_fill, folder, name, store)
    return Stored(name, tuple(store.shape), dtype, folder, read, store)


def _fill(folder: Path, name: str, store: Any, buffer: np.ndarray, start: int) -> None:
    """Fills a buffer with bytes of an array, from the rows that hold them."""
    shape, item = tuple(store.shape), store.dtype.numpy_dtype.itemsize
    row = item * math.prod(shape[1:])
    low, high = start // row, -(-(start + len(buffer)) // row)
    block = _block(folder, name, store[low:high] if shape else store)
    data = block.reshape(-1).view(np.uint8)
    buffer[:] = data[start - low * row :][: len(buffer)]


def _block(folder: Path, name: str, store: Any) -> np.ndarray:
    """Reads a slice of a store whole, in C order."""
    try:
        block = np.asarray(store.read().result(), order="C")
    except ValueError as error:
        raise refuse(folder, _first_line(error), tensor=name) from None
    if block.dtype.kind == "b" and block.view(np.uint8).max(initial=0) > 1:
        raise refuse(folder, "a bool that is neither 0 nor 1", tensor=name)
    return block


def _first_line(error: Exception) -> str:
    """What tensorstore says, without its source locations."""
    return str(error).split(" [", 1)[0].split("\n", 1)[0]
