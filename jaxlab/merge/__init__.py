"""Stacked models in, one model out.

A method is a function of one stacked tree. Where its parameter is called `deltas` it
takes task vectors and returns one (`on_base` makes it a merge of models); where it is
called `models` it takes models and returns a model.
"""

from ._adamerging import adamerging as adamerging
from ._arcee_fusion import arcee_fusion as arcee_fusion
from ._atlas import atlas as atlas
from ._base import add as add, on_base as on_base, task_vectors as task_vectors
from ._bitdelta import bitdelta as bitdelta, bitdelta_restore as bitdelta_restore
from ._blocks import (
    anisotropic as anisotropic,
    by_leaf as by_leaf,
    coefficients as coefficients,
    random_parts as random_parts,
)
from ._breadcrumbs import (
    breadcrumbs as breadcrumbs,
    breadcrumbs_ties as breadcrumbs_ties,
)
from ._compeft import compeft as compeft, ternary as ternary
from ._dare import dare_linear as dare_linear, dare_ties as dare_ties
from ._della import della as della, della_linear as della_linear
from ._delta_guided import delta_guided as delta_guided
from ._doge_ta import doge_ta as doge_ta
from ._drop import drop as drop, drop_by_rank as drop_by_rank
from ._emr import emr as emr, emr_task as emr_task
from ._expo import expo as expo
from ._fisher import fisher as fisher
from ._frank_wolfe import frank_wolfe as frank_wolfe
from ._fuse import elect as elect, fuse as fuse
from ._isotropic import iso_c as iso_c, iso_cts as iso_cts
from ._karcher import karcher as karcher
from ._knots import knots as knots
from ._learn import learn as learn, score as score
from ._linear import average as average, linear as linear
from ._magmax import magmax as magmax
from ._model_stock import model_stock as model_stock
from ._multislerp import multislerp as multislerp
from ._nearswap import nearswap as nearswap
from ._nuslerp import nuslerp as nuslerp
from ._objectives import (
    entropy as entropy,
    most_confident as most_confident,
    pseudo_label as pseudo_label,
)
from ._opcm import opcm as opcm, opcm_init as opcm_init, opcm_step as opcm_step
from ._passthrough import passthrough as passthrough
from ._periodic import periodic as periodic
from ._ram import ram as ram, ramplus_tl as ramplus_tl
from ._recalibrate import recalibrate as recalibrate
from ._regmean import regmean as regmean
from ._regmean_plusplus import regmean_plusplus as regmean_plusplus
from ._rws import rws as rws, rws_patch as rws_patch, rws_unpatch as rws_unpatch
from ._rws_quantize import (
    rws_dequantize as rws_dequantize,
    rws_quantize as rws_quantize,
)
from ._sce import sce as sce
from ._search import search as search
from ._slerp import slerp as slerp
from ._soups import greedy_soup as greedy_soup, learned_soup as learned_soup
from ._svc import svc as svc
from ._tall_masks import (
    consensus_ta as consensus_ta,
    consensus_ties as consensus_ties,
    tall_masks as tall_masks,
)
from ._task_arithmetic import task_arithmetic as task_arithmetic
from ._ternary import (
    ternary_dot as ternary_dot,
    ternary_restore as ternary_restore,
    ternary_sum as ternary_sum,
    ternary_vote as ternary_vote,
)
from ._ties import ties as ties
from ._transfer import recycle as recycle, transfer as transfer
from ._trim import trim as trim, trim_outliers as trim_outliers
from ._trust_region import trust_region as trust_region
from ._tsv import tsv_c as tsv_c, tsv_expand as tsv_expand, tsv_m as tsv_m
from ._wise_ft import wise_ft as wise_ft
from ._wudi import wudi as wudi
