"""How the tests read: everything, and bit for bit."""

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
