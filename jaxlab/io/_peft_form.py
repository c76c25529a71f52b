"""Linear layers, convolutions and embeddings: PEFT's tensors, as of one linear layer.

PEFT stores the factors of a convolution `[out, in, *kernel]` as two convolutions, and
those of an embedding under names of their own. A matrix `[n, m]` counts the rows of a
convolution as `(in, *kernel)` in torch, as `(*kernel, in)` in an HWIO leaf.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..rewrite import Use
from ._peft_kind import Tensors

_FACTORS = {"LORA": ("lora_A.weight",), "LOHA": ("hada_w1_b", "hada_w2_b")}
_TABLE = {"lora_embedding_A": "lora_A.weight", "lora_embedding_B": "lora_B.weight"}
_DORA = "lora_magnitude_vector"


class Form(NamedTuple):
    """What a layer is."""

    kind: str
    """"linear", "conv", "embedding", or "vector", which is no matrix."""
    kernel: tuple[int, ...] = ()
    """Of a convolution: (in, *kernel)."""
    torch: bool = True
    """Whether a convolution's rows count `in` first."""
    turned: bool = True
    """Whether a linear weight is `[out, in]`, as in most of torch."""


def of_use(use: Use | None) -> Form:
    """The form of a layer, from how the program uses its weight."""
    if use is None:
        return Form("vector")
    if use.primitive == "gather":
        return Form("embedding")
    if use.primitive != "conv_general_dilated":
        return Form("linear")
    if use.batch:
        raise ValueError(f"{use.path!r} is a grouped convolution, which PEFT has not")
    sizes = tuple(use.shape[a] for a in use.contracted)
    first = use.free[0] < use.contracted[0]
    return Form("conv", sizes if first else (sizes[-1], *sizes[:-1]), first)


def of_shape(shape: tuple[int, ...], names: Any, *, fan_in_fan_out: bool) -> Form:
    """The form of a layer, from its torch weight and PEFT's names of its tensors."""
    if len(shape) < 2:
        return Form("vector")
    if any(name in _TABLE for name in names):
        return Form("embedding")
    if len(shape) > 2:
        return Form("conv", tuple(shape[1:]))
    return Form("linear", turned=not fan_in_fan_out)


def sides(shape: tuple[int, ...], form: Form) -> tuple[int, int]:
    """The n and m of a torch weight of some shape."""
    if form.kind == "conv" or (form.turned and form.kind == "linear"):
        return math.prod(shape[1:]), shape[0]
    return shape[0], shape[1]


def matrix(w: Any, form: Form) -> Any:
    """The matrix [n, m] of a torch weight."""
    if form.kind == "conv":
        return _rows(w.reshape(w.shape[0], -1), form, inverse=False).T
    return w.T if form.kind == "linear" and form.turned else w


def weight(m: Any, form: Form) -> Any:
    """The torch weight of a matrix [n, m]."""
    if form.kind == "conv":
        return _rows(m.T, form, inverse=True).reshape(m.shape[1], *form.kernel)
    return m.T if form.kind == "linear" and form.turned else m


def flat(tensors: Tensors, form: Form, kind: str) -> Tensors:
    """PEFT's tensors of any layer, as those of a linear one; raises where it cannot."""
    out = {f"{_DORA}.weight" if n == _DORA else n: x for n, x in tensors.items()}
    _check(form, kind)
    if form.kind == "embedding":
        return {_TABLE.get(n, n): x for n, x in out.items()}
    if form.kind == "conv":
        for name in _FACTORS[kind]:
            if name in out:
                x = out[name]
                out[name] = _rows(x.reshape(x.shape[0], -1), form, inverse=False)
        if "lora_B.weight" in out:
            out["lora_B.weight"] = out["lora_B.weight"].reshape(
                out["lora_B.weight"].shape[:2]
            )
        if f"{_DORA}.weight" in out:
            out[f"{_DORA}.weight"] = out[f"{_DORA}.weight"].reshape(-1)
    return out


def shaped(tensors: Tensors, form: Form, kind: str) -> Tensors:
    """The inverse of `flat`."""
    _check(form, kind)
    out = dict(tensors)
    if form.kind == "embedding":
        back = {ours: name for name, ours in _TABLE.items()}
        out = {back.get(n, n): x for n, x in out.items()}
    if form.kind == "conv":
        for name in _FACTORS[kind]:
            if name in out:
                x = _rows(out[name], form, inverse=True)
                out[name] = x.reshape(-1, *form.kernel) if kind == "LORA" else x
        ones = (1,) * (len(form.kernel) - 1)
        if "lora_B.weight" in out:
            x = out["lora_B.weight"]
            out["lora_B.weight"] = x.reshape(*x.shape, *ones)
        if f"{_DORA}.weight" in out:
            out[f"{_DORA}.weight"] = out[f"{_DORA}.weight"].reshape(1, -1, *ones)
    return {_DORA if n == f"{_DORA}.weight" else n: x for n, x in out.items()}


def _check(form: Form, kind: str) -> None:
    """Raises where a type is not read on a layer of this form."""
    if form.kind == "conv" and kind not in _FACTORS:
        raise ValueError(f"{kind} of a convolution is not implemented")
    if form.kind == "embedding" and kind != "LORA":
        raise ValueError(f"{kind} of an embedding is not implemented")


def _rows(x: Any, form: Form, *, inverse: bool) -> Any:
    """Columns `[k, n]` of torch's order in that of the leaf, or back."""
    if form.torch:
        return x
    inner, *kernel = form.kernel
    if inverse:
        x = x.reshape(-1, *kernel, inner)
        return np.moveaxis(x, -1, 1).reshape(-1, math.prod(form.kernel))
    x = x.reshape(-1, inner, *kernel)
    return np.moveaxis(x, 1, -1).reshape(-1, math.prod(form.kernel))
