"""Golden samples of diffusers 0.42.1 and k-diffusion 0.1.1.post1, on CPU.

Run in an environment of its own (torch 2.13.0, then diffusers 0.42.1 and scipy; the
k-diffusion sdist unpacked, whose `sampling.py` is read alone):
  K_DIFFUSION=.../k_diffusion/sampling.py \
    python tests/numerics/make/diffusers_golden.py tests/numerics/diffusers.npz

Each sampler takes the exact denoiser of a mixture of Gaussians, in float64 (diffusers
keeps its levels in float32). Contents of the file: start `[16, 2]`, normal;
betas/<kind>, products/<kind>, spacing/<kind>, sigmas/<kind>: tables; <case>/sigmas or
<case>/times, the levels it took; <case>/noise, as drawn; <case>/last and <case>/final,
its samples before and after the last step (which schedulers that are told to keep their
order to the end cannot take to no noise: it is left out); about (json: the mixture,
options, versions and seeds).
"""

from importlib.metadata import version
import importlib.util
import json
import os
import sys
import types

import diffusers
import numpy as np
import torch

WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]])
VARIANCES = np.array([[0.04, 0.09], [0.05, 0.02], [0.1, 0.06]])
SEEDS = {"start": 0, "noise": 2}
START = np.random.default_rng(SEEDS["start"]).standard_normal((16, 2))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
K = BETAS | {"use_karras_sigmas": True}
E = BETAS | {"use_exponential_sigmas": True}
SDE = "sde-dpmsolver++"
FULL = {"lower_order_final": False}
TRAILING = BETAS | {"timestep_spacing": "trailing", "clip_sample": False}
DDIM = TRAILING | {"set_alpha_to_one": False}
M, S = "DPMSolverMultistep", "DPMSolverSinglestep"
M_SDE = K | {"algorithm_type": SDE, "solver_order": 2}
LARGE = TRAILING | {"variance_type": "fixed_large"}
TWICE = K | {"solver_order": 3, "final_sigmas_type": "sigma_min"} | FULL
# name: (scheduler, its options, steps, space, how noise reaches a step)
CASES = {
    "euler": ("EulerDiscrete", K, 20, "ve", ""),
    "euler_a": ("EulerAncestralDiscrete", BETAS, 20, "ve", "generator"),
    "heun": ("HeunDiscrete", K, 20, "ve", ""),
    "kdpm2": ("KDPM2Discrete", K, 20, "ve", ""),
    "lms": ("LMSDiscrete", K, 20, "ve", ""),
    **{f"dpmpp{o}": (M, K | {"solver_order": o}, 20, "vp", "") for o in (1, 2, 3)},
    "dpmpp2_sde": (M, M_SDE, 20, "vp", "variance_noise"),
    "dpmpp3_twice": (M, TWICE, 10, "vp", ""),
    "dpmpp2s": (S, E, 20, "vp", ""),
    "edm_euler": ("EDMEuler", {}, 18, "edm", ""),
    "edm_dpmpp2": ("EDMDPMSolverMultistep", {}, 20, "edm", ""),
    "flow_euler": ("FlowMatchEulerDiscrete", {"shift": 3.0}, 20, "flow", ""),
    "flow_heun": ("FlowMatchHeunDiscrete", {}, 20, "flow", ""),
    "ddim": ("DDIM", DDIM, 20, "ddim", ""),
    "ddim_eta": ("DDIM", DDIM, 20, "ddim", "variance_noise"),
    "ddim_150": ("DDIM", DDIM, 150, "ddim", ""),
    "ddpm": ("DDPM", TRAILING, 50, "ddim", "generator"),
    "ddpm_large": ("DDPM", LARGE, 50, "ddim", "generator"),
    "deis3_160": ("DEISMultistep", K | {"solver_order": 3} | FULL, 160, "vp", ""),
}
for o in (1, 2, 3):
    order = K | {"solver_order": o} | FULL
    CASES[f"deis{o}"] = ("DEISMultistep", order, 10, "vp", "")
    for b in ("bh1", "bh2"):
        own = order | {"solver_type": b}
        CASES[f"unipc{o}_{b}"] = ("UniPCMultistep", own, 20, "vp", "")
