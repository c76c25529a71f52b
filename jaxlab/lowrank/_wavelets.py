"""Two-channel filter banks with perfect reconstruction, on signals of any length."""

import functools as ft
import math
import re
from typing import NamedTuple

from jax import Array
import jax.numpy as jnp
import numpy as np


class Filter(NamedTuple):
    """The taps of $h[k]$ from `start` on."""

    start: int
    taps: np.ndarray


class Bank(NamedTuple):
    """Filters of analysis (low, high), then of synthesis (low, high)."""

    down: tuple[Filter, Filter]
    up: tuple[Filter, Filter]


@ft.cache
def bank(wavelet: str) -> Bank:
    r"""The filters of "haar", "db1" to "db10", "biorR.D" with R in 1, 2, 3, "bior4.4".

    Daubechies' are the minimum-phase square roots, Cohen-Daubechies-Feauveau's the
    splines, of the half-band polynomial $P(y) = \sum_{k<K} \binom{K-1+k}{k} y^k$.
    """
    name = "db1" if wavelet == "haar" else wavelet
    if found := re.fullmatch(r"db(\d+)", name):
        order = int(found[1])
        if 1 <= order <= 10:
            low = Filter(0, _daubechies(order))
            return _completed(low, low)
    elif found := re.fullmatch(r"bior([1-3])\.(\d+)|bior4\.4", name):
        up, down = (4, 4) if found[1] is None else (int(found[1]), int(found[2]))
        if down >= 1 and (up + down) % 2 == 0 and down <= 9:
            return _completed(*_biorthogonal(up, down))
    raise ValueError(
        f"wavelet {wavelet!r} is none of haar, db1 to db10, bior1.1 to bior3.9, bior4.4"
    )


def halves(size: int) -> int:
    """How many coefficients each channel has."""
    return -(-size // 2)


def analyse(x: Array, wavelet: str) -> tuple[Array, Array]:
    """The low and high coefficients of `x [size, ...]`, each `[ceil(size / 2), ...]`.

    The signal is periodic; one of odd length repeats its last value first.
    """
    if x.shape[0] % 2:
        x = jnp.concatenate([x, x[-1:]])

    low, high = bank(wavelet).down
    return _lowered(x, low), _lowered(x, high)


def synthesise(low: Array, high: Array, wavelet: str, size: int) -> Array:
    """The signal `[size, ...]` of its coefficients: the inverse of `analyse`."""
    a, b = bank(wavelet).up
    return (raised(low, a) + raised(high, b))[:size]


def raised(c: Array, f: Filter) -> Array:
    """One channel of coefficients `[half, ...]` as a signal `[2 half, ...]`."""
    half, at = c.shape[0], f.start + np.arange(len(f.taps))
    phases = []
    for phase in (0, 1):
        mine = at % 2 == phase
        places = np.arange(half)[:, None] - at[mine][None] // 2
        phases.append(_weighted(c, places % half, f.taps[mine]))
    return jnp.stack(phases, 1).reshape(2 * half, *c.shape[1:])


def _lowered(x: Array, f: Filter) -> Array:
    """One channel of a signal `[2 half, ...]`, `[half, ...]`."""
    places = np.arange(0, x.shape[0], 2)[:, None] + f.start + np.arange(len(f.taps))
    return _weighted(x, places % x.shape[0], f.taps)


def _weighted(x: Array, places: np.ndarray, taps: np.ndarray) -> Array:
    """Sums of entries along the first axis: `[rows, taps]` places."""
    return jnp.tensordot(jnp.asarray(taps, x.dtype), x[places], ([0], [1]))


def _completed(down: Filter, up: Filter) -> Bank:
    """The bank of two low filters, each high one the other's mirror."""
    return Bank((down, _mirror(up)), (up, _mirror(down)))


def _mirror(f: Filter) -> Filter:
    """$g[k] = (-1)^k h[1 - k]$."""
    start = 2 - f.start - len(f.taps)
    signs = (-1.0) ** (np.arange(len(f.taps)) + start)
    return Filter(start, signs * f.taps[::-1])


def _daubechies(order: int) -> np.ndarray:
    taps = _binomial(order)
    for y in np.roots(_half_band(order)):
        middle = 1 - 2 * y
        root = middle + np.sqrt(middle**2 - 1 + 0j)
        inside = root if abs(root) < 1 else 1 / root
        taps = np.convolve(taps, [1, -inside])
    taps = np.real(taps)
    return taps * math.sqrt(2) / taps.sum()


def _biorthogonal(up: int, down: int) -> tuple[Filter, Filter]:
    """Low filters of analysis and synthesis with `down` and `up` vanishing moments."""
    half_band = _half_band((up + down) // 2)
    synthesis = np.ones(1)
    if up == 4:  # the 9/7 pair: the real root goes to the shorter filter
        roots = np.roots(half_band)
        real = np.real(roots[np.argmin(np.abs(np.imag(roots)))])
        synthesis = np.array([-1 / real, 1])
        half_band = np.real(np.polydiv(half_band, synthesis)[0])
    return _symmetric(down, half_band), _symmetric(up, synthesis)


def _symmetric(order: int, polynomial: np.ndarray) -> Filter:
    r"""$\sqrt2 ((1 + z) / 2)^{order}$ times a polynomial in y, centred."""
    y = np.array([-0.25, 0.5, -0.25])
    factor = np.zeros(1)
    for c in polynomial:
        factor = np.convolve(factor, y)
        factor[len(factor) // 2] += c
    taps = np.trim_zeros(np.convolve(_binomial(order), factor))
    return Filter(-((len(taps) - 1) // 2), math.sqrt(2) * taps / taps.sum())


def _half_band(count: int) -> np.ndarray:
    """P, its highest power first."""
    return np.array(
        [math.comb(count - 1 + k, k) for k in reversed(range(count))], float
    )


def _binomial(order: int) -> np.ndarray:
    return np.array([math.comb(order, k) for k in range(order + 1)], float)
