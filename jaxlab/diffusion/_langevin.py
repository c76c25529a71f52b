"""Predictor-corrector sampling: Song et al., 2020."""

from typing import Any

import jax
import jax.numpy as jnp

from ..types import Grid, Noise, Solver
from ._predictions import along
from ._tables import wide


def langevin(predictor: Solver, *, snr: float = 0.16, steps: int = 1) -> Solver:
    r"""Langevin steps at the new noise level after every step of a solver.

    $x \leftarrow x + \epsilon\, s(x) + \sqrt{2 \epsilon}\, z$ with $\epsilon = 2 a (r
    \|z\| / \|s\|)^2$ and $a = (\alpha / \alpha')^2$ of the step (1 where alpha does not
    change).

    Args:
      predictor: the solver, e.g. `euler_maruyama()` or `ddim(eta=1.0)`.
      snr: r, the ratio of signal to noise of a step.
      steps: how many, each with one evaluation; none at the clean sample.

    Returns:
      A solver. The published code takes the norms' means over the batch; here each
      sample has its own, so that none depends on its neighbours.

    Raises:
      ValueError: `snr` is not above 0, or `steps` is below 1.

    Degenerate inputs:
      A score of zero: the step is left out.

    References:
      Song et al., 2020, https://arxiv.org/abs/2011.13456, algorithms 4 and 5.
    """
    if not snr > 0 or steps < 1:
        raise ValueError(f"want snr above 0 and at least 1 step, got {snr} and {steps}")

    def plan(grid: Grid) -> Any:
        fall = (grid.noise.alpha[:-1] / grid.noise.alpha[1:]) ** 2
        return predictor.plan(grid), Noise(*(v[1:] for v in grid.noise)), fall

    def step(
        evaluate: Any, x: Any, memory: Any, state: Any, row: Any, draw: Any
    ) -> tuple[Any, Any, Any]:
        row, noise, fall = row
        x, memory, state = predictor.step(evaluate, x, memory, state, row, draw)
        live = noise.sigma > 0
        safe = noise._replace(sigma=jnp.where(live, noise.sigma, 1))
        norm = lambda v: jnp.sqrt(jnp.sum(v * v, range(1, v.ndim), keepdims=True))

        def one(carry: Any, j: Any) -> tuple[Any, None]:
            x, state = carry
            x0, state = evaluate(x, safe, state)
            now, z = x.astype(wide(x)), draw(j)
            a, s = along(noise.alpha, now), along(safe.sigma, now)
            score = (a * x0.astype(now.dtype) - now) / (s * s)
            size = norm(score)
            ratio = snr * norm(z) / jnp.where(size > 0, size, 1)
            pace = 2 * along(fall, now) * ratio**2 * (size > 0) * along(live, now)
            return (
                (now + pace * score + jnp.sqrt(2 * pace) * z).astype(x.dtype),
                state,
            ), None

        first = 100  # the predictor's draws come before these
        run = lambda carry: jax.lax.scan(one, carry, first + jnp.arange(steps))[0]
        x, state = jax.lax.cond(jnp.any(live), run, lambda carry: carry, (x, state))
        return x, memory, state

    return Solver(plan, predictor.init, step)
