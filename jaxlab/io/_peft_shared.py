"""PEFT's types whose numbers are drawn, or trained, once for all layers."""

import functools as ft
import math
from typing import Any

import numpy as np

from .. import lowrank
from ..lowrank._torch_random import torch_random
from ..types import Adapter
from ._peft_kind import Config, Kind, Layer, Tensors

Peers = tuple[tuple[str, int, int], ...]


def _place(layer: Layer) -> tuple[int, Peers]:
    """A layer's place among all that are adapted; raises where they are not known."""
    for i, (path, _, _) in enumerate(layer.peers):
        if path == layer.path:
            return i, layer.peers
    raise ValueError(
        f"{layer.path!r}: the order of the layers is not known here; load the adapter "
        "onto the model"
    )


def _groups(config: Config, layer: Layer) -> tuple[int, int, bool]:
    """TinyLoRA: a layer's group, how many there are, and whether any is shared."""
    place, peers = _place(layer)
    count = max(1, round(len(peers) * (1 - config["weight_tying"])))
    size = max(1, len(peers) // count)
    return min(place // size, count - 1), count, count < len(peers)


def _tinylora(config: Config, layer: Layer) -> Adapter:
    _, count, tied = _groups(config, layer)
    rank = min(config["r"], layer.n, layer.m)
    return lowrank.tinylora(rank=rank, size=config["u"], groups=count if tied else None)


def _read_tinylora(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    a, b = tensors["tinylora_A"].T, tensors["tinylora_B"].T
    group, count, tied = _groups(config, layer)
    if "tinylora_P" in tensors or config["save_projection"]:
        p = tensors["tinylora_P"]
    else:
        place, rank = _place(layer)[0], a.shape[1]
        draw = torch_random(config["projection_seed"] + place).normal
        p = draw((config["u"], rank, rank), 1 / math.sqrt(rank))
    s = {"a": a, "b": b, "p": p}
    if not tied:
        return s | {"v": tensors[f"tinylora_v.{group}"]}
    every = [tensors[f"tinylora_v.{g}"] for g in range(count)]
    return s | {"v": np.stack(every), "group": np.int32(group)}


def _write_tinylora(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    group, _, tied = _groups(config, layer)
    out = {"tinylora_A": np.asarray(s["a"]).T, "tinylora_B": np.asarray(s["b"]).T}
    if config["save_projection"]:
        out["tinylora_P"] = np.asarray(s["p"])
    vectors = enumerate(np.asarray(s["v"])) if tied else [(group, np.asarray(s["v"]))]
    return out | {f"tinylora_v.{g}": v for g, v in vectors}


def _tinylora_fields(adapter: Adapter) -> Config:
    options = dict(adapter.config[1:])
    groups = options["groups"]
    if groups is not None and groups > 1:
        raise ValueError(
            f"PEFT's TINYLORA ties neighbours, not {groups} groups at will"
        )
    tying = {"weight_tying": 0.0 if groups is None else 1.0}
    return {"r": options["rank"], "u": options["size"], **tying}


TINYLORA = Kind(
    "TINYLORA",
    _tinylora,
    _read_tinylora,
    _write_tinylora,
    _tinylora_fields,
    frozenset(
        {"r", "u", "weight_tying", "projection_seed", "save_projection"}
        | {"init_v_bound", "init_weights"}
    ),
    ("v",),
    ("tinylora_v",),
)


@ft.lru_cache(maxsize=4)
def _choices(peers: Peers, rank: int, size: int, seed: int) -> tuple[Any, Any]:
    """Uni-LoRA: which entry each number is, of all layers in turn, and the scales."""
    total = sum(rank * (n + m) for _, n, m in peers)
    rng = np.random.default_rng(seed)
    index = np.repeat(np.arange(size), total // size)
    if total % size:
        extra = rng.choice(size, size=total % size, replace=False)
        index = np.concatenate([index, extra])
    rng.shuffle(index)
    counts = np.bincount(index, minlength=size).astype(np.float32)
    return index, 1 / np.sqrt(np.maximum(counts, 1))


def _drawn(config: Config, layer: Layer) -> dict[str, np.ndarray]:
    """The fixed entries of a layer that a file without them stands for."""
    (place, peers), rank = _place(layer), config["r"]
    sizes = config["theta_d_length"], config["proj_seed"]
    index, scales = _choices(peers, rank, *sizes)
    start = sum(rank * (n + m) for _, n, m in peers[:place])
    middle, end = start + rank * layer.n, start + rank * (layer.n + layer.m)
    a = index[start:middle].reshape(rank, layer.n).T
    b = index[middle:end].reshape(layer.m, rank).T
    return {"index_a": a, "index_b": b, "scale_a": scales[a], "scale_b": scales[b]}


SAVED = {
    "index_a": "unilora_indices_A",
    "index_b": "unilora_indices_B",
    "scale_a": "unilora_scales_A",
    "scale_b": "unilora_scales_B",
}


def _read_unilora(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    s = {"theta": tensors["unilora_theta_d"], "norm": np.float32(1)}
    if config["save_indices"]:
        return s | {ours: tensors[theirs].T for ours, theirs in SAVED.items()}
    return s | _drawn(config, layer)


def _write_unilora(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    del layer
    out = {"unilora_theta_d": np.asarray(s["theta"])}
    if not config["save_indices"]:
        return out
    arrays = {theirs: np.asarray(s[ours]).T for ours, theirs in SAVED.items()}
    for name, x in arrays.items():
        scale = "scales" in name
        out[name] = x * np.asarray(s["norm"]) if scale else x.astype(np.int64)
    return out


def _unilora_fields(adapter: Adapter) -> Config:
    options = dict(adapter.config[1:])
    sizes = {"r": options["rank"], "theta_d_length": options["size"]}
    return sizes | {"init_theta_d_bound": options["bound"], "save_indices": True}


def _unilora(config: Config, layer: Layer) -> Adapter:
    del layer
    sizes = {"rank": config["r"], "size": config["theta_d_length"]}
    return lowrank.unilora(**sizes, bound=config["init_theta_d_bound"])


UNILORA = Kind(
    "UNILORA",
    _unilora,
    _read_unilora,
    _write_unilora,
    _unilora_fields,
    frozenset(
        {"r", "proj_seed", "theta_d_length", "init_theta_d_bound", "init_weights"}
        | {"save_indices"}
    ),
    ("theta", "norm"),
    ("unilora_theta_d",),
)
