"""One step of weighted particles, towards powers of densities under a reward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Denoiser, Noise
from ._checks import check_prediction
from ._predictions import lift, wide
from ._resample import effective_size, normalised, resample
from ._sample import normal


class Expert(NamedTuple):
    """One density of the target, and how much it weighs."""

    denoise: Denoiser | Callable[..., Any]
    """`(x [b, ...], noise, cond) -> x0 [b, ...]`; without a memory of its samples"""
    weight: Any = 1.0
    """beta: a number, which may be traced; or a function of time, with a density"""
    cond: Any = None
    """What it is told, the same for every particle: leaves without the batch's axis"""
    density: Callable[..., Any] | None = None
    """`(x [n, ...], noise, cond) -> [n]`, the log-density, up to a constant"""


class Row(NamedTuple):
    """A step from the level `now` to `new`; V is the square of sigma / alpha."""

    now: Noise
    new: Noise
    v: Any
    past: Any
    """How much of V of the step before is weighed here"""
    due: Any
    """How much of this one"""
    clock: Any
    """`W = V + spread^2`, here and at the end"""
    end: Any
    log: Any
    """`log(end / clock)`"""
    beta: Any
    """`[m]`, here and at the end"""
    to: Any
    i: Any


class Target(NamedTuple):
    """What is sampled, as functions of `x [n, ...]` and a noise level."""

    predict: Callable[..., Any]
    """`(x, noise, states) -> (x0 [m, n, ...], states)`"""
    tilt: Callable[..., Any]
    """`(x, noise) -> (reward [n], its slope along x / alpha; None where flat)`"""
    density: Callable[..., Any]
    """`(x, noise, change [m]) -> [n]`: log-densities times a change of beta"""


class Rules(NamedTuple):
    """How particles move and are resampled."""

    noise: Any
    threshold: Any
    scheme: Any
    keys: Any
    pick: Any


def advance(target: Target, rules: Rules, carry: Any, row: Row) -> Any:
    """Weighs particles by the rate here, moves and resamples them, then adds noise."""
    z, log_weights, log_z, states = carry
    now, there = row.now.alpha * z, row.new.alpha * z
    clean, states = target.predict(now, row.now, states)
    scores = (clean - z[None]) / row.v
    gaps = _squares(clean[:, None] - clean[None], 3) / row.v**2
    reward, slope = target.tilt(now, row.now)
    log_weights += row.past * _rate(row.beta, scores, gaps, slope) - reward
    log_weights += target.density(now, row.now, row.to - row.beta)
    reward, slope = target.tilt(there, row.new)
    log_weights += row.due * _rate(row.to, scores, gaps, slope) + reward

    pull = (1 + rules.noise) / 2
    rate = pull * row.to.sum()
    step = row.clock * _decay(rate, row.log)
    z += pull * step * jnp.tensordot(row.to, scores, 1)
    z += 0 if slope is None else rules.noise / 2 * step * slope
    ess = effective_size(log_weights)
    due = (ess > 0) & (ess < rules.threshold * len(z))

    def again(z: Array, log_weights: Array, log_z: Array) -> tuple[Array, ...]:
        key = jax.random.fold_in(rules.pick, row.i)
        places = resample(log_weights, key=key, scheme=rules.scheme)
        mean = normalised(log_weights)[1]
        return z[places], jnp.zeros_like(log_weights), log_z + mean

    kept = z, log_weights, log_z
    z, log_weights, log_z = jax.lax.cond(due, again, lambda *v: v, *kept)
    size = jnp.sqrt(rules.noise) * jnp.sqrt(row.end * _decay(2 * rate - 1, row.log))
    draws = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, row.i)
    return (z + size * normal(draws, z), log_weights, log_z, states), (ess, due)


def together(denoisers: list[Any], conds: list[Any], x: Array) -> tuple[Any, Any]:
    """Predictions of m denoisers, those of the same one in one call; their states."""
    same = {id(d): [j for j, e in enumerate(denoisers) if e is d] for d in denoisers}
    groups = [(lift(denoisers[js[0]]), js) for js in same.values()]
    order = [j for _, js in groups for j in js]
    back = jnp.array([order.index(j) for j in range(len(order))])
    told = [_joined([conds[j] for j in js]) for _, js in groups]
    tiled = lambda v, js: jnp.concatenate([v] * len(js))

    def predict(now: Array, noise: Noise, states: Any) -> tuple[Array, Any]:
        found, after = [], []
        given = now.astype(x.dtype)
        for (denoiser, js), cond, state in zip(groups, told, states, strict=True):
            many = tiled(given, js)
            x0, state = denoiser.apply(many, noise, cond, state)
            check_prediction(x0, many)
            found.append(x0.astype(now.dtype).reshape(len(js), *x.shape))
            after.append(state)
        return jnp.concatenate(found)[back], after

    states = [
        denoiser.init(tiled(x, js), cond)
        for (denoiser, js), cond in zip(groups, told, strict=True)
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        if jnp.ndim(leaf):
            raise ValueError(
                f"a denoiser remembers its samples, which are resampled: its state has "
                f"{jnp.shape(leaf)} at {jax.tree_util.keystr(path[1:])}"
            )
    return predict, states


def _joined(conds: list[Any]) -> Any:
    """Conds one after the other, along the batch."""
    if len({jax.tree.structure(c) for c in conds}) > 1:
        raise ValueError("experts that share a denoiser need conds of one structure")
    return jax.tree.map(lambda *v: jnp.concatenate(v), *conds)


def tilted(reward: Any, x: Array, noise: Noise) -> tuple[Array, Array]:
    """The reward of each particle, and its slope along x / alpha."""
    value, back = jax.vjp(lambda v: reward(v, noise), x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"reward must give {x.shape[:1]}, got {value.shape}")
    return value.astype(wide(x)), noise.alpha * back(jnp.ones_like(value))[0]


def _rate(beta: Array, scores: Array, gaps: Array, slope: Any) -> Array:
    """Half of |S|^2 - sum_i beta_i |s_i|^2 + S R, of each particle."""
    own = (beta.sum() - 1) * (beta @ _squares(scores, 2))
    apart = jnp.einsum("i,j,ijn->n", beta, beta, gaps) / 2
    if slope is None:
        return (own - apart) / 2
    both = jnp.tensordot(beta, scores, 1) * slope
    return (own - apart + both.reshape(len(both), -1).sum(1)) / 2


def _squares(v: Array, kept: int) -> Array:
    """Sums of squares over all but the first axes."""
    return jnp.sum(v * v, range(kept, v.ndim))


def _decay(rate: Any, log: Any) -> Any:
    """`(1 - exp(rate log)) / rate`, `-log` where the rate is 0."""
    small = jnp.abs(rate) < 1e-6
    safe = jnp.where(small, 1, rate)
    return jnp.where(small, -log, -jnp.expm1(safe * log) / safe)