# name: (sampler, its options, how many draws a step has)
SAMPLERS = {
    "k_euler": ("sample_euler", {}, 0),
    "k_euler_a": ("sample_euler_ancestral", {}, 1),
    "k_heun": ("sample_heun", {}, 0),
    "k_heun_churn": (
        "sample_heun",
        {"s_churn": 8.0, "s_tmin": 0.05, "s_tmax": 5.0, "s_noise": 1.007},
        1,
    ),
    "k_dpm_2": ("sample_dpm_2", {}, 0),
    "k_lms": ("sample_lms", {}, 0),
    "k_dpmpp_2m": ("sample_dpmpp_2m", {}, 0),
    "k_dpmpp_2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0}, 1),
    "k_dpmpp_2s_a": ("sample_dpmpp_2s_ancestral", {}, 1),
    "k_dpmpp_sde": ("sample_dpmpp_sde", {}, 2),
    "k_dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {}, 1),
    "k_dpmpp_3m_sde": ("sample_dpmpp_3m_sde", {}, 1),
}


def denoise(x, alpha, sigma):
    spread = alpha**2 * VARIANCES + sigma**2
    off = x[:, None] - alpha * MEANS
    logits = np.log(WEIGHTS) - (off**2 / spread + np.log(spread)).sum(-1) / 2
    parts = np.exp(logits - logits.max(1, keepdims=True))
    parts = parts / parts.sum(1, keepdims=True)
    return (parts[..., None] * (MEANS + alpha * VARIANCES / spread * off)).sum(1)


