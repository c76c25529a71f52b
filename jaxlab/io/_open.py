"""Opens a checkpoint of any format, by what is on disk."""

from pathlib import Path

from ._checkpoint import Checkpoint
from ._errors import refuse
from ._files import read_start
from ._folder import PICKLES, open_folder, refuse_pickle
from ._hub import resolve
from ._safetensors import open_safetensors

_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "commit_success.txt")
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_NPY = b"\x93NUMPY"
_PICKLE = b"\x80"


def open(path: str | Path) -> Checkpoint:  # noqa: A001  (it does what open does)
    """Opens a checkpoint without reading its tensors; all that is read is checked.

    The format is that of the suffix, or else of the first bytes: `.safetensors`, `.npz`
    and `.npy`, `.msgpack`, `.compeft`; a folder holds safetensors, with or without an
    index, or is an Orbax checkpoint.

    Args:
      path: a file, a folder, or `org/name[@revision]` in the local Hugging Face cache.

    Returns:
      An open checkpoint, a context manager.

    Raises:
      FormatError: the file is not what it should be, or is not safe to read (a pickle,
        a link out of its folder); names file, tensor and byte.
      FileNotFoundError: there is no such path or model; says how to fetch it.
      OSError: it cannot be read.

    Example:
      >>> open("missing.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: missing.safetensors is neither a path nor a model in ...
    """
    file = resolve(path)
    if file.is_dir():
        return _open_folder(file)
    suffix = file.suffix.lower()
    if file.name.endswith(".safetensors.index.json"):
        return open_folder(file)
    if suffix == ".safetensors":
        return open_safetensors(file)
    if suffix in PICKLES:
        raise refuse_pickle(file)
    start = read_start(file, 10)
    if suffix in (".npz", ".npy") or start[:4] in _ZIP or start[:6] == _NPY:
        from ._npz import open_npz

        return open_npz(file)
    if suffix == ".msgpack":
        from ._msgpack import open_msgpack

        return open_msgpack(file)
    if suffix == ".compeft":
        from ._compeft import open_compeft

        return open_compeft(file)
    if start[8:9] == b"{" or start.startswith(b"version "):
        return open_safetensors(file)
    if start[:1] == _PICKLE:
        raise refuse_pickle(file)
    kinds = ".safetensors, .npz, .msgpack, .compeft"
    why = f"{kinds}, or a folder of safetensors or Orbax"
    raise refuse(file, f"no checkpoint format that is known here: {why}")


def _open_folder(folder: Path) -> Checkpoint:
    """A folder of safetensors, or else of Orbax where it looks like that."""
    safetensors = any(folder.glob("*.safetensors")) or any(
        folder.glob("*.safetensors.index.json")
    )
    steps = (folder, *folder.iterdir())
    marked = any((step / mark).exists() for step in steps for mark in _ORBAX)
    if not safetensors and (marked or folder.suffix == ".orbax"):
        from ._orbax import open_orbax

        return open_orbax(folder)
    return open_folder(folder)
