"""The exact k-th largest of values that arrive in blocks, by counting passes.

A search holds an interval of bit patterns that surely (or, after a sample, probably)
contains the answer. Each pass counts what lies above the interval and keeps what lies
inside; where that is too much to keep, it counts 4,096 equal parts of the interval and
the next pass searches one of them. The answer is always verified by the counts, so a
poor guess costs passes and never changes a bit.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

PARTS = 12  # bits of the interval that one counting pass resolves


@dataclass
class Search:
    """The search for one k-th largest value; `feed` every block, then `turn`."""

    rank: int
    dtype: np.dtype
    room: int  # how many values may be kept
    low: int = 0
    high: int = field(init=False)
    above: int = 0  # entries above the interval, as counted in this pass
    kept: list[np.ndarray] = field(default_factory=list)
    inside: int = 0
    parts: np.ndarray | None = None  # counts of equal parts, where keeping is too much
    answer: Any = None

    def __post_init__(self) -> None:
        self.dtype = np.dtype(self.dtype)
        self.high = self._largest()
        if self.rank <= 0:
            self.answer = self.dtype.type(np.inf)

    def guess(self, sample: np.ndarray, total: int) -> None:
        """Narrows the interval to where a sample puts the answer, six sigma wide."""
        if self.answer is not None:
            return
        bits = np.sort(self._bits(sample))
        n = bits.size
        share = min(self.rank / total, 1.0)
        slack = 6 * np.sqrt(n * share * (1 - share)) + 6
        place = n - share * n
        top, bottom = int(place + slack), int(place - slack)
        self.high = int(bits[top]) if top < n else self._largest()
        self.low = int(bits[bottom]) if bottom >= 0 else 0

    def feed(self, values: np.ndarray) -> None:
        """Counts one block."""
        if self.answer is not None:
            return
        bits = self._bits(values)
        word = bits.dtype.type
        everything = self.low == 0 and self.high == self._largest()
        if not everything:
            self.above += int(np.count_nonzero(bits > word(self.high)))
            bits = bits[(bits >= word(self.low)) & (bits <= word(self.high))]
        self.inside += bits.size
        if self.parts is not None:
            part = (bits - word(self.low)) >> word(self._shift())
            self.parts += np.bincount(part.astype(np.intp), minlength=self.parts.size)
        elif self.low < self.high and self.inside <= self.room:
            self.kept.append(bits)
        else:
            self.kept.clear()

    def turn(self) -> None:
        """Ends a pass: settles the answer, or chooses the next interval."""
        if self.answer is not None:
            return
        rank = self.rank - self.above  # within the interval, from its top
        if rank <= 0:
            self._next(self.high + 1, self._largest())
        elif rank > self.inside:
            if self.low == 0:
                self.answer = self.dtype.type(0)  # beyond the size: all is selected
            else:
                self._next(0, self.low - 1)
        elif self.low == self.high:
            self.answer = self._value(self.low)
        elif self.parts is not None:
            reach = np.cumsum(self.parts[::-1])
            part = self.parts.size - 1 - int(np.searchsorted(reach, rank))
            low = self.low + (part << self._shift())
            high = min(low + (1 << self._shift()) - 1, self.high)
            self._next(low, high)
        elif self.inside > self.room:
            self._next(self.low, self.high)
            span = self.high - self.low
            self.parts = np.zeros((span >> self._shift()) + 1, np.int64)
        else:
            bits = np.concatenate(self.kept)
            place = bits.size - rank
            bits.partition(place)
            self.answer = self._value(int(bits[place]))
            self.kept.clear()

    def _next(self, low: int, high: int) -> None:
        self.low, self.high, self.above, self.inside = low, high, 0, 0
        self.kept, self.parts = [], None

    def _bits(self, values: np.ndarray) -> np.ndarray:
        """Nonnegative floats as integers, which are in the same order."""
        return values.reshape(-1).view(f"i{self.dtype.itemsize}")

    def _value(self, bits: int) -> Any:
        return np.array(bits, f"i{self.dtype.itemsize}").view(self.dtype)[()]

    def _largest(self) -> int:
        return int(np.iinfo(f"i{self.dtype.itemsize}").max)

    def _shift(self) -> int:
        return max((self.high - self.low).bit_length() - PARTS, 0)
