"""PEFT's VBLORA: its files may keep only what is mixed."""

from typing import Any

import numpy as np

from ._peft_kind import Config, Layer, Tensors

_INTEGERS = ((np.uint8, 2**8), (np.int16, 2**15), (np.int32, 2**31))


def _logits(held: Tensors, name: str, config: Config) -> np.ndarray:
    """Logits, or those of the k largest weights where a file has no others."""
    if not config["save_only_topk_weights"]:
        return held[name]
    some, chosen = held[f"{name}_topk_weights"], held[f"{name}_topk_indices"]
    weights = np.concatenate([some, 1 - some.sum(-1, keepdims=True)], -1)
    out = np.full((*chosen.shape[:-1], config["num_vectors"]), -np.inf, some.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.put_along_axis(out, chosen.astype(np.int64), np.log(weights), -1)
    return out


def _topk(name: str, logits: np.ndarray, config: Config) -> Tensors:
    """The tensors of logits, or of their k largest alone."""
    if not config["save_only_topk_weights"]:
        return {name: logits}
    chosen = np.argsort(-logits, -1, kind="stable")[..., : config["topk"]]
    largest = np.take_along_axis(logits, chosen, -1)
    weights = np.exp(largest - largest[..., :1])
    weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
    count = config["num_vectors"]
    small = next((d for d, most in _INTEGERS if count < most), np.int64)
    indices = chosen.astype(small)
    return {f"{name}_topk_indices": indices, f"{name}_topk_weights": weights}


def read(held: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    """The entries of one layer, logits or their top k, and the shared bank."""
    del layer
    a, b = (_logits(held, f"vblora_logits_{side}", config) for side in "AB")
    bank = held["vblora_vector_bank"]
    return {"logits_a": a, "logits_b": b.swapaxes(0, 1), "bank": bank}


def write(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    """The tensors of one layer, and the shared bank: the inverse of `read`."""
    del layer
    a, b = (np.asarray(s[name]) for name in ("logits_a", "logits_b"))
    out = _topk("vblora_logits_A", a, config)
    out |= _topk("vblora_logits_B", b.swapaxes(0, 1), config)
    return out | {"vblora_vector_bank": np.asarray(s["bank"])}
