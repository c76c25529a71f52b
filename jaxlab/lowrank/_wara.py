"""WaRA: Heidari et al., 2025."""

from collections.abc import Iterator
import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from . import _wavelets
from ._operands import dense, like
from ._rank import check_rank, plus, wide

Bands = list[dict[str, Array]]


def wavelet_bands(w: Array, *, wavelet: str = "haar", levels: int = 1) -> Bands:
    r"""The coefficients of a matrix in a two-dimensional wavelet basis.

    $\{C_k\} = \mathcal{W}(W)$: at each level the rows, then the columns, of the low
    band so far are split into low and high halves. Signals are periodic; one of odd
    length repeats its last value first.

    Args:
      w: the matrix `[n, m]`.
      wavelet: "haar", "db1" to "db10", "biorR.D" (R of 1 to 3), or "bior4.4".
      levels: L, at least 1.

    Returns:
      For each level, the finest first, the bands "lh", "hl" and "hh" (low or high
      along n, then along m), `[ceil(n / 2), ceil(m / 2)]` of the level before; the
      last level also has "ll".

    Raises:
      ValueError: an unknown wavelet, or levels below 1.

    References:
      Mallat, 1989, "A Theory for Multiresolution Signal Decomposition". Cohen,
      Daubechies and Feauveau, 1992, "Biorthogonal Bases of Compactly Supported
      Wavelets".

    Example:
      >>> bands = wavelet_bands(jnp.ones((4, 2)), levels=2)
      >>> [{name: c.shape for name, c in level.items()} for level in bands][1]
      {'lh': (1, 1), 'hl': (1, 1), 'hh': (1, 1), 'll': (1, 1)}
    """
    _check(wavelet, levels)
    out: Bands = []
    for _ in range(levels):
        rows = _wavelets.analyse(w, wavelet)
        split = [_wavelets.analyse(c.T, wavelet) for c in rows]
        (ll, lh), (hl, hh) = [(low.T, high.T) for low, high in split]
        out.append({"lh": lh, "hl": hl, "hh": hh})
        w = ll
    out[-1]["ll"] = w
    return out


def from_wavelet_bands(
    bands: Bands, *, shape: tuple[int, int], wavelet: str = "haar"
) -> Array:
    r"""The matrix of its wavelet coefficients: $\mathcal{W}^{-1}$, exactly.

    Args:
      bands: what `wavelet_bands` gave.
      shape: [n, m] of the matrix.
      wavelet: the same as there.

    Returns:
      The matrix `[n, m]`.

    Raises:
      ValueError: an unknown wavelet.

    Example:
      >>> w = jnp.arange(15.0).reshape(3, 5)
      >>> bands = wavelet_bands(w, levels=2)
      >>> bool(jnp.allclose(from_wavelet_bands(bands, shape=(3, 5)), w, atol=1e-5))
      True
    """
    _check(wavelet, len(bands))
    sizes = [shape]
    for _ in bands[1:]:
        n, m = sizes[-1]
        sizes.append((_wavelets.halves(n), _wavelets.halves(m)))
    w = bands[-1]["ll"]
    for level, (n, m) in zip(reversed(bands), reversed(sizes), strict=True):
        up = lambda low, high, m=m: _wavelets.synthesise(low.T, high.T, wavelet, m).T
        low, high = up(w, level["lh"]), up(level["hl"], level["hh"])
        w = _wavelets.synthesise(low, high, wavelet, n)
    return w


