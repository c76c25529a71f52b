"""Increasing positions as a Golomb-Rice code, in whole arrays at a time.

A gap g, the number of places passed over, is `g >> b` in unary and its b low bits. The
unary parts of all gaps come first, then one plane for each low bit: as long as the code
with the parts of each gap together, and each part is one vectorised operation.
"""

import math

import numpy as np

WIDEST = 60  # the most low bits of a gap: no sum of one overflows


class Broken(ValueError):
    """What is no code; `at` is the byte where that shows."""

    def __init__(self, why: str, at: int) -> None:
        super().__init__(why)
        self.at = at


def encode(positions: np.ndarray) -> tuple[int, int, list[np.ndarray]]:
    """Increasing positions as (low bits b, unary bits, the planes as bytes)."""
    if not positions.size:
        return 0, 0, []
    gaps = np.diff(positions, prepend=-1) - 1
    b = _best(gaps)
    ends = np.cumsum((gaps >> b) + 1)
    unary = np.zeros(int(ends[-1]), np.bool_)
    unary[ends - 1] = True
    low = (((gaps >> i) & 1).astype(np.bool_) for i in range(b))
    return b, unary.size, [bits(plane) for plane in (unary, *low)]


def decode(data: np.ndarray, count: int, b: int, unary: int, size: int) -> np.ndarray:
    """The `count` positions below `size` whose planes are `data`."""
    if not count:
        return np.zeros(0, np.int64)
    width = -(-unary // 8)
    ends = np.flatnonzero(unbits(data[:width], unary, 0))
    if ends.size != count or ends[-1] != unary - 1:
        raise Broken(f"{ends.size} gaps, {count} were announced", 0)
    high = np.diff(ends, prepend=-1) - 1
    if high.max() > size >> b:
        raise Broken(f"a gap beyond the {size} entries", 0)
    gaps = high << b
    for i in range(b):
        at = width + i * -(-count // 8)
        plane = unbits(data[at : at + -(-count // 8)], count, at)
        gaps |= plane.astype(np.int64) << i
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= size or (np.diff(positions, prepend=-1) <= 0).any():
        raise Broken(f"a position beyond the {size} entries", 0)
    return positions


def length(count: int, b: int, unary: int) -> int:
    """The bytes of the planes of so many positions."""
    return -(-unary // 8) + b * -(-count // 8)


def bits(plane: np.ndarray) -> np.ndarray:
    """Booleans as bytes, lowest bit first."""
    return np.packbits(plane, bitorder="little")


def unbits(data: np.ndarray, count: int, at: int) -> np.ndarray:
    """So many booleans; the bits after them must be 0."""
    if count % 8 and data[-1] >> (count % 8):
        raise Broken("a bit after the last is set", at + len(data) - 1)
    return np.unpackbits(data, count=count, bitorder="little").view(np.bool_)


def _best(gaps: np.ndarray) -> int:
    """The number of low bits with the shortest code."""
    mean = float(gaps.mean()) * math.log(2)
    near = max(0, math.frexp(mean)[1] - 1)
    tried = range(max(0, near - 1), near + 2)
    return min(tried, key=lambda b: int((gaps >> b).sum()) + b * gaps.size)
