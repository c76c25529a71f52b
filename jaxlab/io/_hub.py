"""Model references: a path, or a name in the local Hugging Face cache. No network."""

import os
from pathlib import Path
import re

_REFERENCE = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", re.ASCII)


def resolve(reference: str | os.PathLike[str]) -> Path:
    """The local path of a model: a file or folder, or `org/name[@revision]`.

    A name is looked up in the Hugging Face cache: `$HF_HUB_CACHE`, `$HF_HOME/hub` or
    `~/.cache/huggingface/hub`. Nothing is downloaded.

    Args:
      reference: a path, or the name of a model and perhaps a branch, tag or commit.

    Returns:
      A path that exists.

    Raises:
      FileNotFoundError: no such path, and no such model in the cache.

    Example:
      >>> resolve("./missing.safetensors")
      Traceback (most recent call last):
      FileNotFoundError: ./missing.safetensors does not exist
    """
    path = Path(reference)
    if os.path.lexists(path):
        return path
    match = _REFERENCE.fullmatch(os.fspath(reference))
    if match is None or ".." in match[0] or path.is_absolute() or match[0][0] == ".":
        raise FileNotFoundError(f"{reference} does not exist")
    name, revision = match[1], match[2] or "main"
    home = cache() / ("models--" + name.replace("/", "--"))
    commit = _commit(home, revision)
    if commit is None:
        raise FileNotFoundError(
            f"{reference} is neither a path nor a model in the Hugging Face cache "
            f"({cache()}); jaxlab downloads nothing, fetch it first: "
            f"hf download {name} --revision {revision}"
        )
    return home / "snapshots" / commit


def cache() -> Path:
    """The folder of the local Hugging Face cache.

    Returns:
      A path, which need not exist.
    """
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("HF_HOME"):
        return Path(folder).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(base).expanduser() / "huggingface" / "hub"


def model_home(folder: Path) -> Path | None:
    """The cache folder of the model, where `folder` is one of its snapshots."""
    home = folder.parent.parent
    known = folder.parent.name == "snapshots" and home.name.startswith("models--")
    return home if known else None


def _commit(home: Path, revision: str) -> str | None:
    """The snapshot that a branch, tag or commit names."""
    pointer = home / "refs" / revision
    named = pointer.read_text().strip() if pointer.is_file() else revision
    plain = re.fullmatch(r"[\w.-]+", named, re.ASCII) is not None
    return named if plain and (home / "snapshots" / named).is_dir() else None
