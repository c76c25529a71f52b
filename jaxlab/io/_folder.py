"""A Hugging Face model folder: shards with an index, config, tokenizer, templates.

Nothing outside the folder is ever opened: a shard is a plain file name in it, and a
link may leave it only inside the Hugging Face cache, towards that model's own blobs.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
import os
from pathlib import Path
from typing import Any

from ._atomic import atomic_bytes
from ._checkpoint import Checkpoint, Tensor
from ._errors import FormatError, refuse, show
from ._files import read_bytes
from ._hub import model_home
from ._json import read_object
from ._safetensors import open_safetensors
from ._shards import Listed, check_size, read_manifest

_SINGLE = ("model", "diffusion_pytorch_model", "adapter_model")
_SHARD = "*-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].safetensors"
_CARRIED = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "*processor_config.json",
)
_CARRIED_LIMIT = 2**30
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_folder(path: Path | str) -> Checkpoint:
    """Opens a folder of safetensors, with or without an index.

    Args:
      path: a folder, or the `*.safetensors.index.json` in one.

    Returns:
      A checkpoint with the tensors of all shards, the parsed config.json, and the
      files that go with the model wherever it is saved.

    Raises:
      FormatError: the folder is ambiguous, incomplete or unsafe; names the file.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    index = _index(folder) if path.is_dir() else path
    sizes = read_manifest(folder) or {}
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    with ExitStack() as opened:
        for name, expected in (_weight_map(index) if index else _lone(folder)).items():
            file = inside(folder, name)
            if name in sizes:
                check_size(file, sizes[name].size)
            shard = opened.enter_context(open_safetensors(file))
            if index and expected is not None:
                _check_shard(index, file, shard.tensors, expected)
            tensors |= shard.tensors
            metadata |= shard.metadata
        config = _config(folder)
        carried = tuple(_carried(folder))
        shut = opened.pop_all().close
    return Checkpoint(folder, "safetensors", tensors, metadata, config, carried, shut)


def carry(checkpoint: Checkpoint, folder: Path) -> dict[str, Listed]:
    """Copies the carried files of a model into another folder.

    Args:
      checkpoint: an open model folder.
      folder: where to copy them; it exists.

    Returns:
      Size and SHA-256 of each copy, by its name in the folder.
    """
    copied = {}
    for path in checkpoint.carried:
        name = path.relative_to(checkpoint.path)
        data = read_bytes(inside(checkpoint.path, str(name)), _CARRIED_LIMIT)
        (folder / name).parent.mkdir(exist_ok=True)
        atomic_bytes(folder / name, data)
        copied[name.as_posix()] = Listed.of(data)
    return copied


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, after a check that it leads to nowhere else."""
    path = folder / name
    if not os.path.lexists(path):
        raise refuse(path, "the file is missing")
    try:
        real, root = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):  # a cycle is either, by the version of Python
        raise refuse(path, "a link that leads nowhere") from None
    home = model_home(root)
    if not (real.is_relative_to(root) or (home and real.parent == home / "blobs")):
        raise refuse(
            path, f"a link out of its folder, to {real}; copy the file instead"
        )
    return path


def refuse_pickle(path: Path) -> FormatError:
    """The error for a file that only unpickling could read."""
    return refuse(
        path,
        "refused: it is a pickle, and unpickling runs whatever code the file names; "
        "convert it to safetensors where you trust it (safetensors.torch.save_file)",
    )


def _index(folder: Path) -> Path | None:
    """The one index of a folder, if it has one."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return None
    if len(found) > 1:
        raise refuse(folder, f"several indices: {show([p.name for p in found])}")
    name = found[0].name
    lone = folder / name.removesuffix(".index.json")
    if os.path.lexists(lone):
        why = f"both {lone.name} and {name}: which of them is the model? remove one"
        raise refuse(folder, why)
    return inside(folder, name)


def _lone(folder: Path) -> dict[str, None]:
    """The one safetensors file of a folder without an index."""
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    shards = [name for name in found if fnmatchcase(name, _SHARD)]
    if shards and shards != ["model-00001-of-00001.safetensors"]:
        why = f"{shards[0]} is one shard of several, and there is no index: incomplete"
        raise refuse(folder, why)
    for stem in _SINGLE:
        if f"{stem}.safetensors" in found:
            return {f"{stem}.safetensors": None}
    if len(found) > 1:
        why = f"several safetensors files and no index: {show(found)}; name one of them"
        raise refuse(folder, why)
    if not found:
        for path in sorted(folder.iterdir()):
            if path.suffix in PICKLES:
                raise refuse_pickle(path)
        raise refuse(folder, "no checkpoint: no safetensors file and no index")
    return {found[0]: None}


def _weight_map(index: Path) -> dict[str, set[str]]:
    """The tensors that an index gives to each shard, by plain file name."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise refuse(index, "weight_map must map tensor names to file names")
    shards: dict[str, set[str]] = {}
    for tensor, file in places.items():
        plain = isinstance(file, str) and not set(file) & set("/\\\0")
        if not (plain and file.endswith(".safetensors")):
            why = f"the shard {show(file)} is not the plain name of a safetensors file"
            raise refuse(index, why, tensor=tensor)
        shards.setdefault(file, set()).add(tensor)
    return dict(sorted(shards.items()))


def _check_shard(
    index: Path, file: Path, held: Mapping[str, Tensor], expected: set[str]
) -> None:
    """Refuses a shard that does not hold exactly what the index says."""
    for tensor in sorted(expected - held.keys()):
        why = f"{index.name} puts this tensor here, but the file does not hold it"
        raise refuse(file, why, tensor=tensor)
    for tensor in sorted(held.keys() - expected):
        why = f"the file holds this tensor, but {index.name} does not put it here"
        raise refuse(file, why, tensor=tensor)


def _config(folder: Path) -> dict[str, Any] | None:
    """The parsed config.json; some models write Infinity there."""
    if not os.path.lexists(folder / "config.json"):
        return None
    return read_object(inside(folder, "config.json"), constants=True)


def _carried(folder: Path) -> Iterator[Path]:
    """The files that go with the model, by name."""
    found = {p for pattern in _CARRIED for p in folder.glob(pattern)}
    for path in sorted(found):
        name = str(path.relative_to(folder))
        if inside(folder, name).is_file() and not name.endswith(".index.json"):
            yield path
