"""Stacked models in, one model out.

A method is a function of one stacked tree. Where its parameter is called `deltas` it
takes task vectors and returns one (`on_base` makes it a merge of models); where it is
called `models` it takes models and returns a model.
"""

from ._arcee_fusion import arcee_fusion as arcee_fusion
from ._base import add as add, on_base as on_base, task_vectors as task_vectors
from ._breadcrumbs import (
    breadcrumbs as breadcrumbs,
    breadcrumbs_ties as breadcrumbs_ties,
)
from ._dare import dare_linear as dare_linear, dare_ties as dare_ties
from ._della import della as della, della_linear as della_linear
from ._drop import drop as drop, drop_by_rank as drop_by_rank
from ._fuse import elect as elect, fuse as fuse
from ._karcher import karcher as karcher
from ._linear import average as average, linear as linear
from ._model_stock import model_stock as model_stock
from ._multislerp import multislerp as multislerp
from ._nearswap import nearswap as nearswap
from ._nuslerp import nuslerp as nuslerp
from ._passthrough import passthrough as passthrough
from ._ram import ram as ram, ramplus_tl as ramplus_tl
from ._sce import sce as sce
from ._slerp import slerp as slerp
from ._task_arithmetic import task_arithmetic as task_arithmetic
from ._ties import ties as ties
from ._trim import trim as trim, trim_outliers as trim_outliers
