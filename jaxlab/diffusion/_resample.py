"""Resampling: which particles have how many offspring."""

from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp

from ._predictions import wide

Scheme = Literal["systematic", "stratified", "multinomial", "jump"]
SCHEMES = ("systematic", "stratified", "multinomial", "jump")


def resample(log_weights: Array, *, key: Array, scheme: Scheme = "systematic") -> Array:
    r"""The ancestors of the next population: particle i is expected $n w_i$ times.

    All but "jump" look up n points of [0, 1) in the running sums of the weights: $(j +
    u) / n$ with one u ("systematic"), $(j + u_j) / n$ ("stratified"), or n independent
    ones ("multinomial"). "jump": particle j stays with probability $\min(1, n w_j)$,
    and otherwise jumps to i with probability $\propto (n w_i - 1)^+$.

    Args:
      log_weights: `[n]`, up to a constant; may be traced.
      key: of the draw.
      scheme: "systematic", "stratified", "multinomial" or "jump".

    Returns:
      `[n]`, int32: take particles as `x[indices]`, and weigh them alike. In order, but
      for "multinomial"; in their own places but for those that jumped, with "jump".

    Raises:
      ValueError: an unknown scheme; log-weights that are not `[n]`, n at least 1.

    Degenerate inputs:
      A log-weight that is not a number, or is +inf, counts as -inf: no offspring. Where
      all are -inf, every particle stays in its place. The weights are summed as
      fixed-point numbers, without error, so that no index is out of range and no
      particle of weight 0 is taken, for n up to 2^24; less than 2^-32 offspring counts
      as none.

    References:
      Douc, Cappe and Moulines, 2005, "Comparison of Resampling Schemes for Particle
      Filtering", https://arxiv.org/abs/cs/0507025, Section 2; "jump" in continuous time
      is that of Skreta et al., 2025, "Feynman-Kac Correctors in Diffusion",
      https://arxiv.org/abs/2503.02819: at rate $(g - \bar g)^-$, to $(g - \bar g)^+$,
      which this one tends to for weights $1 + g\, dt$. Its expectations are exact for
      weights of any size. The published code keeps clocks, and what was born since each
      one's last ring; here a clock is without memory.

    Example:
      >>> log_weights = jnp.log(jnp.array([0.0, 0.5, 0.0, 0.5]))
      >>> resample(log_weights, key=jax.random.key(0))
      Array([1, 1, 3, 3], dtype=int32)
    """
    check_scheme(scheme)
    if jnp.ndim(log_weights) != 1 or not len(log_weights):
        raise ValueError(
            f"want log-weights [n], n at least 1, got {jnp.shape(log_weights)}"
        )
    count = len(log_weights)
    weights = count * jnp.exp(normalised(jax.lax.stop_gradient(log_weights))[0])
    place = jnp.arange(count, dtype=jnp.int32)
    one, other = jax.random.split(key)
    bits = lambda shape: jax.random.bits(one, shape, jnp.uint32)
    if scheme in ("systematic", "stratified"):
        part = bits((count,) if scheme == "stratified" else ())
        found = _find(weights, place.astype(jnp.uint32), part)
    else:
        born = jnp.maximum(weights - 1, 0) if scheme == "jump" else weights
        births = born.sum()
        share = born * (count / jnp.where(births > 0, births, 1))
        other, stay = jax.random.split(other)
        whole = jax.random.randint(other, (count,), 0, count, jnp.uint32)
        found = _find(share, whole, bits((count,)))
        if scheme == "jump":
            draw = jax.random.uniform(stay, (count,), weights.dtype)
            found = jnp.where((draw < weights) | (births <= 0), place, found)
    return jnp.where(weights.any(), found, place)


def effective_size(log_weights: Array) -> Array:
    r"""As many equal weights are worth as much: $1 / \sum_i w_i^2$ where they sum to 1.

    Args:
      log_weights: `[n]`, up to a constant.

    Returns:
      A scalar from 1 to n; 0 where all weights are 0.

    Degenerate inputs:
      A log-weight that is not a number, or is +inf, counts as -inf.

    References:
      Kong, Liu and Wong, 1994, "Sequential Imputations and Bayesian Missing Data
      Problems", https://doi.org/10.1080/01621459.1994.10476469.

    Example:
      >>> effective_size(jnp.array([0.0, 0.0, -jnp.inf]))
      Array(2., dtype=float32)
    """
    square = jnp.sum(jnp.exp(2 * normalised(log_weights)[0]))
    return jnp.where(square > 0, 1 / jnp.where(square > 0, square, 1), 0)


def normalised(log_weights: Any) -> tuple[Array, Array]:
    """Log-weights whose weights sum to one, and the log of their mean before."""
    given = log_weights.astype(wide(log_weights))
    given = jnp.where(given < jnp.inf, given, -jnp.inf)  # NaN is below nothing
    most = jax.lax.stop_gradient(given.max())
    most = jnp.where(most > -jnp.inf, most, 0)
    total = jnp.exp(given - most).sum()
    log = jnp.log(jnp.where(total > 0, total, 1))
    count = jnp.log(jnp.asarray(len(given), given.dtype))
    mean = jnp.where(total > 0, most + log - count, -jnp.inf)
    return given - most - log, mean


def check_scheme(scheme: str) -> None:
    """Only those there are."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")


def _find(shares: Array, whole: Array, part: Array) -> Array:
    """The first particle whose running sum exceeds `whole + part / 2^32`."""
    own, sums = _sums(shares)
    place = jnp.arange(len(shares), dtype=jnp.int32)
    last = jnp.max(jnp.where(own, place, 0))

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) // 2
        to, rest = (v[middle] for v in sums)
        beyond = (to > whole) | ((to == whole) & (rest > part))
        up = jnp.minimum(middle + 1, high)
        return jnp.where(beyond, low, up), jnp.where(beyond, middle, high)

    ends = jnp.zeros_like(place), jnp.full_like(place, last)
    return jax.lax.fori_loop(0, (len(shares) - 1).bit_length(), halve, ends)[0]


def _sums(shares: Array) -> tuple[Array, tuple[Array, Array]]:
    """Which are above 0; running sums, of whole numbers and of parts in 2^32."""
    floor = jnp.floor(shares)
    fraction = ((shares - floor) * 2.0**32).astype(jnp.uint32)
    digits = [(fraction >> shift) & 255 for shift in (0, 8, 16, 24)]
    whole = floor.astype(jnp.uint32)
    *digits, whole_sum = jnp.cumsum(jnp.stack([*digits, whole]), axis=1)
    carry, part = jnp.zeros_like(whole), jnp.zeros_like(whole)
    for shift, digit in zip((0, 8, 16, 24), digits, strict=True):
        part = part | (((digit + carry) & 255) << shift)
        carry = (digit + carry) >> 8
    return (whole | fraction) > 0, (whole_sum + carry, part)
