"""The numbers that torch's CPU generator draws: projections that files leave out."""

from collections.abc import Callable, Sequence
import functools as ft
import math
from typing import NamedTuple

import numpy as np

Words = Callable[[int], np.ndarray]
Shape = Sequence[int]
LARGEST = (2**32 - 1) // 20


class TorchRandom(NamedTuple):
    """One stream of draws: each continues where the last one ended, as in torch."""

    randperm: Callable[..., np.ndarray]
    """`(n, count=n)`: the first `count` entries of a permutation of n."""
    integers: Callable[[int, int, Shape], np.ndarray]
    """`(low, high, shape)`: `torch.randint`."""
    uniform: Callable[..., np.ndarray]
    """`(shape, low=0, high=1)`: float32, to the bit; rounded, torch's bfloat16."""
    normal: Callable[..., np.ndarray]
    """`(shape, scale=1)`: float32; from 16 numbers on within 3 units in the last
    place, as torch's own last bits depend on the processor."""
    kaiming_uniform: Callable[..., np.ndarray]
    """`(shape [out, in, ...], slope=0)`: `torch.nn.init.kaiming_uniform_(a=slope)`."""


def torch_random(seed: int) -> TorchRandom:
    """`torch.Generator().manual_seed(seed)`: a Mersenne twister of 32-bit words."""
    twister = np.random.MT19937()
    twister._legacy_seeding(seed & 0xFFFFFFFF)
    words = twister.random_raw
    return TorchRandom(
        ft.partial(_randperm, words),
        ft.partial(_integers, words),
        ft.partial(_uniform, words),
        ft.partial(_normal, words, []),
        ft.partial(_kaiming_uniform, words),
    )


def _pairs(words: Words, count: int) -> np.ndarray:
    """Numbers of 64 bits, the high half first."""
    high, low = words(2 * count).reshape(count, 2).T
    return (high << np.uint64(32)) | low


def _fractions(words: Words, count: int) -> np.ndarray:
    """Numbers in [0, 1) of 24 bits."""
    return (words(count) & np.uint64(2**24 - 1)).astype(np.float32) / 2**24


def _randperm(words: Words, n: int, count: int | None = None) -> np.ndarray:
    """Swaps from the front, so that a few entries need not form the others."""
    if n >= LARGEST:
        raise ValueError(f"a permutation of {n} entries, {LARGEST} or more")
    out = np.arange(n if count is None else min(count, n))
    draws = words(min(len(out), max(n - 1, 0)))
    moved: dict[int, int] = {}
    for i in range(len(out)):
        other = i + int(draws[i]) % (n - i) if i < n - 1 else i
        out[i], moved[other] = moved.get(other, other), moved.get(i, i)
    for start in range(len(draws), n - 1, 2**20):
        words(min(2**20, n - 1 - start))
    return out


def _integers(words: Words, low: int, high: int, shape: Shape) -> np.ndarray:
    size = math.prod(shape)
    wide = high - low >= 2**28
    numbers = _pairs(words, size) if wide else words(size)
    return low + (numbers % np.uint64(high - low)).astype(np.int64).reshape(shape)


def _uniform(words: Words, shape: Shape, low: float = 0, high: float = 1) -> np.ndarray:
    """As a fused multiply-add rounds it: once."""
    ends = np.float32(low), np.float32(high)
    width = np.float64(ends[1] - ends[0])
    drawn = _fractions(words, math.prod(shape)) * width + np.float64(ends[0])
    return drawn.astype(np.float32).reshape(shape)


def _normal(
    words: Words, kept: list[float], shape: Shape, scale: float = 1
) -> np.ndarray:
    """Below 16 numbers one by one, and an odd one is kept; from 16 on by sixteens."""
    size = math.prod(shape)
    if size < 16:
        while len(kept) < size:
            kept.extend(_two(_pairs(words, 2)))
        drawn = [kept.pop(0) for _ in range(size)]
        return (np.array(drawn) * scale).astype(np.float32).reshape(shape)
    out = _sixteens(_fractions(words, size)[: size - size % 16])
    if size % 16:
        last = _sixteens(_fractions(words, 16))
        out = np.concatenate([out[: size - 16], last])
    return (out * np.float32(scale)).reshape(shape)


def _kaiming_uniform(words: Words, shape: Shape, slope: float = 0) -> np.ndarray:
    bound = math.sqrt(6 / (1 + slope**2) / math.prod(shape[1:]))
    return _uniform(words, shape, -bound, bound)


def _two(words: np.ndarray) -> list[float]:
    """Two normal numbers of two draws of 64 bits."""
    turn, tail = (words & np.uint64(2**53 - 1)) / 2.0**53
    radius, angle = math.sqrt(-2 * math.log1p(-tail)), 2 * math.pi * turn
    return [radius * math.cos(angle), radius * math.sin(angle)]


def _sixteens(u: np.ndarray) -> np.ndarray:
    """Normal numbers of as many uniform ones, a multiple of 16, in torch's order."""
    tail, turn = u.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = np.sqrt(np.float32(-2) * _rounded(np.log, 1 - tail))
    angle = np.float32(2 * np.pi) * turn
    out = [radius * _rounded(np.cos, angle), radius * _rounded(np.sin, angle)]
    return np.stack(out, 1).reshape(-1)


def _rounded(fn: Callable[..., np.ndarray], x: np.ndarray) -> np.ndarray:
    """A function of float32, rounded once."""
    return fn(x.astype(np.float64)).astype(np.float32)
