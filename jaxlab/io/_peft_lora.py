"""PEFT's LORA, with its variants, and ADALORA."""

import math
from typing import Any

import numpy as np

from .. import lowrank
from ..types import Adapter
from ._peft_kind import Config, Kind, Layer, Tensors

UNTOUCHED = (True, False, "gaussian", "orthogonal", "eva")  # the base is as it was
REMADE = {"pissa": lowrank.pissa, "olora": lowrank.olora, "mica": lowrank.mica}
BETAS = {"beta": 1e-4, "gamma": 1e-3}  # PEFT's, of KaSA's penalties


def _lora(config: Config, layer: Layer) -> Adapter:
    """The variant that the fields name; raises where the base alone cannot say."""
    start = config["init_lora_weights"]
    start = start.lower() if isinstance(start, str) else start
    options = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "rslora": config["use_rslora"],
    }
    other = {"use_dora": config["use_dora"], "kasa_config": config["kasa_config"]}
    used = [name for name, value in other.items() if value]
    if start not in UNTOUCHED and (used or start not in REMADE):
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']!r}"
            f"{' with ' + used[0] if used else ''} changed the base of {layer.path!r}, "
            "and the adapter does not say how: save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if len(used) > 1:
        raise ValueError(f"{used[0]} with {used[1]} at {layer.path!r}")
    if config["use_dora"]:
        return lowrank.dora(**options)
    if config["kasa_config"]:
        return lowrank.kasa(**options)
    if start in REMADE:
        return REMADE[start](**options)
    how: Any = start if start in ("gaussian", "orthogonal") else "uniform"
    return lowrank.lora(**options, bias=config["lora_bias"], start=how)


def _lora_fields(adapter: Adapter) -> Config:
    """The fields of a variant; of those PEFT could not start again, as plain LoRA."""
    name, options = adapter.config[0], dict(adapter.config[1:])
    rank, scale, rslora = options["rank"], options["scale"], options["rslora"]
    start = options.get("start", name)
    if name in ("corda", "lora_ga") or options.get("niter") is not None:
        rank, rslora, start = 2 * rank, False, True
    known = (*REMADE, "gaussian", "orthogonal")
    return {
        "r": rank,
        "lora_alpha": _alpha(scale * (math.sqrt(rank) if rslora else rank)),
        "use_rslora": rslora,
        "use_dora": name == "dora",
        "lora_bias": options.get("bias", False),
        "init_lora_weights": start if start in known else True,
        "kasa_config": BETAS if name == "kasa" else None,
    }


def _alpha(value: float) -> float | int:
    """A numerator, whole where it is but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _names(config: Config) -> dict[str, str]:
    """The tensor of each entry."""
    names = {"a": "lora_A.weight", "b": "lora_B.weight"}
    names |= {"bias": "lora_B.bias"} if config["lora_bias"] else {}
    names |= {"magnitude": "lora_magnitude_vector.weight"} if config["use_dora"] else {}
    return names | ({"diag": "lora_diag"} if config["kasa_config"] else {})


def _read_lora(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    """All that is trained; what is fixed is made from the base."""
    del layer
    return {entry: tensors[name].T for entry, name in _names(config).items()}


def _write_lora(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    """The factors; with the fixed ones, where PEFT cannot make those from the base."""
    del layer
    s = {entry: np.asarray(v) for entry, v in s.items()}
    remade = config["init_lora_weights"] in REMADE or config["kasa_config"]
    if "a0" in s and not remade:
        s["a"] = np.concatenate([s["a"], s["a0"]], 1)
        s["b"] = np.concatenate([s["b"], -s["b0"]], 0)
    return {name: s[entry].T for entry, name in _names(config).items()}


def _adalora(config: Config, layer: Layer) -> Adapter:
    del layer
    rank, alpha = config["init_r"], config["lora_alpha"]
    top = alpha if alpha > 0 else rank
    return lowrank.adalora(rank=rank, alpha=rank * top / (rank + 1e-5))


def _adalora_fields(adapter: Adapter) -> Config:
    options = dict(adapter.config[1:])
    rank, scale = options["rank"], options["scale"]
    alpha = _alpha(scale * (rank + 1e-5))
    return {"init_r": rank, "target_r": rank, "lora_alpha": alpha, "total_step": 1}


def _kept(config: Config, layer: Layer) -> np.ndarray:
    """Which triplets PEFT left; it stores no others."""
    masks = config["rank_pattern"] or {}
    every = [True] * config["init_r"]
    return np.asarray(masks.get(f"{layer.path}.lora_E", every), bool)


def _read_adalora(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    """The triplets, those that were pruned as zeros."""
    kept = _kept(config, layer)

    def spread(name: str) -> np.ndarray:
        x = tensors[name].T if name == "lora_B" else tensors[name]
        out = np.zeros((len(kept), *x.shape[1:]), x.dtype)
        out[kept] = x
        return out

    a, b, diag = (spread(name) for name in ("lora_A", "lora_B", "lora_E"))
    return {"a": a.T, "b": b, "diag": diag[:, 0]}


def _write_adalora(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    kept = _kept(config, layer)
    a, b, diag = (np.asarray(s[name]) for name in ("a", "b", "diag"))
    return {"lora_A": a.T[kept], "lora_B": b.T[:, kept], "lora_E": diag[kept, None]}


STARTED = {"init_lora_weights", "eva_config", "corda_config", "lora_ga_config"}
VARIED = {"use_rslora", "use_dora", "lora_bias", "kasa_config"}
SCHEDULE = {"target_r", "tinit", "tfinal", "deltaT", "total_step", "beta1", "beta2"}
KINDS = {
    "LORA": Kind(
        "LORA",
        _lora,
        _read_lora,
        _write_lora,
        _lora_fields,
        frozenset({"r", "lora_alpha"} | STARTED | VARIED),
    ),
    "ADALORA": Kind(
        "ADALORA",
        _adalora,
        _read_adalora,
        _write_adalora,
        _adalora_fields,
        frozenset({"r", "init_r", "lora_alpha", "orth_reg_weight"} | SCHEDULE),
    ),
}
