"""Feynman-Kac correctors: populations that sample what guidance only aims at.

Claim:    Weighted and resampled, particles converge to a product, a power and a guided
          density as 1 / sqrt(n); without weights they do not, and more noise than the
          paper's, at as many evaluations, brings them several times closer.
Cite:     Skreta et al., 2025, "Feynman-Kac Correctors in Diffusion: Annealing,
          Guidance, and Product of Experts", https://arxiv.org/abs/2503.02819.
Command:  python experiments/feynman_kac.py
Device:   CPU, 2 cores. Minutes: 9; --smoke: a quarter.
Expected: with noise 4 slopes of -0.48, -0.48 and -0.45; 4096 particles are 6.2, 6.0 and
          7.1 times closer than with noise 1 (slopes -0.19, -0.21, -0.15).

Mixtures of Gaussians in the plane, whose scores are exact; targets are the product of
two, the third power of one, and guidance by 3 from one to a component of it. The error
is that of the particles' weighted mean, root mean square over seeds and coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass
import functools as ft
import itertools as it
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import diffusion, experiment, figures
from jaxlab.types import Noise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "results" / "feynman_kac.png"
LOW, HIGH = 0.02, 20.0


class Mixture(NamedTuple):
    """Components in the plane, of independent coordinates."""

    weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def __mul__(self, other: "Mixture") -> "Mixture":
        """The product of the densities, normalised."""
        v, w = self.variances[:, None], other.variances[None]
        variances = v * w / (v + w)
        means = (self.means[:, None] * w + other.means[None] * v) / (v + w)
        gap = self.means[:, None] - other.means[None]
        logs = np.log(self.weights[:, None] * other.weights[None])
        logs = logs - 0.5 * (gap**2 / (v + w) + np.log(2 * np.pi * (v + w))).sum(-1)
        weights = np.exp(logs - logs.max())
        flat = lambda a: a.reshape(-1, 2)
        return Mixture(weights.ravel() / weights.sum(), flat(means), flat(variances))

    def log(self, x: np.ndarray) -> np.ndarray:
        """The log-density at `[n, 2]`."""
        gap = x[:, None] - self.means
        size = (gap**2 / self.variances + np.log(2 * np.pi * self.variances)).sum(-1)
        return np.log((self.weights * np.exp(-size / 2)).sum(1) + 1e-300)

    def draw(self, n: int, seed: int) -> np.ndarray:
        """`[n, 2]`."""
        rng = np.random.default_rng(seed)
        i = rng.choice(len(self.weights), n, p=self.weights)
        return self.means[i] + np.sqrt(self.variances[i]) * rng.standard_normal((n, 2))

    def denoise(self, x: Any, noise: Noise, _: Any) -> Any:
        """The clean sample's expectation; alpha is 1."""
        weights, means, variances = (jnp.asarray(v, x.dtype) for v in self)
        total, gap = variances + noise.sigma**2, x[:, None] - means[None]
        logs = jnp.log(weights) - 0.5 * (gap**2 / total + jnp.log(total)).sum(-1)
        part = means[None] + variances / total * gap
        return (jax.nn.softmax(logs, -1)[..., None] * part).sum(1)


CENTRES = [[-2.0, 0.0], [2.0, 0.5], [0.0, 2.0]], [[-1.0, 0.5], [1.5, 0.0]]
SPREADS = [[0.5, 0.5], [0.4, 0.6], [0.3, 0.3]], [[0.8, 0.6], [0.6, 0.8]]
SHARES = [0.5, 0.3, 0.2], [0.6, 0.4]
ONE, TWO = (
    Mixture(*map(np.array, v)) for v in zip(SHARES, CENTRES, SPREADS, strict=True)
)
PART = Mixture(np.ones(1), ONE.means[1:2], ONE.variances[1:2])


@dataclass(frozen=True)
class Config:
    """How many particles, seeds and steps."""

    sizes: tuple[int, ...] = (64, 256, 1024, 4096)
    noises: tuple[float, ...] = (1.0, 4.0)
    """lambda; the first is the paper's"""
    steps: int = 800
    seeds: int = 20
    smoke: bool = False


SMOKE = {"sizes": (8, 16), "steps": 10, "seeds": 2, "noises": (4.0,)}


class Target(NamedTuple):
    """What is sampled, by which scores, and from where."""

    experts: list
    mean: np.ndarray
    draw: Any


