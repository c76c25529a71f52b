"""Feynman-Kac correctors: Skreta et al., 2025."""

from collections.abc import Callable, Sequence
import functools as ft
import math
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
import numpy as np

from ..types import Grid, Noise
from ._ancestral import check_start
from ._levels import ratios
from ._particles import Expert, Row, Rules, Target, advance, tilted, together
from ._predictions import wide
from ._resample import Scheme, check_scheme, normalised
from ._sample import evaluations, keys_of


class Population(NamedTuple):
    """Weighted samples, and what they say of the target."""

    x: Any
    """`[n, ...]`"""
    log_weights: Any
    """`[n]`; the weights sum to 1"""
    log_z: Any
    """The log of the estimated ratio of the normalisers, last level over first"""
    ess: Any
    """`[t]`, the effective sample size at every step, before resampling"""
    resampled: Any
    """`[t]`, whether a step did"""
    nfe: Any
    """How often networks were evaluated, per particle"""


def feynman_kac(
    experts: Sequence[Expert],
    x: Array,
    grid: Grid,
    *,
    key: Array,
    noise: Any = 1.0,
    reward: Callable[..., Any] | None = None,
    spread: float = 1.0,
    threshold: Any = 0.5,
    scheme: Scheme = "systematic",
) -> Population:
    r"""Samples of $p_t \propto \prod_i q_{i,t}^{\beta_i} e^{r_t}$, with weights.

    Annealing is one expert of weight beta; classifier-free guidance two of gamma and 1
    - gamma; a product two of 1. The scores' sum alone does not sample $p_t$: weights
    make up for it. In $z = x / \alpha$ the noise is $V = (\sigma / \alpha)^2$, and
    $\partial_V q = \tfrac12 \Delta q$ for every q. With $S = \sum_i \beta_i s_i$ and
    $R = \nabla r$, particles move, while V falls, by

    $dz = (\tfrac{1 + \lambda}{2} S + \tfrac\lambda2 R)\, dV + \sqrt\lambda\, dw$.

    Let $U = \sum_i \beta_i \log q_i + r$. What the Fokker-Planck equation of this
    movement leaves over of $\partial e^U$ is $e^U$ times the rate of the log-weight:
    $\partial U + \nabla \cdot b + b \cdot \nabla U - \tfrac\lambda2 (\Delta U + |\nabla
    U|^2)$, where b is the drift and $\partial \log q_i = -\tfrac12 (\nabla \cdot s_i +
    |s_i|^2)$. All second derivatives cancel, R's by the choice of its share of b:

    $\tfrac12 (|S|^2 - \sum_i \beta_i |s_i|^2 + S \cdot R) + \partial r + \sum_i
    \dot\beta_i \log q_i$ for every $\lambda \ge 0$,

    and $|S|^2 - \sum_i \beta_i |s_i|^2 = (B - 1) \sum_i \beta_i |s_i|^2 - \sum_{i<j}
    \beta_i \beta_j |s_i - s_j|^2$, $B = \sum_i \beta_i$, which in guidance, B = 1, is
    free of cancellation. In x, an SDE's drift f adds $f d (B - 1) - f x \cdot R$.

    Args:
      experts: the densities; those that share one `denoise` are evaluated in one call.
      x: `[n, ...]`, a population at the first level: samples of $p_t$ there, often
        nearly normal of variance $\sigma^2 / B$. Over populations, `jax.lax.map`
        resamples where it is due; `jax.vmap` does at every step, and selects.
      grid: falling levels, without columns; end it with "least": a step to no noise
        adds all of the noise that was left.
      key: one key: slot j draws from a key of its own, whatever n is.
      noise: lambda, at least 0; may be traced. 1 is the paper's; more forgets sooner
        where a particle came from, so that its weight varies less.
      reward: r, `(x [n, ...], noise) -> [n]`, of the noisy sample: exact for any such
        function that is smooth in x, however it changes with the noise; x is float32
        or wider.
      spread: standard deviation of the data, above 0. Steps are exact where S is that
        of normal data; towards 0 they are ancestral, infinite is Euler-Maruyama.
      threshold: resample where the effective size is below this share of n: 0 never, 1
        at every step, as in the paper's jump process.
      scheme: of `resample`.

    Returns:
      `Population(x, log_weights, log_z, ess, resampled, nfe)`; x has its dtype.

    Raises:
      ValueError: no expert; a weight that is not finite, or that is a function without
        a density; experts of one denoiser whose conds differ in structure; a denoiser
        with a memory of samples, or of another shape or dtype than x; negative noise; a
        spread not above 0; a threshold not in [0, 1]; a grid that does not fall, has
        columns or starts where alpha is 0; an unknown scheme; a reward not `[n]`.

    Degenerate inputs:
      A weight that is not a number or is infinite counts as 0. If none is left, x goes
      on without resampling; `log_z` and `log_weights` are -inf, `ess` is 0. One
      particle is never resampled.

    References:
      Skreta et al., 2025, "Feynman-Kac Correctors in Diffusion: Annealing, Guidance,
      and Product of Experts", https://arxiv.org/abs/2503.02819. Here for any lambda and
      schedule; weights are neither clipped nor floored, their integral is by the
      trapezium rule in log(V + spread^2), without more evaluations. A change of beta is
      weighted at its level, and exact. Ratios of Gaussian kernels in place of rates
      would need the covariance of x0 given x for any lambda but 1.

    Example:
      >>> from jaxlab import diffusion
      >>> grid = diffusion.karras(diffusion.edm(), steps=50, high=10, end="least")
      >>> unit = lambda x, noise, cond: x / (1 + noise.sigma**2)  # of N(0, 1)
      >>> x = diffusion.prior(jax.random.key(0), (512,), grid) / 2**0.5
      >>> out = feynman_kac([Expert(unit, 2.0)], x, grid, key=jax.random.key(1))
      >>> bool(abs(jnp.exp(out.log_weights) @ out.x**2 - 1 / 2) < 0.1)
      True
    """
    check_scheme(scheme)
    _check(experts, grid, noise, spread, threshold)
    cast = lambda v: jnp.asarray(v, wide(x))
    every = lambda v: jnp.broadcast_to(v, (len(x), *jnp.shape(v)))
    conds = [jax.tree.map(every, e.cond) for e in experts]
    predict, states = together([e.denoise for e in experts], conds, x)

    def density(x: Array, noise: Noise, change: Array) -> Any:
        moving = [j for j, e in enumerate(experts) if callable(e.weight)]
        log = [experts[j].density(x, noise, conds[j]) for j in moving]  # pyright: ignore
        return sum((change[j] * cast(v) for j, v in zip(moving, log, strict=True)), 0.0)

    flat = lambda x, noise: (0.0, None)  # noqa: ARG005
    tilt = flat if reward is None else ft.partial(tilted, reward)
    move, pick = jax.random.split(key)
    rules = Rules(cast(noise), threshold, scheme, keys_of(move, x), pick)
    beta = jnp.stack([cast(_over_time(e.weight, grid)) for e in experts], 1)
    rows = jax.tree.map(cast, _rows(grid, spread))
    rows = rows._replace(beta=beta[:-1], to=beta[1:], i=jnp.arange(len(rows.v)))

    z, none = x.astype(wide(x)) / rows.now.alpha[0], jnp.zeros((), wide(x))
    start = z, jnp.broadcast_to(none, len(x)), none, states
    step = ft.partial(advance, Target(predict, tilt, density), rules)
    (z, log_weights, log_z, states), (ess, due) = jax.lax.scan(step, start, rows)
    log_weights, mean = normalised(log_weights)
    logs, size = cast(np.log(grid.noise.alpha)), x.size // len(x)
    change = (beta[-1].sum() - 1) * logs[-1] - (beta[0].sum() - 1) * logs[0]
    moved = jnp.sum((beta[1:] - beta[:-1]).sum(1) * logs[:-1])
    log_z += mean + size * (moved - change)
    x = (cast(grid.noise.alpha[-1]) * z).astype(x.dtype)
    return Population(x, log_weights, log_z, ess, due, evaluations(states, x))


