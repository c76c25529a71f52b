"""How small a ComPEFT file is, and how small it could be."""

import math
from pathlib import Path
from typing import NamedTuple

from ._compeft import read_records
from ._files import reader


class Compression(NamedTuple):
    """Sizes of a compressed checkpoint, in bytes.

    Attributes:
      entries: how many numbers it holds.
      nonzero: how many of them are not 0.
      stored: the size of the file.
      entropy: what the paper's count of the entropy allows, rounded up.
      float16: the size of the same numbers as 16-bit floats.
      ratio: float16 over stored.
    """

    entries: int
    nonzero: int
    stored: int
    entropy: int
    float16: int
    ratio: float


def compression(path: Path | str) -> Compression:
    r"""The sizes of a `.compeft` file: stored, by entropy, and uncompressed.

    A tensor of $n$ entries of which the fraction $d$ is not 0, its signs alike, has the
    entropy $-n\,[(1-d)\log_2(1-d) + d\log_2(d/2)]$ bits; its magnitude takes 16 more.

    Args:
      path: a file that `save` wrote; only its heads are read.

    Returns:
      `(entries, nonzero, stored, entropy, float16, ratio)`.

    Raises:
      FormatError: the file is no ComPEFT file; names the tensor and the byte.
      OSError: it cannot be read.

    References:
      Yadav et al., 2023, "ComPEFT", https://arxiv.org/abs/2311.13171, Section 2.2.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from jaxlab import io
      >>> file = tempfile.mkdtemp() + "/a.compeft"
      >>> io.save(file, {"w": np.zeros((1000, 1000), np.float16)})
      >>> compression(file).stored, compression(file).float16
      (144, 2000000)
    """
    read_at, size, shut = reader(Path(path))
    try:
        records, _ = read_records(Path(path), read_at, size)
    finally:
        shut()
    pairs = [(r.entries, r.nonzero) for r in records.values()]
    entropy = math.ceil(sum(_bits(*pair) for pair in pairs) / 8)
    entries, nonzero = (sum(p[i] for p in pairs) for i in (0, 1))
    return Compression(entries, nonzero, size, entropy, 2 * entries, 2 * entries / size)


def _bits(entries: int, nonzero: int) -> float:
    """The entropy of one tensor and its magnitude."""
    part = lambda m, ways: m * math.log2(ways * entries / m) if m else 0.0
    return part(entries - nonzero, 1) + part(nonzero, 2) + 16
