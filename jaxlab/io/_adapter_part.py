"""The adapter of one module, as files hold it: LoRA, LoHa or LoKr.

It is worth (alpha / r) B A, (alpha / r) (B1 A1) * (B2 A2), or (alpha / r) kron(W1, W2).
"""

from typing import NamedTuple

import numpy as np

from ._peft_kind import Tensors


class Part(NamedTuple):
    """The adapter of one module."""

    kind: str
    """PEFT's type: LORA, LOHA or LOKR."""
    tensors: Tensors
    """By PEFT's names."""
    rank: int
    alpha: float


class Parts(NamedTuple):
    """A file of adapters."""

    format: str
    """"kohya", "diffusers", "cloneofsimo" or "peft"."""
    components: dict[str, dict[str, Part]]
    """By component ("unet", "text_encoder"; "" where there is only one model), then by
    module."""
    others: dict[str, tuple[int, ...]]
    """Tensors that are no adapters, such as learnt words: their shapes."""


def norm(part: Part) -> float:
    r"""The Frobenius norm of the update, from its factors alone; of DoRA, of B A."""
    t = {n: np.asarray(x, np.float64) for n, x in part.tensors.items()}
    scale = part.alpha / part.rank
    if part.kind == "LORA":
        a = t["lora_A.weight"].reshape(len(t["lora_A.weight"]), -1)
        b = t["lora_B.weight"].reshape(-1, len(a))
        return abs(scale) * float(np.sqrt(max(np.sum((b.T @ b) * (a @ a.T)), 0)))
    if part.kind == "LOHA":
        if "hada_t1" in t:
            return float("nan")
        one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2))
        return abs(scale) * float(np.linalg.norm(one * two))
    if "lokr_t2" in t:
        return float("nan")
    whole = lambda i: t.get(f"lokr_w{i}")
    sides = [
        x if (x := whole(i)) is not None else t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"]
        for i in (1, 2)
    ]
    return abs(scale) * float(np.prod([np.linalg.norm(x.ravel()) for x in sides]))


def make_part(kind: str, tensors: Tensors, alpha: float | None) -> Part:
    """A part, its rank read off its factors; raises KeyError on one that is missing."""
    if kind == "LORA":
        rank = tensors["lora_A.weight"].shape[0]
        if tensors["lora_B.weight"].shape[1] != rank:
            a, b = (tensors[f"lora_{x}.weight"].shape for x in "AB")
            raise ValueError(f"factors of shape {a} and {b} do not fit together")
    elif kind == "LOHA":
        for i in (1, 2):
            a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
            if "hada_t1" not in tensors and a.shape[1] != b.shape[0]:
                why = f"factors of shape {a.shape} and {b.shape} do not fit together"
                raise ValueError(why)
        rank = tensors["hada_w1_b"].shape[0]
    else:
        low = [x for n, x in tensors.items() if n.endswith("_b")]
        for i in (1, 2):
            if f"lokr_w{i}" not in tensors:
                _ = tensors[f"lokr_w{i}_a"], tensors[f"lokr_w{i}_b"]
        if not low:  # LyCORIS scales two whole factors by 1
            rank = max(tensors["lokr_w2"].shape)
            return Part(kind, tensors, rank, float(rank))
        rank = low[0].shape[0]
    return Part(kind, tensors, rank, float(rank if alpha is None else alpha))
