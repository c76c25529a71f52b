"""How a large model is cut into files, and the index and manifest that list them."""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from ._errors import refuse, show
from ._header import Entry
from ._json import read_object

INDEX = "model.safetensors.index.json"
MANIFEST = "jaxlab_manifest.json"
_VERSION = 1


class Listed(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "Listed":
        """What the manifest says of a file with this content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


def plan_shards(
    entries: Iterable[Entry], shard_size: float = 5e9
) -> list[tuple[str, tuple[Entry, ...]]]:
    """Cuts tensors into files of at most `shard_size` bytes; never cuts a tensor.

    Args:
      entries: the tensors, in the order they will be written.
      shard_size: bytes of tensors per file; a larger tensor gets a file of its own.

    Returns:
      (file name, its tensors), in order: `model.safetensors` where one file does, else
      `model-00001-of-00003.safetensors` and so on.

    Raises:
      ValueError: a `shard_size` that is not positive.

    Example:
      >>> import numpy as np
      >>> entries = [Entry(name, np.dtype("uint8"), (6,)) for name in "abc"]
      >>> [(file, len(held)) for file, held in plan_shards(entries, 12)]
      [('model-00001-of-00002.safetensors', 2), ('model-00002-of-00002.safetensors', 1)]
    """
    if not shard_size > 0:
        raise ValueError(f"shard_size must be a positive number, got {shard_size}")
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        return [("model.safetensors", tuple(shards[0]))]
    name = f"model-{{:05d}}-of-{len(shards):05d}.safetensors".format
    return [(name(i), tuple(shard)) for i, shard in enumerate(shards, 1)]


def index_bytes(shards: Sequence[tuple[str, Sequence[Entry]]]) -> bytes:
    """The `model.safetensors.index.json` of a plan; the same plan, the same bytes.

    Args:
      shards: as `plan_shards` returns them.

    Returns:
      The JSON, with `weight_map` and `metadata.total_size`.
    """
    total = sum(entry.nbytes for _, held in shards for entry in held)
    places = {entry.name: file for file, held in shards for entry in held}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return _text(index)


def manifest_bytes(files: Mapping[str, Listed | tuple[int, str]]) -> bytes:
    """The `jaxlab_manifest.json` of a folder: written last, it says that all is there.

    Args:
      files: size and SHA-256 of each file, by its name in the folder.

    Returns:
      The JSON.
    """
    listed = {k: Listed(*v)._asdict() for k, v in files.items()}
    return _text({"format": "jaxlab", "version": _VERSION, "files": listed})


def read_manifest(folder: Path) -> dict[str, Listed] | None:
    """The manifest of a folder, or None where it has none.

    Args:
      folder: the folder.

    Returns:
      Size and SHA-256 of each file, by name.

    Raises:
      FormatError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_object(path)
    files = content.get("files")
    if content.get("version") != _VERSION or not isinstance(files, dict):
        raise refuse(path, f"not a manifest of version {_VERSION}")
    listed = {}
    for name, entry in files.items():
        fields = entry if isinstance(entry, dict) else {}
        size, digest = fields.get("size"), fields.get("sha256")
        if not (isinstance(size, int) and isinstance(digest, str)):
            raise refuse(path, f"{show(name)} has no size and sha256")
        if "\0" in name or ".." in Path(name).parts or Path(name).is_absolute():
            raise refuse(path, f"{show(name)} is not a file of this folder")
        listed[name] = Listed(size, digest)
    return listed


def verify(folder: Path) -> None:
    """Reads every file that the manifest of a folder lists, and checks it.

    Args:
      folder: the folder; one without a manifest passes.

    Raises:
      FormatError: a file is missing, of another size or of another content.
    """
    for name, (size, digest) in (read_manifest(folder) or {}).items():
        path = folder / name
        if not path.is_file():
            raise refuse(path, f"missing, but {MANIFEST} lists it")
        check_size(path, size)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise refuse(path, f"SHA-256 {found}, but {MANIFEST} says {digest}")


def check_size(path: Path, size: int) -> None:
    """Refuses a file whose size is not what the manifest says."""
    found = path.stat().st_size
    if found != size:
        raise refuse(path, f"{found} bytes, but {MANIFEST} says {size}: incomplete")


def _text(content: Mapping[str, object]) -> bytes:
    """JSON that is the same for the same content."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode()