def level(scheduler, space, i, t):
    """alpha and sigma of a step, as the scheduler keeps them."""
    if space == "ddim":
        square = float(scheduler.alphas_cumprod[int(t)])
        return square**0.5, (1 - square) ** 0.5
    s = float(scheduler.sigmas[i])
    if isinstance(scheduler, diffusers.KDPM2DiscreteScheduler) and i % 2:
        s = float(scheduler.sigmas_interpol[i])
    if space == "flow":
        return 1 - s, s
    return (
        (1.0, s)
        if space in ("ve", "edm")
        else ((1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5)
    )


def output(x, alpha, sigma, space):
    """What a network of the space predicts."""
    x0 = denoise(x, alpha, sigma)
    if space == "edm":
        data = 0.5
        scale = sigma * data / np.hypot(sigma, data)
        return (x0 - data**2 / (sigma**2 + data**2) * x) / scale
    eps = (x - alpha * x0) / sigma
    return eps - x0 if space == "flow" else eps


def run(name, options, steps, space, noisy):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(steps)
    times, draws = scheduler.timesteps, []
    _, sigma = level(scheduler, space, 0, times[0])
    x = torch.from_numpy(sigma * START)
    seed, own = SEEDS["noise"], {}
    generator, twin = (torch.Generator().manual_seed(seed) for _ in range(2))
    whole = "lower_order_final" not in options or "final_sigmas_type" in options
    for i, t in enumerate(times if whole else times[:-1]):
        last = x
        if noisy:
            draws.append(torch.randn(x.shape, generator=twin, dtype=x.dtype))
            own = {noisy: generator if noisy == "generator" else draws[-1]}
        if name == "DDIM" and noisy:
            own["eta"] = 1.0
        if hasattr(scheduler, "scale_model_input") and space != "vp":
            scheduler.scale_model_input(x, t)
        value = torch.from_numpy(
            output(x.numpy(), *level(scheduler, space, i, t), space)
        )
        x = scheduler.step(value, t, x, return_dict=False, **own)[0]
    out = {"last": last.numpy(), "final": x.numpy()} if whole else {"last": x.numpy()}
    if space == "ddim":
        out["times"] = times.numpy()
    else:
        out["sigmas"] = scheduler.sigmas.numpy()
    return out | ({"noise": np.stack([d.numpy() for d in draws])} if draws else {})


def samplers(path):
    """The module of k-diffusion's samplers, without the rest of it."""
    package, utils = types.ModuleType("kd"), types.ModuleType("kd.utils")
    package.__path__ = []
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]
    unused = {n: types.ModuleType(n) for n in ("torchsde", "torchdiffeq")}
    unused["torchdiffeq"].odeint = None
    sys.modules.update({"kd": package, "kd.utils": utils} | unused)
    spec = importlib.util.spec_from_file_location("kd.sampling", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kd.sampling"] = module
    spec.loader.exec_module(module)
    return module


def run_k(module, name, options, draws):
    sigmas = module.get_sigmas_karras(20, 0.0292, 14.6146).double()
    seen, steps = [], len(sigmas) - 1
    generator = torch.Generator().manual_seed(SEEDS["noise"])
    normal = torch.randn(
        (steps, draws, 16, 2), generator=generator, dtype=torch.float64
    )

    def model(x, s):
        seen.append(x)
        return torch.from_numpy(denoise(x.numpy(), 1.0, float(s[0])))

    def sampler(a, b):
        """Of one path of Brownian motion in sigma, where a step asks twice."""
        z = normal[int((sigmas - a).abs().argmin())]
        if draws == 1 or (sigmas - b).abs().min() > 1e-9:
            return z[0]
        middle = (a * b) ** 0.5
        share = (a - middle) / (a - b)
        return share**0.5 * z[0] + (1 - share) ** 0.5 * z[1]

    if name == "sample_heun":
        like, rows = torch.randn_like, iter(normal[:, 0] if draws else [])
        torch.randn_like = lambda x: next(rows, torch.zeros_like(x))
    elif draws:
        options = options | {"noise_sampler": sampler}
    start = sigmas[0] * torch.from_numpy(START)
    x = getattr(module, name)(model, start, sigmas, disable=True, **options)
    if name == "sample_heun":
        torch.randn_like = like
    out = {"sigmas": sigmas.numpy(), "final": x.numpy()}
    return out | ({"noise": normal.numpy()} if draws else {})


def main(path):
    out = {"start": START}
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        scheduler = diffusers.DDPMScheduler(beta_schedule=kind)
        out[f"betas/{kind}"] = scheduler.betas.numpy()
        out[f"products/{kind}"] = scheduler.alphas_cumprod.numpy()
    stable = diffusers.DDPMScheduler(**BETAS)
    out |= {"betas/stable": stable.betas, "products/stable": stable.alphas_cumprod}
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, **BETAS)
        scheduler.set_timesteps(30)
        out[f"spacing/{spacing}"] = scheduler.sigmas.numpy()
    for name, case in CASES.items():
        out |= {f"{name}/{k}": v for k, v in run(*case).items()}
    module = samplers(os.environ["K_DIFFUSION"])
    for name, case in SAMPLERS.items():
        out |= {f"{name}/{k}": v for k, v in run_k(module, *case).items()}
    out["sigmas/exponential"] = module.get_sigmas_exponential(8, 0.1, 10.0).numpy()
    out["sigmas/polyexponential"] = module.get_sigmas_polyexponential(
        8, 0.1, 10.0, 2.0
    ).numpy()
    about = {
        "generator": "tests/numerics/make/diffusers_golden.py",
        "diffusers": version("diffusers"),
        "k-diffusion": "0.1.1.post1",
        "torch": version("torch"),
        "seeds": SEEDS,
        "mixture": [v.tolist() for v in (WEIGHTS, MEANS, VARIANCES)],
        "cases": {n: case[:4] for n, case in CASES.items()},
        "samplers": SAMPLERS,
    }
    np.savez_compressed(path, about=np.array(json.dumps(about)), **out)


if __name__ == "__main__":
    main(sys.argv[1])