@ft.cache
def targets() -> dict[str, Target]:
    """The three, each noised by `LOW` at the end and by `HIGH` at the start."""
    noised = lambda m, s: m._replace(variances=m.variances + s**2)
    low, high = ft.partial(noised, s=LOW), ft.partial(noised, s=HIGH)
    expert = lambda m, w=1.0: diffusion.Expert(m.denoise, w)
    mean = lambda m: m.weights @ m.means
    plane = np.stack(np.meshgrid(*[np.linspace(-8, 12, 801)] * 2), -1).reshape(-1, 2)
    logs = 3 * low(PART).log(plane) - 2 * low(ONE).log(plane)
    share = np.exp(logs - logs.max())
    centre = 3 * mean(PART) - 2 * mean(ONE)
    start = Mixture(np.ones(1), centre[None], np.full((1, 2), HIGH**2))
    both, cube = low(ONE) * low(TWO), low(ONE) * low(ONE) * low(ONE)
    far = high(ONE)
    pair, guided = [expert(ONE), expert(TWO)], [expert(PART, 3.0), expert(ONE, -2.0)]
    return {
        "product": Target(pair, mean(both), (far * high(TWO)).draw),
        "third power": Target([expert(ONE, 3.0)], mean(cube), (far * far * far).draw),
        "guidance by 3": Target(guided, share @ plane / share.sum(), start.draw),
    }


@ft.cache
def sampler(name: str, steps: int) -> Callable[..., Any]:
    """Populations `[seeds, n, 2]` on their way, all in one program."""
    schedule = diffusion.edm(sigma_min=LOW, sigma_max=HIGH)
    grid = diffusion.karras(schedule, steps=steps, end="least")
    go = ft.partial(diffusion.feynman_kac, targets()[name].experts, grid=grid)
    one = lambda x, key, how: go(x, key=key, noise=how[0], threshold=how[1])
    return jax.jit(jax.vmap(one, (0, 0, None)))


def errors(config: Config, name: str, noise: float, weigh: bool, n: int) -> float:
    """How far the particles' mean is from the target's, over seeds."""
    target, seeds = targets()[name], range(config.seeds)
    x = jnp.asarray(np.stack([target.draw(n, 1000 * s + n) for s in seeds]), "f4")
    keys = jax.random.split(jax.random.key(n), config.seeds)
    out = sampler(name, config.steps)(x, keys, (noise, 0.5 if weigh else 0.0))
    weights = np.exp(out.log_weights) if weigh else np.full(x.shape[:2], 1 / n)
    off = (weights[..., None] * np.asarray(out.x)).sum(1) - target.mean
    return float(np.sqrt((off**2).mean()))


def run(config: Config) -> dict[str, float]:
    """Root mean square errors, their slopes in n, and what more noise brings."""
    found: dict[tuple, list[float]] = {}
    for row in track(list(it.product(targets(), config.noises, (True, False))), "rows"):
        found[row] = [errors(config, *row, n) for n in config.sizes]
    if not config.smoke:
        figures.save(draw(config, found), PICTURE)
    out = {}
    first, most = config.noises[0], config.noises[-1]
    for (name, noise, weigh), values in found.items():
        label = f"{name}, noise {noise:g}, {'weighted' if weigh else 'unweighted'}"
        out[f"{label}: slope"] = np.polyfit(np.log(config.sizes), np.log(values), 1)[0]
        pairs = zip(config.sizes, values, strict=True)
        out |= {f"{label}, {n}: error": value for n, value in pairs}
    for name in targets():
        less = found[name, first, True][-1] / found[name, most, True][-1]
        out[f"{name}: error, noise {first:g} over {most:g}"] = less
    return out


def draw(config: Config, found: dict[tuple, list[float]]) -> "Figure":
    """Errors against the number of particles, a panel per target."""
    fig, axes = figures.figure(11, 3.9, ncols=len(targets()), sharey=True)
    for ax, name in zip(axes, targets(), strict=True):
        for i, noise in enumerate(config.noises):
            for how, look in (("weighted", "o-"), ("not weighted", "x:")):
                y = found[name, noise, how == "weighted"]
                more = {"color": figures.COLOURS[i], "label": f"noise {noise:g}, {how}"}
                ax.loglog(config.sizes, y, look, **more)
        ax.set_title(name, size=10)
        ax.set_xlabel("particles")
    axes[0].set_ylabel("error of the mean")
    axes[0].legend(frameon=False, fontsize=8)
    first, most = config.noises[0], config.noises[-1]
    less = [found[n, first, True][-1] / found[n, most, True][-1] for n in targets()]
    figures.headline(
        fig,
        f"With noise {most:g} the weighted mean is {min(less):.1f} to {max(less):.1f} "
        f"times closer than with noise {first:g}; without weights it stays off",
        f"{config.steps} steps, {config.seeds} populations of each size.",
    )
    return fig


if __name__ == "__main__":
    experiment.main(Config, run, smoke=SMOKE, file=__file__)
