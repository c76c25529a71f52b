"""Readers of the local files: each gives (images, labels) once, or train and test."""

from collections.abc import Callable
import gzip
from pathlib import Path

import numpy as np

Part = tuple[np.ndarray, np.ndarray]  # bytes [n h w (c)], labels [n]
FILES = {
    "mnist": "mnist/train-images-idx3-ubyte.gz",
    "fashion": "fashion_mnist_part/t10k-first4443-images-idx3-ubyte.gz",
    "signs": "sign_digits/sign_digits_gray28.npz",
    "clothing": "clothing/clothing_gray28.npz",
    "clothing_rgb": "clothing/clothing_rgb32.npz",
    "omniglot": "omniglot/omniglot_small12_28x28.npz",
    "quickdraw": "quickdraw3/cats1000.bin",
}


def has(name: str, folder: Path) -> bool:
    """Is the first file of a data set there?"""
    return (folder / FILES[name]).is_file()


def idx(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped idx file (LeCun's format)."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: no idx file of bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">u4", rank, 4)
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * rank)
    if body.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path}: {body.size} bytes, its header says {shape.tolist()}")
    return body.reshape(shape)


def mnist(folder: Path) -> list[Part]:
    """60,000 and 10,000 handwritten digits (LeCun et al., 1998)."""
    at = folder / "mnist"
    read = lambda part: (
        idx(at / f"{part}-images-idx3-ubyte.gz"),
        idx(at / f"{part}-labels-idx1-ubyte.gz"),
    )
    return [read("train"), read("t10k")]


def fashion(folder: Path) -> list[Part]:
    """The first 4,443 test images of Fashion-MNIST (Xiao et al., 2017)."""
    stem = str(folder / "fashion_mnist_part" / "t10k-first4443-")
    images, labels = "images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"
    return [(idx(Path(stem + images)), idx(Path(stem + labels)))]


def signs(folder: Path) -> list[Part]:
    """2,062 photographs of hand signs of the digits (ardamavi, 2017)."""
    with np.load(folder / FILES["signs"]) as file:
        return [(file["images"], file["labels"])]


def _clothing(pixels: str, name: str) -> Callable[[Path], list[Part]]:
    def read(folder: Path) -> list[Part]:
        """Photographs of ten kinds of clothes (Grigorev, 2020); validation trains."""
        with np.load(folder / FILES[name]) as file:
            part = lambda s: (file[f"{s}_{pixels}"], file[f"{s}_labels"])
            train, more, test = map(part, ("train", "validation", "test"))
        joined = [np.concatenate(pair) for pair in zip(train, more, strict=True)]
        return [(joined[0], joined[1]), test]

    return read


def omniglot(folder: Path) -> list[Part]:
    """4,840 handwritten characters, labelled by alphabet (Lake et al., 2015)."""
    with np.load(folder / FILES["omniglot"]) as file:
        return [(file["images"], file["alphabet"])]


def quickdraw(folder: Path) -> list[Part]:
    """3,000 drawings of cats, rainbows and trains (Google, 2017)."""
    read = lambda kind: np.fromfile(
        folder / "quickdraw3" / f"{kind}1000.bin", np.uint8
    ).reshape(-1, 28, 28)
    images = [read(kind) for kind in ("cats", "rainbows", "trains")]
    labels = np.repeat(np.arange(3), [len(x) for x in images])
    return [(np.concatenate(images), labels)]


READERS: dict[str, Callable[[Path], list[Part]]] = {
    "mnist": mnist,
    "fashion": fashion,
    "signs": signs,
    "clothing": _clothing("gray28", "clothing"),
    "clothing_rgb": _clothing("rgb32", "clothing_rgb"),
    "omniglot": omniglot,
    "quickdraw": quickdraw,
}
