"""Adapters: a small trained state beside the weights of any model."""

from ..types import Adapter as Adapter
from ._adalora import (
    Allocator as Allocator,
    Importance as Importance,
    adalora as adalora,
    adalora_allocator as adalora_allocator,
    adalora_penalty as adalora_penalty,
)
from ._adapted import Adapted as Adapted
from ._adapters import (
    DESIGNS as DESIGNS,
    Design as Design,
    bottleneck as bottleneck,
    modify as modify,
    parallel as parallel,
    scaled_parallel as scaled_parallel,
)
from ._algebra import linear as linear
from ._as_lora import as_lora as as_lora
from ._attach import attach as attach
from ._boft import boft as boft
from ._bone import bone as bone
from ._c3a import c3a as c3a
from ._compacter import compacter as compacter
from ._compress import compress as compress
from ._contracon import contracon as contracon, contracon_task as contracon_task
from ._corda import corda as corda
from ._core_space import combine as combine
from ._delora import delora as delora
from ._dora import dora as dora
from ._dr_tune import DRTune as DRTune, FeatureBank as FeatureBank, dr_tune as dr_tune
from ._dvpt import dvpt as dvpt
from ._eva import eva as eva, eva_ranks as eva_ranks
from ._extract import Extracted as Extracted, extract as extract
from ._factors import (
    Factors as Factors,
    factors as factors,
    from_factors as from_factors,
)
from ._fold import (
    fold as fold,
    fold_error as fold_error,
    kept as kept,
    unfold as unfold,
)
from ._fourierft import fourierft as fourierft
from ._full import full as full
from ._galore import fira as fira, galore as galore
from ._gralora import gralora as gralora
from ._hira import hira as hira
from ._hra import hra as hra
from ._hydra import hydra as hydra
from ._hyperformer import hyperformer as hyperformer
from ._ia3 import ia3 as ia3
from ._kasa import kasa as kasa, kasa_penalty as kasa_penalty
from ._loha import loha as loha
from ._lokr import lokr as lokr
from ._lora import lora as lora
from ._lora_ga import lora_ga as lora_ga
from ._lora_gain import lora_gain as lora_gain
from ._lora_plus import lora_plus as lora_plus
from ._many import choose as choose
from ._mask_tuning import (
    general_knowledge as general_knowledge,
    gradient_dropout as gradient_dropout,
    mask_tuning as mask_tuning,
)
from ._mica import mica as mica
from ._miss import miss as miss
from ._module import Module as Module
from ._moment_probing import moment_probing as moment_probing, psrp as psrp
from ._oft import oft as oft
from ._olora import olora as olora
from ._operands import dense as dense, rows as rows
from ._orthogonal_adaptation import (
    interference as interference,
    orthogonal_adaptation as orthogonal_adaptation,
)
from ._osf import osf as osf, preserve as preserve
from ._pela import (
    feature_distillation as feature_distillation,
    pela as pela,
    pela_rank as pela_rank,
    weight_perturbation as weight_perturbation,
)
from ._perp import (
    is_bias as is_bias,
    is_norm as is_norm,
    lora_prune as lora_prune,
    mask_lora as mask_lora,
    scale_lora as scale_lora,
)
from ._pissa import pissa as pissa
from ._prefix_attention import mam as mam, prefix_attention as prefix_attention
from ._prompt import (
    Prompt as Prompt,
    p_tuning as p_tuning,
    prefix_tuning as prefix_tuning,
    prepend as prepend,
    prompt_tuning as prompt_tuning,
)
from ._psoft import psoft as psoft
from ._pst import (
    prune_to as prune_to,
    pst as pst,
    sparsity_schedule as sparsity_schedule,
)
from ._quantize import dequantize as dequantize, loftq as loftq, quantize as quantize
from ._quantized import Quantized as Quantized
from ._randlora import randlora as randlora
from ._refactor import (
    balance as balance,
    refactorize as refactorize,
    reset_momentum as reset_momentum,
)
from ._reprogramming import (
    label_map as label_map,
    reprogram as reprogram,
    visual_prompt as visual_prompt,
)
from ._road import road as road
from ._sara import (
    sara as sara,
    sara_penalty as sara_penalty,
    sara_reselect as sara_reselect,
)
from ._scalearn import scalearn as scalearn, scalearn_sources as scalearn_sources
from ._separate import separate as separate
from ._shira import shira as shira
from ._stack import stack as stack, unstack as unstack
from ._state import Place as Place, Spec as Spec, State as State
from ._tinylora import tinylora as tinylora
from ._tlora import (
    tlora as tlora,
    tlora_identity as tlora_identity,
    tlora_orthogonal as tlora_orthogonal,
)
from ._tokens import trainable_tokens as trainable_tokens
from ._unilora import unilora as unilora
from ._vblora import vblora as vblora
from ._vera import vera as vera
from ._vl_adapter import Tasks as Tasks, of_task as of_task, share_tasks as share_tasks
from ._wara import (
    from_wavelet_bands as from_wavelet_bands,
    wara as wara,
    wavelet_bands as wavelet_bands,
)
from ._waveft import waveft as waveft
from ._xlora import (
    xlora as xlora,
    xlora_gates as xlora_gates,
    xlora_head as xlora_head,
    xlora_state as xlora_state,
)