def _rows(grid: Grid, spread: float) -> Row:
    """The steps, in float64 on the host; the weights' powers are filled in later."""
    v = ratios(grid) ** 2
    clock = v + min(spread**2, 1e7 * v[0])
    log = np.log1p(np.diff(v) / clock[:-1])
    past, due = -clock[1:] * log / 2, -clock[:-1] * log / 2
    due[-1] *= 2  # nothing is evaluated at the end
    return Row(
        now=Noise(*(u[:-1] for u in grid.noise)),
        new=Noise(*(u[1:] for u in grid.noise)),
        v=v[:-1],
        past=np.append(0, past[:-1]),
        due=due,
        clock=clock[:-1],
        end=clock[1:],
        log=log,
        beta=0.0,
        to=0.0,
        i=0.0,
    )


def _over_time(weight: Any, grid: Grid) -> Any:
    """A weight at every level."""
    times = grid.noise.t
    if callable(weight):
        return np.array([weight(t) for t in times], np.float64)
    return jnp.broadcast_to(jnp.asarray(weight), times.shape)


def _check(
    experts: Sequence[Expert], grid: Grid, noise: Any, spread: Any, threshold: Any
) -> None:
    if not experts:
        raise ValueError("want at least one expert")
    for j, expert in enumerate(experts):
        if callable(expert.weight) and expert.density is None:
            raise ValueError(
                f"expert {j}: a weight that changes in time needs the density, which "
                f"the scores do not give"
            )
        if isinstance(expert.weight, float) and not math.isfinite(expert.weight):
            raise ValueError(f"expert {j}: weight must be finite, got {expert.weight}")
    if isinstance(noise, float | int) and not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    if not spread > 0:
        raise ValueError(f"spread must be above 0, got {spread}")
    if isinstance(threshold, float | int) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    if grid.noise.t.ndim > 1:
        raise ValueError("a population has one level at a time: a grid without columns")
    check_start(grid, "feynman_kac")
    if ratios(grid)[1] > ratios(grid)[0]:
        raise ValueError("the noise of the grid must fall")
