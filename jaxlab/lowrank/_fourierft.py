"""FourierFT: Gao et al., 2024."""

import functools as ft
from typing import Any

from jax import Array
import jax.numpy as jnp
import numpy as np

from ..types import Adapter
from ._rank import plus, wide
from ._torch_random import torch_random


def fourierft(*, frequencies: int, scale: float = 150.0, seed: int = 777) -> Adapter:
    r"""A few coefficients of the update's two-dimensional Fourier spectrum.

    $W' = W + \alpha \, \mathrm{Re}(\mathcal{F}^{-1}(F))$, where F is zero but for n
    trained coefficients c at random places. The update is formed in every call, by one
    fast transform: by its factors, of two columns per coefficient, a row of input costs
    more than by the weight itself from n m / 2 (n + m) coefficients on.

    Args:
      frequencies: n, from 1 to the entries of a weight.
      scale: $\alpha$.
      seed: of the places, which are those that PEFT draws with this
        `random_loc_seed`; the same for all weights of one shape.

    Returns:
      An adapter with state `c [frequencies]`.

    Raises:
      ValueError: frequencies below 1, or (from `init`) more than a weight has entries.

    Degenerate inputs:
      Fresh, c = 0: the layer is unchanged.

    References:
      Gao et al., 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier
      Transform", https://arxiv.org/abs/2405.03003, equations 2 to 4; they draw c
      from a normal distribution, which changes the layer.

    Example:
      >>> import jax
      >>> s = fourierft(frequencies=3).init(jax.random.key(0), jnp.ones((4, 3)))
      >>> s["c"].tolist()
      [0.0, 0.0, 0.0]
    """
    check_count(frequencies)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        check_count(frequencies, w)
        return {"c": jnp.zeros(frequencies, wide(w))}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        places = drawn_places(*w.shape, frequencies, seed)
        spectrum = jnp.zeros(w.shape, s["c"].dtype).at[places].set(s["c"])
        return plus(w, scale * jnp.fft.ifft2(spectrum).real)

    options = (("frequencies", frequencies), ("scale", scale), ("seed", seed))
    return Adapter(init, None, merge, config=("fourierft", *options))


def check_count(frequencies: int, w: Array | None = None) -> None:
    """Raises unless there are from 1 to as many coefficients as the weight has."""
    if frequencies < 1:
        raise ValueError(f"frequencies must be at least 1, got {frequencies}")
    if w is not None and frequencies > w.size:
        raise ValueError(
            f"frequencies={frequencies} is above the entries of a weight "
            f"{list(w.shape)}"
        )


@ft.cache
def drawn_places(n: int, m: int, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Rows and columns of `count` entries of a matrix [n, m]."""
    columns, rows = np.divmod(torch_random(seed).randperm(n * m, count), n)
    return rows, columns
