"""WaveFT: Bilican et al., 2025."""

import functools as ft
import math
import re
from typing import Any

from jax import Array
import jax.numpy as jnp
import numpy as np

from ..types import Adapter
from ._fourierft import check_count, drawn_places
from ._rank import plus, wide

# Which roots, by size, a symlet takes outside the circle: bits of a number.
_OUTSIDE = {2: 0, 3: 0, 4: 2, 5: 1, 6: 5, 7: 1, 8: 10, 9: 6, 10: 21}


def waveft(
    *,
    frequencies: int,
    scale: float = 25.0,
    wavelet: str | None = "db1",
    seed: int = 777,
) -> Adapter:
    r"""A few coefficients of the update in a wavelet basis.

    $W' = W + \lambda \, \mathrm{IDWT}(C)$, where C is zero but for p trained
    coefficients at random places, and the transform is one level in two dimensions:
    each axis of C is a low and a high half. The update is formed in every call.

    Args:
      frequencies: p, from 1 to the entries of a weight.
      scale: $\lambda$.
      wavelet: "db1" (Haar) to "db10", "sym2" to "sym10"; None for no transform, a
        sparse update.
      seed: of the places, which are those that PEFT draws with this
        `random_loc_seed`; the same for all weights of one shape.

    Returns:
      An adapter with state `c [frequencies]`.

    Raises:
      ValueError: an unknown wavelet, frequencies below 1, or (from `init`) more than a
        weight has entries.

    Degenerate inputs:
      Fresh, c = 0: the layer is unchanged. For filters of L > 2 taps C is larger than
      the weight by L - 2 on each axis, the coefficients in its middle, so that no
      boundary is assumed; a side that is then odd has one more.

    References:
      Bilican et al., 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning
      Using Wavelets", https://arxiv.org/abs/2505.12532, equations 3 to 5. As in PEFT,
      a coefficient low along one axis and high along the other is synthesised with
      these filters exchanged.

    Example:
      >>> import jax
      >>> s = waveft(frequencies=3).init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["c"].tolist()
      [0.0, 0.0, 0.0]
    """
    check_count(frequencies)
    taps = None if wavelet is None else synthesis_filters(wavelet)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        check_count(frequencies, w)
        return {"c": jnp.zeros(frequencies, wide(w))}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        rows, columns = drawn_places(*w.shape, frequencies, seed)
        if taps is None:
            update = jnp.zeros(w.shape, s["c"].dtype).at[rows, columns].set(s["c"])
            return plus(w, scale * update)
        more = len(taps[0]) - 2
        sides = [size + more + (size + more) % 2 for size in w.shape]
        top, left = ((a - b) // 2 for a, b in zip(sides, w.shape, strict=True))
        c = jnp.zeros(sides, s["c"].dtype).at[rows + top, columns + left].set(s["c"])
        return plus(w, scale * _image(c, taps, w.shape))

    options = (("frequencies", frequencies), ("scale", scale))
    rest = (("wavelet", wavelet), ("seed", seed))
    return Adapter(init, None, merge, config=("waveft", *options, *rest))


def _image(
    c: Array, taps: tuple[np.ndarray, np.ndarray], shape: tuple[int, ...]
) -> Array:
    """The matrix [n, m] of its coefficients; the halves of an axis filter the other."""
    (n, m), (half, across) = shape, (side // 2 for side in c.shape)
    first, second = (
        _raised(c[rows, :across], c[rows, across:], taps, n)
        for rows in (slice(half), slice(half, None))
    )
    return _raised(first.T, second.T, taps, m).T


def _raised(
    low: Array, high: Array, taps: tuple[np.ndarray, np.ndarray], size: int
) -> Array:
    """One level of synthesis along the first axis, cut to `size`."""
    count = len(taps[0]) // 2
    phases = []
    for phase in (0, 1):
        total: Any = 0
        for c, filt in zip((low, high), taps, strict=True):
            for k, tap in enumerate(filt[phase::2]):
                ends = [(k, count - 1 - k)] + [(0, 0)] * (c.ndim - 1)
                total = total + float(tap) * jnp.pad(c, ends)
        phases.append(total)
    out = jnp.stack(phases, 1).reshape(-1, *low.shape[1:])
    start = 2 * count - 2
    return out[start : start + size]


@ft.cache
def synthesis_filters(wavelet: str) -> tuple[np.ndarray, np.ndarray]:
    r"""Low and high filters of "dbN" and "symN" by spectral factorisation.

    $|h|^2$ is $2 |(1 + z) / 2|^{2 N} \sum_{k<N} \binom{N-1+k}{k} y^k$ with
    $y = (2 - z - z^{-1}) / 4$: dbN takes its roots within the unit circle, symN those
    of the most symmetric filter.
    """
    found = re.fullmatch(r"(db|sym)(\d+)", wavelet)
    order = int(found[2]) if found else 0
    if found is None or not (1 if found[1] == "db" else 2) <= order <= 10:
        raise ValueError(f"wavelet {wavelet!r} is none of db1 to db10, sym2 to sym10")
    outside = _OUTSIDE[order] if found[1] == "sym" else 0
    roots = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    upper = [y for y in roots if y.imag >= 0]
    inside = []
    for middle in (1 - 2 * y for y in upper):
        root = middle + np.sqrt(middle**2 - 1 + 0j)
        inside.append(root if abs(root) < 1 else 1 / root)
    low = np.ones(1)
    for _ in range(order):
        low = np.convolve(low, [1, 1])
    inside.sort(key=lambda z: (abs(z.imag) > 1e-6, abs(z)))
    for i, root in enumerate(inside):
        root = 1 / root if outside >> i & 1 else root
        low = np.convolve(low, [1, -root])
        if abs(root.imag) > 1e-6:
            low = np.convolve(low, [1, -root.conjugate()])
    low = low.real * math.sqrt(2) / low.real.sum()
    return low, low[::-1] * (-1.0) ** np.arange(len(low))
