"""PEFT's types that are neither LORA's relatives nor made of random projections."""

from collections.abc import Callable
import re
from typing import Any

import numpy as np

from .. import lowrank
from ..types import Adapter
from ._peft_kind import Config, Kind, Layer, Tensors
from ._peft_psoft import PSOFT
from ._peft_shared import TINYLORA, UNILORA


def _kind(
    name: str,
    adapter: Callable[[Config, Layer], Adapter],
    fields: Callable[..., Config],
    names: dict[str, str],
    implements: str,
) -> Kind:
    """A type whose tensors `names` are our entries as they are, or turned if "T"."""
    entries = {ours: theirs.split() for ours, theirs in names.items()}

    def read(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
        del layer
        held = {
            ours: tensors[theirs].T if turned else tensors[theirs]
            for ours, (theirs, *turned) in entries.items()
            if _has(config, ours)
        }
        return held | ({"bound": held["bound"][0]} if "bound" in held else {})

    def write(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
        del layer
        s = s | ({"bound": np.reshape(s["bound"], 1)} if "bound" in s else {})
        return {
            theirs: np.asarray(s[ours]).T if turned else np.asarray(s[ours])
            for ours, (theirs, *turned) in entries.items()
            if _has(config, ours)
        }

    def our_fields(x: Adapter) -> Config:
        return fields(**dict(x.config[1:]))

    started = {"init_weights", *implements.split()}
    return Kind(name, adapter, read, write, our_fields, frozenset(started))


def _has(config: Config, entry: str) -> bool:
    """Whether the state of these fields has an entry: GraLoRA's LoRA may lack."""
    return "whole" not in entry or bool(config["hybrid_r"])


def _is_feedforward(config: Config, layer: Layer) -> bool:
    """Whether the input of a layer is scaled."""
    chosen = config["feedforward_modules"]
    if isinstance(chosen, str):
        return re.fullmatch(chosen, layer.path) is not None
    return any(layer.path.endswith(name) for name in chosen or ())


def _write_ia3(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    scale = np.asarray(s["scale"])
    return {"ia3_l": scale[None] if _is_feedforward(config, layer) else scale[:, None]}


def _ia3_fields(adapter: Adapter) -> Config:
    return {"feedforward_modules": ".*" if adapter.config[1][1] else []}


IA3 = Kind(
    "IA3",
    lambda c, layer: lowrank.ia3(feedforward=_is_feedforward(c, layer)),
    lambda tensors, *_: {"scale": tensors["ia3_l"].reshape(-1)},
    _write_ia3,
    _ia3_fields,
    frozenset({"feedforward_modules", "init_ia3_weights"}),
)


def _miss(config: Config, layer: Layer) -> Adapter:
    del layer
    start = config["init_weights"]
    mode: Any = start if start in ("bat", "mini") else "miss"
    return lowrank.miss(rank=config["r"], mode=mode, width=config["mini_r"])


def _miss_fields(rank: int, mode: str, width: int) -> Config:
    start = True if mode == "miss" else mode
    return {"r": rank, "init_weights": start, "mini_r": width}


def _road(config: Config, layer: Layer) -> Adapter:
    del layer
    variant: Any = int(config["variant"].removeprefix("road_"))
    return lowrank.road(variant=variant, group=config["group_size"])


def _read_shira(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    """The values and, where the file has them, their places; else the seed says."""
    s = {"values": tensors["shira_weight"]}
    if "shira_indices" in tensors:
        columns, rows = tensors["shira_indices"]
        return s | {"rows": rows, "columns": columns}
    if config["mask_type"] != "random":
        raise ValueError(f"{layer.path!r} has a mask of its own, but no shira_indices")
    return s


def _write_shira(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    del config, layer
    out = {"shira_weight": np.asarray(s["values"])}
    if "rows" in s:
        places = [np.asarray(s[name], np.int32) for name in ("columns", "rows")]
        out["shira_indices"] = np.stack(places)
    return out


def _shira_fields(adapter: Adapter) -> Config:
    options = dict(adapter.config[1:])
    return {"r": options["rank"], "random_seed": options["seed"]}


SHIRA = Kind(
    "SHIRA",
    lambda c, _: lowrank.shira(rank=c["r"], seed=c["random_seed"]),
    _read_shira,
    _write_shira,
    _shira_fields,
    frozenset({"r", "mask_type", "random_seed", "init_weights"}),
)


def _c3a(config: Config, layer: Layer) -> Adapter:
    del layer
    start = config["init_weights"]
    start = "zeros" if start is True else start or "xavier_uniform"
    return lowrank.c3a(block=config["block_size"], start=start)


def _c3a_fields(block: int, start: str) -> Config:
    return {"block_size": block, "init_weights": True if start == "zeros" else start}


def _gralora(config: Config, layer: Layer) -> Adapter:
    del layer
    return lowrank.gralora(
        rank=config["r"],
        blocks=config["gralora_k"],
        hybrid=config["hybrid_r"],
        alpha=config["alpha"],
    )


def _gralora_fields(rank: int, blocks: int, hybrid: int, scale: float) -> Config:
    sizes = {"r": rank, "gralora_k": blocks, "hybrid_r": hybrid}
    return sizes | {"alpha": scale * (rank + hybrid)}


def _osf(config: Config, layer: Layer) -> Adapter:
    keep = config["effective_rank"]
    for pattern, value in (config["rank_pattern"] or {}).items():
        if re.search(pattern, layer.path):
            keep = value
            break
    if keep is None or (isinstance(keep, float) and 0 < keep <= 1):
        return lowrank.osf(keep=keep)
    return lowrank.osf(keep=int(keep))


KINDS = {
    "IA3": IA3,
    "MISS": _kind("MISS", _miss, _miss_fields, {"d": "miss_block"}, "r mini_r"),
    "SHIRA": SHIRA,
    "C3A": _kind("C3A", _c3a, _c3a_fields, {"kernel": "c3a_kernel"}, "block_size"),
    "ROAD": _kind(
        "ROAD",
        _road,
        lambda variant, group: {"variant": f"road_{variant}", "group_size": group},
        {"theta": "road_theta", "alpha": "road_alpha"},
        "variant group_size",
    ),
    "DELORA": _kind(
        "DELORA",
        lambda c, _: lowrank.delora(rank=c["r"], bound=c["delora_lambda"]),
        lambda rank, bound: {"r": rank, "delora_lambda": bound},
        {
            "a": "delora_A T",
            "b": "delora_B T",
            "bound": "delora_lambda",
            "norms": "delora_w_norm",
        },
        "r delora_lambda",
    ),
    "GRALORA": _kind(
        "GRALORA",
        _gralora,
        _gralora_fields,
        {
            "a": "gralora_A",
            "b": "gralora_B",
            "a_whole": "gralora_A_general.weight T",
            "b_whole": "gralora_B_general.weight T",
        },
        "r hybrid_r alpha gralora_k",
    ),
    "LN_TUNING": _kind(
        "LN_TUNING",
        lambda *_: lowrank.full(),
        dict,
        {"w": "ln_tuning_layers.weight T"},
        "",
    ),
    "HIRA": _kind(
        "HIRA",
        lambda c, _: lowrank.hira(rank=c["r"]),
        lambda rank: {"r": rank},
        {"a": "hira_A T", "b": "hira_B T"},
        "r",
    ),
    "TINYLORA": TINYLORA,
    "PSOFT": PSOFT,
    "UNILORA": UNILORA,
    "OSF": _kind(
        "OSF",
        _osf,
        lambda keep: {"effective_rank": keep},
        {
            "a": "osf_svd_params.V_low T",
            "d": "osf_svd_params.S_low",
            "b": "osf_svd_params.U_low T",
        },
        "effective_rank rank_pattern",
    ),
    "TRAINABLE_TOKENS": _kind(
        "TRAINABLE_TOKENS",
        lambda c, _: lowrank.trainable_tokens(indices=tuple(c["token_indices"])),
        lambda indices: {"token_indices": list(indices)},
        {"rows": "trainable_tokens_delta"},
        "token_indices",
    ),
}
