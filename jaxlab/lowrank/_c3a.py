"""C3A: Chen et al., 2024."""

import math
from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._direct import check_divides, direct, parts
from ._operands import like, rows
from ._rank import plus, wide

Start = Literal["zeros", "gaussian", "xavier_uniform", "kaiming_uniform"]


def c3a(*, block: int, start: Start = "zeros") -> Adapter:
    r"""An update of circulant blocks, applied by FFT: $y = x W + x C$.

    $(x C)_i = \frac1n \sum_j \mathcal F^{-1}\big(\mathcal F(x_j) \odot
    \overline{\mathcal F(w_{ij})}\big)$ over blocks of b: the block of C from j to i is
    the circulant matrix whose entry $(p, t)$ is $w_{ij}[(p - t) \bmod b] / n$. That is
    n m / b numbers, of any rank, in O(n m / b + (n + m) log b) operations per row.

    Args:
      block: b, a divisor of n and m.
      start: how the kernels are drawn; all but "zeros" change the layer at once.

    Returns:
      An adapter with state `kernel [m / b, n / b, b]`.

    Raises:
      ValueError: an unknown start; (from `init`) sides that are no multiples of b.

    Degenerate inputs:
      Zero kernels: the layer is unchanged.

    References:
      Chen et al., 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution",
      https://arxiv.org/abs/2407.19342. The correlation and the 1 / n are those of the
      authors' implementation in PEFT, whose default start is "xavier_uniform".

    Example:
      >>> s = {"kernel": jnp.array([[[0.0, 2.0]]])}
      >>> c3a(block=2).merge(jnp.zeros((2, 2)), s).tolist()
      [[0.0, 1.0], [1.0, 0.0]]
    """
    if start not in ("zeros", "gaussian", "xavier_uniform", "kaiming_uniform"):
        raise ValueError(f"start {start!r} is unknown")

    def init(key: Array, w: Array) -> dict[str, Any]:
        check_divides(block, w, "block")
        (n, m), dtype = w.shape, wide(w)
        shape = (m // block, n // block, block)
        if start == "zeros":
            return {"kernel": jnp.zeros(shape, dtype)}
        if start == "gaussian":
            return {"kernel": jax.random.normal(key, shape, dtype)}
        limit = math.sqrt(6 / (n + m) if start == "xavier_uniform" else 1 / n)
        return {"kernel": jax.random.uniform(key, shape, dtype, -limit, limit)}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        kernel = s["kernel"]
        if not direct(x):
            return plus(x @ w, x @ like(_circulants(kernel), x))
        blocks = parts(rows(x).astype(wide(rows(x), kernel)), kernel.shape[1])
        waves = jnp.conj(jnp.fft.rfft(kernel))
        y = jnp.einsum("...jf,ijf->...if", jnp.fft.rfft(blocks), waves)
        y = jnp.fft.irfft(y, block).reshape(*blocks.shape[:-2], -1)
        return plus(x @ w, y / (kernel.shape[1] * block))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return plus(w, _circulants(s["kernel"]))

    return Adapter(
        init, apply, merge, config=("c3a", ("block", block), ("start", start))
    )


def _circulants(kernel: Array) -> Array:
    """The update `[n, m]` of kernels `[m / b, n / b, b]`."""
    i, j, b = kernel.shape
    shift = (jnp.arange(b)[:, None] - jnp.arange(b)[None]) % b
    return kernel[:, :, shift].transpose(1, 2, 0, 3).reshape(j * b, i * b) / (j * b)
