"""Data sets by name, as arrays in memory."""

from collections.abc import Callable
import functools as ft
import os
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float, Int
import numpy as np

from . import _local
from ._corrupt import corrupt

VARIABLE = "JAXLAB_DATA"


class Split(NamedTuple):
    """Images in [0, 1] and their labels."""

    x: Float[np.ndarray, "n *image"]
    y: Int[np.ndarray, " n"]


class Dataset(NamedTuple):
    """A task: two disjoint splits and the number of classes."""

    train: Split
    test: Split
    classes: int


def names() -> tuple[str, ...]:
    """The data sets that `load` reads without a network, by name.

    Returns:
      The names; all but "digits" need the folder named by `JAXLAB_DATA`.

    Example:
      >>> "digits" in names()
      True
    """
    return ("digits", *_local.READERS)


def available(name: str, *, folder: Path | str | None = None) -> bool:
    """Is a data set of `names` at hand?

    Args:
      name: as for `load`; what stands behind a slash is left out.
      folder: where the files are; `$JAXLAB_DATA`, or `../shared/data` of a checkout.

    Returns:
      Whether `load` would find its file.

    Example:
      >>> available("digits/rotate30")
      True
    """
    plain = name.split("/")[0]
    if plain == "digits":
        return True
    where = _folder(folder)
    return plain in _local.READERS and where is not None and _local.has(plain, where)


def load(
    name: str,
    *,
    seed: int = 0,
    train: int | None = None,
    test: int | None = None,
    folder: Path | str | None = None,
) -> Dataset:
    """Loads a data set by name.

    `"mnist"` names a data set; `"mnist/rotate30"`, `"mnist/invert"`, `"mnist/noise3"`
    the same one with every image changed (`corrupt`); several changes are applied in
    turn. `"tfds:cifar10"` goes through TensorFlow Datasets, prepared or downloaded.

    Args:
      name: one of `names()` or `tfds:<name>`, with changes behind slashes.
      seed: of the split, where the data set has none of its own, of the subsets, and of
        random changes.
      train: how many training examples to keep, drawn at random; all by default.
      test: the same of the test split.
      folder: where the files are; `$JAXLAB_DATA`, or `../shared/data` of a checkout.

    Returns:
      The data set: float32 images in [0, 1], `[n h w]` grey or `[n h w c]`, and int32
      labels.

    Raises:
      ValueError: no such data set or change.
      FileNotFoundError: its files are not at hand; names the folder.

    Degenerate inputs:
      More examples asked for than there are: all of them.

    Example:
      >>> load("digits", train=100).train.x.shape
      (100, 8, 8)
    """
    plain, *changes = name.split("/")
    whole = _whole(plain, seed, folder)
    keep = np.random.default_rng([seed, 1])
    split_train = _some(whole.train, train, keep)
    split_test = _some(whole.test, test, keep)
    for change in changes:
        split_train = split_train._replace(x=corrupt(split_train.x, change, seed=seed))
        split_test = split_test._replace(x=corrupt(split_test.x, change, seed=seed + 1))
    return Dataset(split_train, split_test, whole.classes)


def _whole(name: str, seed: int, folder: Path | str | None) -> Dataset:
    """Everything there is, split."""
    if name == "digits":
        return _divided(*_digits(), seed)
    if name.startswith("tfds:"):
        from ._tfds import read

        return _dataset(*(_split(*read(name[5:], part)) for part in ("train", "test")))
    if name not in _local.READERS:
        raise ValueError(f"no data set {name!r}; there are {', '.join(names())}")
    where = _folder(folder)
    if where is None or not _local.has(name, where):
        told = f"not in {where}" if where else f"set {VARIABLE} to their folder"
        raise FileNotFoundError(f"the files of {name!r} are missing: {told}")
    parts = _local.READERS[name](where)
    if len(parts) == 1:
        return _divided(*parts[0], seed)
    return _dataset(*(_split(*part) for part in parts))


def _folder(folder: Path | str | None) -> Path | None:
    """The folder of local files, if there is one."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(folder or os.environ.get(VARIABLE) or beside)
    return path if path.is_dir() else None


@ft.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 digits of 8 by 8 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.asarray(digits.images) * (255 / 16), np.asarray(digits.target)  # pyright: ignore


def _split(x: np.ndarray, y: np.ndarray) -> Split:
    """Bytes and integers as float32 in [0, 1] and int32."""
    return Split((x / np.float32(255)).astype(np.float32), y.astype(np.int32))


def _dataset(train: Split, test: Split) -> Dataset:
    return Dataset(train, test, int(max(train.y.max(), test.y.max())) + 1)


def _divided(x: np.ndarray, y: np.ndarray, seed: int) -> Dataset:
    """A data set without a split of its own: a quarter is held out."""
    order = np.random.default_rng(seed).permutation(len(x))
    part: Callable[[np.ndarray], Split] = lambda rows: _split(x[rows], y[rows])
    held = len(x) // 4
    return _dataset(part(order[held:]), part(order[:held]))


def _some(split: Split, count: int | None, draw: np.random.Generator) -> Split:
    """A random subset of at most `count`."""
    order = draw.permutation(len(split.y))
    if count is None or count >= len(split.y):
        return split
    return Split(split.x[order[:count]], split.y[order[:count]])
