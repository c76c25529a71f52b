"""How the tests read: everything, and bit for bit."""

import os
from pathlib import Path

import numpy as np

from jaxlab import io


def read_all(path: Path | str) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, by name."""
    with io.open(path) as checkpoint:
        return {name: t.read() for name, t in checkpoint.tensors.items()}


def same(a, b) -> None:
    """Equal in dtype, shape and every bit, NaN payloads included."""
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def version_of(path: Path) -> str:
    """Which of two versions of {a, b} lies there, whole."""
    if not path.exists() or (path.is_dir() and not os.listdir(path)):
        return "none"
    got = read_all(path)
    assert got.keys() == {"a", "b"}
    assert (got["a"] == got["a"][0]).all()
    assert (got["b"] == got["a"][0] + 10).all()
    return {1.0: "old", 2.0: "new"}[float(got["a"][0])]


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }
