"""LoRA files of diffusion models: kohya, LyCORIS, diffusers, cloneofsimo; PEFT's names.

A file is read as parts, one per module, whose tensors have PEFT's names.
"""

from collections.abc import Mapping
import re

import numpy as np

from . import _kohya_names as names
from ._adapter_part import Part, Parts, make_part
from ._checkpoint import Checkpoint, Tensor
from ._errors import FormatError, refuse
from ._peft_kind import Tensors

_LORA = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "mid": "mid",
}
_HADA = frozenset("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2".split())
_LOKR = frozenset("w1 w1_a w1_b w2 w2_a w2_b t2".split())
_MAGNITUDE = "lora_magnitude_vector"
_FORMS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?P<kohya>lora_\w+)\.lora_(?P<lora>down|up|mid)\.weight",
        r"(?P<kohya>lora_\w+)\.(?P<own>hada_\w+|lokr_\w+|alpha|dora_scale)",
        r"(?P<new>.+)\.lora_(?P<lora>[AB])(?:\.\w+)?\.weight",
        r"(?P<new>.+)\.(?P<own>lora_magnitude_vector)(?:\.\w+)?(?:\.weight)?",
        r"(?P<new>.+)\.lora_linear_layer\.(?P<lora>down|up)\.weight",
        r"(?P<old>.+)[._]lora\.(?P<lora>down|up)\.weight",
        r"(?P<old>.+)_lora\.(?P<own>alpha)",
        r"(?P<new>.+?)(?:\.lora|\.lora_linear_layer)?\.(?P<own>alpha)",
        r"(?P<number>(?:\w+:)?\d+)[:.](?P<lora>down|up)",
    )
)


def read(checkpoint: Checkpoint) -> Parts:
    """Reads an open file of adapters.

    Raises:
      FormatError: a tensor of no known form, a factor that is missing, or factors that
        do not fit together; names file and tensor.
    """
    raw: dict[tuple[str, str], dict[str, Tensor]] = {}
    others: dict[str, tuple[int, ...]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.name.startswith("<") and tensor.name.endswith(">"):
            others[tensor.name] = tensor.shape
            continue
        form, module, entry = _matched(tensor)
        mine = raw.setdefault((form, module), {})
        if entry in mine:
            raise refuse(tensor.file, f"{entry} is there twice", tensor=tensor.name)
        mine[entry] = tensor
    counts: dict[str, int] = {}
    for form, module in raw:
        if form == "number":
            component = _component(module)
            counts[component] = counts.get(component, 0) + 1
    components: dict[str, dict[str, Part]] = {}
    for (form, module), tensors in raw.items():
        first = next(iter(tensors.values()))
        try:
            component, name = _place(form, module, counts)
        except ValueError as error:
            raise refuse(first.file, str(error), tensor=first.name) from None
        mine = components.setdefault(component, {})
        if name in mine:
            why = f"{name!r} of the {component} is there twice"
            raise refuse(first.file, why, tensor=first.name)
        mine[name] = _part(tensors, first)
    found = {form for form, _ in raw}
    kind = {"kohya": "kohya", "number": "cloneofsimo"}.get(min(found, default=""))
    if not raw or ("kohya" in found and len(found) > 1):
        why = (
            "no adapters" if not raw else "names of kohya's and of diffusers' are mixed"
        )
        raise refuse(checkpoint.path, why)
    return Parts(kind or "diffusers", components, others)


def to_kohya(components: Mapping[str, Mapping[str, Part]]) -> dict[str, np.ndarray]:
    """The tensors of a kohya file."""
    out: dict[str, np.ndarray] = {}
    several = "text_encoder_2" in components
    for component, parts in components.items():
        for module, part in parts.items():
            name = names.to_kohya(component, module, several=several)
            part = _scaled(module, part)
            for entry, x in part.tensors.items():
                if entry == _MAGNITUDE:
                    out[f"{name}.dora_scale"] = x.reshape(x.size, *(1,) * _ndim(part))
                else:
                    back = {"lora_A.weight": "lora_down.weight"}
                    back |= {"lora_B.weight": "lora_up.weight"}
                    out[f"{name}.{back.get(entry, entry)}"] = x
            out[f"{name}.alpha"] = np.asarray(part.alpha, np.float32)
    return out


def to_diffusers(components: Mapping[str, Mapping[str, Part]]) -> dict[str, np.ndarray]:
    """The tensors of a diffusers file, which has no alpha: B takes the scale.

    Raises:
      ValueError: a part that is not LoRA; names it.
    """
    out: dict[str, np.ndarray] = {}
    for component, parts in components.items():
        for module, part in parts.items():
            if "lora_B.bias" in part.tensors:
                raise ValueError(f"{module!r} has a bias, which diffusers has not")
            if part.kind != "LORA":
                raise ValueError(
                    f"{module!r} is {part.kind}, which diffusers has not; kohya and "
                    "PEFT files have it"
                )
            for entry, x in part.tensors.items():
                if entry == "lora_B.weight" and part.alpha != part.rank:
                    wide = x.astype(np.float32) * (part.alpha / part.rank)
                    x = wide.astype(x.dtype)
                ending = ".weight" if entry == _MAGNITUDE else ""
                out[f"{component}.{module}.{entry}{ending}"] = x
    return out


def _matched(tensor: Tensor) -> tuple[str, str, str]:
    """The form of a name, the module in it, and the entry by PEFT's name."""
    for pattern in _FORMS:
        match = pattern.fullmatch(tensor.name)
        if match is None:
            continue
        found = {k: v for k, v in match.groupdict().items() if v is not None}
        entry = _LORA.get(found.pop("lora", ""), found.pop("own", ""))
        ((form, module),) = found.items()
        entry = _MAGNITUDE if entry == "dora_scale" else entry
        known = entry in _HADA or entry.removeprefix("lokr_") in _LOKR
        if known or entry in (*_LORA.values(), _MAGNITUDE, "alpha"):
            return form, module, entry
    raise refuse(tensor.file, "is no tensor of a known adapter", tensor=tensor.name)


def _component(module: str) -> str:
    """The component of a numbered module; files of arrays alone are of the UNet."""
    return module.partition(":")[0] if ":" in module else "unet"


def _place(form: str, module: str, counts: Mapping[str, int]) -> tuple[str, str]:
    """Component and module of a name."""
    if form == "kohya":
        return names.of_kohya(module)
    if form == "number":
        component = _component(module)
        every = names.numbered(component, counts[component])
        at = int(module.rpartition(":")[2])
        if at >= len(every):
            raise ValueError(f"module {at} of {len(every)}")
        return component, every[at]
    return names.of_diffusers(module, old=form == "old")


def _part(held: Mapping[str, Tensor], first: Tensor) -> Part:
    """The part that one module's tensors make."""
    tensors = {entry: tensor.read() for entry, tensor in held.items()}
    alpha = tensors.pop("alpha", None)
    mid = tensors.pop("mid", None)
    if mid is not None and "lora_A.weight" in tensors:  # a kernel between the factors
        down = tensors["lora_A.weight"].reshape(mid.shape[1], -1)
        wide = np.einsum("rk...,ki->ri...", mid.astype(np.float32), down.astype("f4"))
        tensors["lora_A.weight"] = wide.astype(down.dtype)
    kind = "LORA"
    for name, prefix in (("LOHA", "hada_"), ("LOKR", "lokr_")):
        kind = name if any(n.startswith(prefix) for n in tensors) else kind
    try:
        if _MAGNITUDE in tensors:
            tensors[_MAGNITUDE] = _magnitude(kind, tensors)
        return make_part(kind, tensors, None if alpha is None else float(alpha))
    except KeyError as error:
        why = f"the module of this tensor has no {error.args[0]}"
        raise refuse(first.file, why, tensor=first.name) from None
    except FormatError:
        raise
    except (ValueError, TypeError) as error:
        raise refuse(first.file, str(error), tensor=first.name) from None


def _magnitude(kind: str, tensors: Tensors) -> np.ndarray:
    """DoRA's magnitudes as a vector, one per output."""
    x = tensors[_MAGNITUDE]
    if kind != "LORA" or x.size != tensors["lora_B.weight"].shape[0]:
        raise ValueError(f"DoRA magnitudes of shape {x.shape} are not one per output")
    return x.reshape(-1)


def _scaled(module: str, part: Part) -> Part:
    """A part whose scale LyCORIS reads as it is: 1 of two whole LoKr factors."""
    if "lora_B.bias" in part.tensors:
        raise ValueError(f"{module!r} has a bias, which only PEFT's own format holds")
    whole = part.kind == "LOKR" and {"lokr_w1", "lokr_w2"} <= part.tensors.keys()
    if not whole or part.alpha == part.rank:
        return part
    w = part.tensors["lokr_w2"]
    scaled = (w.astype(np.float32) * (part.alpha / part.rank)).astype(w.dtype)
    return part._replace(
        tensors=part.tensors | {"lokr_w2": scaled}, alpha=float(part.rank)
    )


def _ndim(part: Part) -> int:
    return part.tensors["lora_A.weight"].ndim - 1
