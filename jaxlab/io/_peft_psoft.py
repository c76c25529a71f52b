"""PEFT's PSOFT, whose file leaves out the basis that its rotation is in.

PEFT decomposes the base anew wherever it loads: A and B are singular vectors, whose
signs are whatever the linear algebra at hand makes them, and the rotation means another
thing under others. So the basis is read from the file, where it was added under the
names of PEFT's buffers, as `save` does, or the file is refused.
"""

from typing import Any

import numpy as np

from .. import lowrank
from ..types import Adapter
from ._peft_kind import Config, Kind, Layer, Tensors

OPTIONS = {
    "rank": "r",
    "orthogonal": "psoft_orth",
    "scale_in": "psoft_mag_a",
    "scale_out": "psoft_mag_b",
}  # ours and PEFT's
TRAINED = {"q": "weight", "alpha": "vector_a", "beta": "vector_b"}
A, B = "_psoft_A_cache", "_psoft_B_cache"


def _adapter(config: Config, layer: Layer) -> Adapter:
    del layer
    series = config["use_cayley_neumann"]
    return lowrank.psoft(
        **{ours: config[theirs] for ours, theirs in OPTIONS.items()},
        split=config["ab_svd_init"] == "pissa_init",
        terms=config["num_cayley_neumann_terms"] if series else None,
        bound=config["cayley_neumann_eps"] if series else None,
    )


def _fields(adapter: Adapter) -> Config:
    options = dict(adapter.config[1:])
    terms, start = options["terms"], "pissa_init" if options["split"] else "psoft_init"
    out: Config = {theirs: options[ours] for ours, theirs in OPTIONS.items()}
    out |= {"ab_svd_init": start, "use_cayley_neumann": terms is not None}
    if terms is not None:
        out["num_cayley_neumann_terms"] = terms
        out["cayley_neumann_eps"] = options["bound"]
    return out


def _read(tensors: Tensors, config: Config, layer: Layer) -> dict[str, Any]:
    del layer
    if A not in tensors or B not in tensors:
        raise ValueError(
            "the file leaves out the basis, and the signs of another decomposition may "
            "differ; save it from PEFT with model.save_pretrained(folder, "
            "state_dict=model.state_dict() | dict(model.named_buffers()))"
        )
    s = {"a": tensors[A].T, "b": tensors[B].T * _scale(config)}
    return s | {ours: tensors[f"psoft_R.{n}"] for ours, n in _trained(config).items()}


def _write(s: dict[str, Any], config: Config, layer: Layer) -> Tensors:
    del layer
    out = {f"psoft_R.{n}": np.asarray(s[ours]) for ours, n in _trained(config).items()}
    if config["psoft_orth"]:  # the places of `q`, buffers in PEFT
        rows, columns = np.triu_indices(config["r"], 1)
        out |= {"psoft_R.rows": rows, "psoft_R.cols": columns}
    return out | {A: np.asarray(s["a"]).T, B: np.asarray(s["b"]).T / _scale(config)}


def _scale(config: Config) -> np.float32:
    """What PEFT divides B by, and multiplies the update by."""
    return np.float32(config["psoft_alpha"] / config["r"])


def _trained(config: Config) -> dict[str, str]:
    """The trained entries, and PEFT's names of them."""
    lacking = {"alpha"} if not config["psoft_mag_a"] else set()
    lacking |= {"beta"} if not config["psoft_mag_b"] else set()
    return {ours: n for ours, n in TRAINED.items() if ours not in lacking}


PSOFT = Kind(
    "PSOFT",
    _adapter,
    _read,
    _write,
    _fields,
    frozenset(
        {*OPTIONS.values(), "psoft_alpha", "ab_svd_init", "init_weights"}
        | {"use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps"}
    ),
)
