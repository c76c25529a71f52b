"""Guided diffusion sampling: schedules, grids, solvers, guidance, correctors."""

from ._ancestral import ddim as ddim, ddpm as ddpm
from ._grids import (
    exponential as exponential,
    karras as karras,
    timesteps as timesteps,
    uniform as uniform,
)
from ._langevin import langevin as langevin
from ._levels import (
    columns as columns,
    from_ratios as from_ratios,
    from_times as from_times,
    ratios as ratios,
    reverse as reverse,
    shift as shift,
)
from ._multistep import deis as deis, dpmpp as dpmpp, lms as lms
from ._predictions import (
    convert as convert,
    denoiser as denoiser,
    edm_denoiser as edm_denoiser,
    lift as lift,
    recentre as recentre,
)
from ._preserving import (
    beta_schedule as beta_schedule,
    cosine as cosine,
    discrete as discrete,
    scaled_linear as scaled_linear,
    sub_vp as sub_vp,
    vp as vp,
)
from ._runge_kutta import (
    dpm_2 as dpm_2,
    euler_maruyama as euler_maruyama,
    flow_euler as flow_euler,
    flow_heun as flow_heun,
    heun as heun,
)
from ._sample import Sample as Sample, prior as prior, sample as sample
from ._schedules import (
    edm as edm,
    flow as flow,
    level as level,
    ou as ou,
    scaled as scaled,
    ve as ve,
)
from ._singlestep import (
    dpmpp_2s as dpmpp_2s,
    dpmpp_3s as dpmpp_3s,
    dpmpp_sde as dpmpp_sde,
)
from ._unipc import unipc as unipc
