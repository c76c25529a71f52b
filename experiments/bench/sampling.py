"""What a sampler costs beside its network, and how accurate its evaluations are.

Claim:    Beside the network, a step costs 10 times less than in diffusers for a small
          state and 6 times less for 16 images; at 10 and 20 evaluations the best solver
          is at least as accurate as diffusers' best; guidance that evaluates less takes
          less time.
Cite:     Lu et al., 2022, "DPM-Solver++", https://arxiv.org/abs/2211.01095.
Command:  python experiments/bench/sampling.py [--peer PYTHON, with torch and diffusers]
Device:   CPU, 2 cores, or an accelerator. Minutes: 4; --smoke: a quarter.
Expected: diffusers / ours 206 and more (16x2); 26.9 DDIM, 7.6 DPM++2M and 3.2 Heun
          (16x3x32x32): Heun's step, whose second evaluation the last one skips, is not
          at 6 yet. Best errors, ours / diffusers: 0.77 at 10, 1.00 at 20, 1.14 at 40.

Overhead is the wall time of a step around a network that gives its input times 0.999,
the least over rounds. Accuracy is the median distance, over 256 points, of the end of a
Karras grid from the exact flow of a mixture of Gaussians, for every solver. The first
call compiles a U-Net of a million parameters into 30 steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
import functools as ft
import json
from pathlib import Path
import subprocess
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from jaxlab import diffusion, experiment, nn
from jaxlab.types import Noise

PEER = Path(__file__).parent / "peers" / "diffusers_sampling.py"
SHAPES = {"16x2": (16, 2), "16x3x32x32": (16, 3, 32, 32)}
SOLVERS = {
    "DDIM": diffusion.ddim(),
    "DPM++2M": diffusion.dpmpp(),
    "DPM++3M": diffusion.dpmpp(order=3),
    "Heun": diffusion.heun(),
    "UniPC-2": diffusion.unipc(),
    "UniPC-3": diffusion.unipc(order=3),
    "DEIS-3": diffusion.deis(),
    "LMS-4": diffusion.lms(),
    "DPM++2S": diffusion.dpmpp_2s(),
    "DPM++3S": diffusion.dpmpp_3s(),
}
STAGES = {"Heun": 2, "DPM++2S": 2, "DPM++3S": 3}
LOW, HIGH = 0.0292, 14.6146  # sigma / alpha of Stable Diffusion's first and last step
MIXTURE = {
    "weights": [0.5, 0.3, 0.2],
    "means": [[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]],
    "variances": [[0.04, 0.09], [0.05, 0.02], [0.1, 0.06]],
}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    steps: int = 50
    rounds: int = 30
    evaluations: tuple[int, ...] = (10, 20, 40)
    points: int = 256
    width: int = 32
    """of the U-Net"""
    peer: str = ""
    """a Python with torch and diffusers"""
    smoke: bool = False


SMOKE = {"steps": 3, "rounds": 2, "evaluations": (6,), "points": 8, "width": 4}


def run(config: Config) -> dict[str, float]:
    """Microseconds, seconds, errors, and ratios to the peer's."""
    metrics = overhead(config) | accuracy(config) | guidance(config) | first(config)
    if config.peer:
        given = MIXTURE | {"low": LOW, "high": HIGH, "points": points(config).tolist()}
        given |= {"steps": config.steps, "rounds": config.rounds}
        given |= {"evaluations": config.evaluations, "shapes": SHAPES}
        command = [config.peer, str(PEER)]
        more = {"capture_output": True, "text": True, "check": True}
        said = subprocess.run(command, input=json.dumps(given), **more).stdout
        metrics |= json.loads(said.splitlines()[-1])
        metrics |= ratios(config, metrics)
    return metrics


def ratios(config: Config, metrics: dict[str, float]) -> dict[str, float]:
    """The peer's overhead over ours; our best error over the peer's best."""
    out = {
        f"{name}, {shape}: diffusers / ours": metrics[f"{name}, {shape}: diffusers, us"]
        / metrics[f"{name}, {shape}: us"]
        for name in ("DDIM", "DPM++2M", "Heun")
        for shape in SHAPES
    }
    for n in config.evaluations:
        ends = f"at {n} evaluations: error", f"at {n} evaluations: diffusers, error"
        ours, theirs = (
            min(v for k, v in metrics.items() if k.endswith(e)) for e in ends
        )
        out[f"best error at {n} evaluations, ours / diffusers"] = ours / theirs
    return out


