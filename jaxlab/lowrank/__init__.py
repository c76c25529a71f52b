"""Adapters: a small trained state beside the weights of any model."""

from ..types import Adapter as Adapter
from ._attach import Adapted as Adapted, attach as attach
from ._fold import (
    fold as fold,
    fold_error as fold_error,
    kept as kept,
    unfold as unfold,
)
from ._full import full as full
from ._lora import lora as lora
from ._operands import dense as dense, rows as rows
from ._state import Place as Place, Spec as Spec, State as State