def wara(
    *,
    rank: int,
    wavelet: str = "haar",
    levels: int = 1,
    alpha: float | None = None,
    shared: bool = False,
) -> Adapter:
    r"""Low-rank updates of a weight's wavelet coefficients.

    $W' = W + \frac{\alpha}{r} \mathcal{W}^{-1}(\{A_k B_k\})$ over the bands k of a
    two-dimensional wavelet transform, its inverse exact for any shape. Because the
    transform is linear along n and m apart, $x \, \Delta W$ costs as a LoRA of rank
    $(3 L + 1) r$, and no update is formed.

    Args:
      rank: r, from 1 to the sides of the coarsest band.
      wavelet: "haar", "db1" to "db10", "biorR.D" (R of 1 to 3), or "bior4.4".
      levels: L, at least 1.
      alpha: the scale's numerator; `rank` by default, a scale of 1.
      shared: one pair per level, from each band of the inputs to the same band of the
        outputs, in place of a pair for every band of the update.

    Returns:
      An adapter with, for each band such as `0_lh`, states `a_0_lh [n_0, r]` and
      `b_0_lh [r, m_0]`; with `shared`, `a_0` and `b_0`.

    Raises:
      ValueError: an unknown wavelet, levels or a rank below 1, or (from `init`) a rank
        above the coarsest band.

    Degenerate inputs:
      Fresh, B = 0: the layer is unchanged.

    References:
      Heidari et al., 2025, "WaRA: Wavelet Low Rank Adaptation",
      https://arxiv.org/abs/2506.24092. The update of the first version, in the
      wavelet domain of the weight; `shared` is its figure, the transform of the
      layer's features with one pair for all bands, which is a weight too; features go
      through the adjoint of the synthesis, which is the transform itself where the
      wavelet is orthonormal and the side even. Boundaries are periodic.

    Example:
      >>> adapter = wara(rank=1, wavelet="db2")
      >>> s = adapter.init(jax.random.key(0), jnp.ones((8, 6)))
      >>> s["a_0_ll"].shape, s["b_0_ll"].shape
      ((4, 1), (1, 3))
    """
    check_rank(rank)
    _check(wavelet, levels)
    scale = 1.0 if alpha is None else alpha / rank

    def init(key: Array, w: Array) -> dict[str, Any]:
        (n, m), dtype = w.shape, wide(w)
        out = {}
        for number, (name, level, _, _) in enumerate(_names(levels, shared)):
            rows, columns = _side(n, level), _side(m, level)
            if rank > min(rows, columns):
                raise ValueError(
                    f"rank {rank} is above the band [{rows}, {columns}] of a weight "
                    f"[{n}, {m}] at level {level + 1}"
                )
            own, limit = jax.random.fold_in(key, number), 1 / math.sqrt(rows)
            shape = (rows, rank)
            drawn = jax.random.uniform(own, shape, dtype, -limit, limit)
            out.setdefault(f"a_{name}", drawn)
            out.setdefault(f"b_{name}", jnp.zeros((rank, columns), dtype))
        return out

    def factors(w: Array, s: dict[str, Any]) -> tuple[Array, Array]:
        """The update as `[n, R] @ [R, m]`."""
        n, m = w.shape
        left, right = [], []
        for name, level, row, column in _names(levels, shared):
            left.append(_lifted(s[f"a_{name}"], n, level, row, wavelet))
            right.append(_lifted(s[f"b_{name}"].T, m, level, column, wavelet))
        return jnp.concatenate(left, 1), scale * jnp.concatenate(right, 1).T

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        a, b = factors(dense(w), s)
        return plus(x @ w, (x @ like(a, x)) @ like(b, x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        a, b = factors(w, s)
        return plus(w, a @ b)

    options = (("rank", rank), ("wavelet", wavelet), ("levels", levels))
    options += (("scale", scale), ("shared", shared))
    return Adapter(init, apply, merge, config=("wara", *options))


def _check(wavelet: str, levels: int) -> None:
    _wavelets.bank(wavelet)
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")


def _names(levels: int, shared: bool) -> Iterator[tuple[str, int, bool, bool]]:
    """Each pair of factors: its name and level, high or low along n and along m."""
    for level in range(levels):
        for band in ("lh", "hl", "hh", "ll")[: 4 if level == levels - 1 else 3]:
            if not shared:
                yield f"{level}_{band}", level, band[0] == "h", band[1] == "h"
            elif band[0] == band[1]:
                yield f"{level}", level, band[0] == "h", band[1] == "h"


def _side(size: int, level: int) -> int:
    """The coefficients that a side of a matrix has at a level."""
    for _ in range(level + 1):
        size = _wavelets.halves(size)
    return size


def _lifted(c: Array, size: int, level: int, high: bool, wavelet: str) -> Array:
    """What one band's coefficients `[side, r]` are along a side, `[size, r]`."""
    low_pass, high_pass = _wavelets.bank(wavelet).up
    for at in reversed(range(level + 1)):
        passed = high_pass if high and at == level else low_pass
        length = size if at == 0 else _side(size, at - 1)
        c = _wavelets.raised(c, passed)[:length]
    return c