def least(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call, the least of several."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times[1:])


def overhead(config: Config) -> dict[str, float]:
    """Microseconds of an evaluation around a network that does nothing."""
    nothing = diffusion.denoiser(lambda x, *_: 0.999 * x)
    grid = diffusion.karras(diffusion.scaled_linear(), steps=config.steps)
    out = {}
    for name in ("DDIM", "DPM++2M", "Heun"):
        calls = config.steps * STAGES.get(name, 1)
        go = ft.partial(diffusion.sample, nothing, grid=grid, solver=SOLVERS[name])
        go = jax.jit(lambda x, go=go: go(x).x)
        for shape, sides in SHAPES.items():
            call = ft.partial(go, jnp.ones(sides))
            out[f"{name}, {shape}: us"] = 1e6 * least(call, config.rounds) / calls
    return out


def points(config: Config) -> np.ndarray:
    """Where the flows start, of unit noise."""
    return np.random.default_rng(0).standard_normal((config.points, 2))


def mixture(x: Any, noise: Noise, _: Any = None) -> Any:
    """The clean sample's expectation under `MIXTURE`."""
    given = (
        jnp.asarray(MIXTURE[k], x.dtype) for k in ("weights", "means", "variances")
    )
    weights, means, variances = given
    total = noise.alpha**2 * variances + noise.sigma**2
    off = x[:, None] - noise.alpha * means[None]
    logs = jnp.log(weights) - 0.5 * (off**2 / total + jnp.log(total)).sum(-1)
    part = means[None] + noise.alpha * variances / total * off
    return (jax.nn.softmax(logs, -1)[..., None] * part).sum(1)


def accuracy(config: Config) -> dict[str, float]:
    """Median distances from the exact flow, at equal evaluations of the network."""
    with jax.enable_x64(True):
        schedule = diffusion.edm(sigma_min=LOW, sigma_max=HIGH)
        start = jnp.asarray(HIGH * points(config))
        go = jax.jit(
            lambda solver, rows: (
                diffusion.sample(mixture, start, rows, solver=solver).x
            ),
            static_argnums=0,
        )
        fine = diffusion.exponential(schedule, steps=2000, end="least")
        truth, out = go(SOLVERS["DPM++3S"], SOLVERS["DPM++3S"].plan(fine)), {}
        for n in track(config.evaluations, "evaluations"):
            for name, solver in SOLVERS.items():
                steps = n // STAGES.get(name, 1)
                grid = diffusion.karras(schedule, steps=steps, end="least")
                error = jnp.linalg.norm(go(solver, solver.plan(grid)) - truth, axis=-1)
                out[f"{name} at {n} evaluations: error"] = float(jnp.median(error))
    return out


def guidance(config: Config) -> dict[str, float]:
    """Seconds and evaluations of guidance everywhere, in an interval, and adaptive."""
    sizes = 256, 64 if config.smoke else 512
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (sizes[0] + 2, sizes[1]), (sizes[1], sizes[1]), (sizes[1], sizes[0])
    layers = [
        jax.random.normal(k, s) * s[0] ** -0.5
        for k, s in zip(keys, shapes, strict=True)
    ]

    def network(x: Any, t: Any, cond: Any) -> Any:
        h = jnp.concatenate([x, t[:, None], cond[:, None]], -1)
        for layer in layers[:-1]:
            h = jax.nn.silu(h @ layer)
        return h @ layers[-1]

    schedule = diffusion.edm(sigma_max=20.0)
    grid = diffusion.karras(schedule, steps=config.steps)
    x, cond = jnp.ones((64, sizes[0])), jnp.ones(64)
    plain = diffusion.edm_denoiser(network)
    cfg = diffusion.cfg(scale=3.0, null=jnp.zeros(1))
    ways = {
        "conditional": plain,
        "cfg": cfg(plain),
        "interval": diffusion.interval(cfg, low=0.3, high=3.0)(plain),
        "adaptive": diffusion.adaptive(scale=3.0, null=jnp.zeros(1), threshold=0.999)(
            plain
        ),
    }
    out = {}
    for name, denoise in ways.items():
        go = jax.jit(
            lambda x, denoise=denoise: diffusion.sample(
                denoise, x, grid, solver=SOLVERS["DPM++2M"], cond=cond
            )
        )
        out[f"{name}: evaluations"] = float(go(x).nfe)
        out[f"{name}: ms"] = 1e3 * least(ft.partial(go, x), config.rounds)
    return out


def first(config: Config) -> dict[str, float]:
    """Seconds until the first samples of a U-Net, compilation included."""
    net = nn.UNet(3, width=config.width, multiples=(1, 2, 2), rngs=nnx.Rngs(0))
    graph, params = nnx.split(net)
    grid = diffusion.karras(diffusion.scaled_linear(), steps=min(config.steps, 30))

    @jax.jit
    def go(params: Any, x: Any) -> Any:
        denoise = diffusion.denoiser(nnx.merge(graph, params))
        return diffusion.sample(denoise, x, grid, solver=SOLVERS["DPM++2M"]).x

    x, start = jnp.ones((16, 32, 32, 3)), time.perf_counter()
    jax.block_until_ready(go(params, x))
    taken = time.perf_counter() - start
    again = least(ft.partial(go, params, x), 3)
    count = sum(v.size for v in jax.tree.leaves(params))
    return {
        "U-Net: parameters": count,
        "U-Net: first call, s": taken,
        "U-Net: a later call, s": again,
        "U-Net: compiling, s": taken - again,
    }


if __name__ == "__main__":
    above = Path(__file__).parents[1] / "sampling.py"  # records are kept there
    experiment.main(Config, run, smoke=SMOKE, file=str(above))
