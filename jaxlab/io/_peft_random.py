"""PEFT's updates that are no plain product: structured, random, spectral, rotations."""

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import lowrank
from ..types import Adapter
from . import _peft_vblora as vblora
from ._peft_kind import Config, Kind, Layer, Tensors
from ._peft_rotations import boft, boft_fields, oft, oft_fields

State = dict[str, Any]
Make = Callable[[Config, Layer], Adapter]
Fields = Callable[[Adapter], Config]


def _options(method: Callable[..., Adapter], names: str) -> tuple[Make, Fields]:
    """`adapter` and `fields` of a method, from "option:field" or names of both."""
    pairs = [pair.partition(":")[::2] for pair in names.split()]
    pairs = [(ours, theirs or ours) for ours, theirs in pairs]

    def make(config: Config, layer: Layer) -> Adapter:
        del layer
        return method(**{ours: config[theirs] for ours, theirs in pairs})

    def fields(adapter: Adapter) -> Config:
        options = dict(adapter.config[1:])
        if "rank" in options and "scale" in options:
            options["alpha"] = _whole(options["scale"] * options["rank"])
        return {theirs: options[ours] for ours, theirs in pairs}

    return make, fields


def _whole(value: float) -> float | int:
    """A numerator, whole where it is but for rounding."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value


def _kind(
    name: str,
    methods: tuple[Make, Fields],
    tensors: Mapping[str, str],
    implements: str,
    *,
    turned: bool = False,
    axes: Mapping[str, int] | None = None,
    common: tuple[str, ...] = (),
) -> Kind:
    """A type whose entries are PEFT's tensors.

    `turned`: they are transposed; `axes`: where PEFT's have one more, of size 1.
    """
    make, fields = methods
    more = axes or {}

    def read(held: Tensors, config: Config, layer: Layer) -> State:
        w = jax.ShapeDtypeStruct((layer.n, layer.m), jnp.float32)
        due = jax.eval_shape(make(config, layer).init, jax.random.key(0), w)
        names = {e: t for e, t in tensors.items() if e in due or t in held}
        out = {}
        for entry, tensor in names.items():
            x = held[tensor]
            x = x.take(0, more[entry]) if entry in more else x
            out[entry] = x.T if turned else x
        return out

    def write(s: State, config: Config, layer: Layer) -> Tensors:
        del layer
        out = {}
        for entry, tensor in tensors.items():
            kept = entry not in common or config["save_projection"]
            if entry in s and kept:
                x = np.asarray(s[entry])
                x = x.T if turned else x
                more_of = more.get(entry)
                out[tensor] = x if more_of is None else np.expand_dims(x, more_of)
        return out

    named = tuple(tensors[entry] for entry in common)
    fine = frozenset(implements.split())
    return Kind(name, make, read, write, fields, fine, common, named)


def _randlora(config: Config, layer: Layer) -> Adapter:
    del layer
    sparse = "sparse" if config["sparse"] else "dense"
    return lowrank.randlora(
        rank=config["r"],
        alpha=config["randlora_alpha"],
        bases="very_sparse" if config["very_sparse"] else sparse,
        seed=config["projection_prng_key"],
    )


def _randlora_fields(adapter: Adapter) -> Config:
    options = dict(adapter.config[1:])
    alpha = _whole(options["scale"] * options["rank"])
    sparse = {b: options["bases"] == b for b in ("sparse", "very_sparse")}
    own = {"r": options["rank"], "randlora_alpha": alpha} | sparse
    return own | {"projection_prng_key": options["seed"]}


_fourier, _fourier_fields = _options(
    lowrank.fourierft, "frequencies:n_frequency scale:scaling seed:random_loc_seed"
)


def _waveft(config: Config, layer: Layer) -> Adapter:
    count = config["n_frequency"]
    if config["proportional_parameters"]:
        if not layer.peers:
            raise ValueError("proportional_parameters needs the sizes of all layers")
        total = sum(n * m for _, n, m in layer.peers)
        share = layer.n * layer.m / total
        count = max(1, round(share * (count * len(layer.peers))))
    return lowrank.waveft(
        frequencies=count,
        scale=config["scaling"],
        wavelet=config["wavelet_family"] if config["use_idwt"] else None,
        seed=config["random_loc_seed"],
    )


def _waveft_fields(adapter: Adapter) -> Config:
    wavelet = dict(adapter.config[1:])["wavelet"]
    family = {} if wavelet is None else {"wavelet_family": wavelet}
    return _fourier_fields(adapter) | {"use_idwt": wavelet is not None} | family


_HADA = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
_LOKR = {"c": "lokr_w1", "c_b": "lokr_w1_a", "c_a": "lokr_w1_b"}
_LOKR |= {"d": "lokr_w2", "d_b": "lokr_w2_a", "d_a": "lokr_w2_b"}
_VERA = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
_VERA |= {"proj_a": "vera_A", "proj_b": "vera_B"}
_RAND = {"lambda": "randlora_lambda", "gamma": "randlora_gamma"}
_RAND |= {"basis_a": "randlora_A", "basis_b": "randlora_B"}
_BANK = "rank:r num_vectors vector_length topk bank_bound:init_vector_bank_bound"
_VBLORA = _options(lowrank.vblora, f"{_BANK} logits_std:init_logits_std")
KINDS = {
    "BOFT": _kind(
        "BOFT",
        (boft, boft_fields),
        {"a": "boft_R", "scale": "boft_s"},
        "boft_block_size boft_block_num boft_n_butterfly_factor init_weights",
        axes={"scale": 1},
    ),
    "FOURIERFT": _kind(
        "FOURIERFT",
        (_fourier, _fourier_fields),
        {"c": "fourierft_spectrum"},
        "n_frequency scaling random_loc_seed init_weights",
    ),
    "HRA": _kind(
        "HRA",
        _options(lowrank.hra, "rank:r orthogonal:apply_GS"),
        {"u": "hra_u"},
        "r apply_GS init_weights",
    ),
    "LOHA": _kind(
        "LOHA",
        _options(lowrank.loha, "rank:r alpha"),
        _HADA,
        "r alpha init_weights",
        turned=True,
    ),
    "LOKR": _kind(
        "LOKR",
        _options(lowrank.lokr, "rank:r alpha factor:decompose_factor decompose_both"),
        _LOKR,
        "r alpha decompose_factor decompose_both init_weights",
        turned=True,
    ),
    "OFT": _kind(
        "OFT",
        (oft, oft_fields),
        {"q": "oft_R.weight"},
        "r oft_block_size coft eps block_share use_cayley_neumann "
        "num_cayley_neumann_terms init_weights",
    ),
    "RANDLORA": _kind(
        "RANDLORA",
        (_randlora, _randlora_fields),
        _RAND,
        "r randlora_alpha sparse very_sparse projection_prng_key save_projection "
        "init_weights",
        axes={"basis_a": 1},
        common=("basis_a", "basis_b"),
    ),
    "VBLORA": Kind(
        "VBLORA",
        _VBLORA[0],
        vblora.read,
        vblora.write,
        _VBLORA[1],
        frozenset(
            "r num_vectors vector_length topk init_vector_bank_bound init_logits_std "
            "save_only_topk_weights".split()
        ),
        ("bank",),
        ("vblora_vector_bank",),
    ),
    "VERA": _kind(
        "VERA",
        _options(lowrank.vera, "rank:r d_initial seed:projection_prng_key"),
        _VERA,
        "r d_initial projection_prng_key save_projection init_weights",
        turned=True,
        common=("proj_a", "proj_b"),
    ),
    "WAVEFT": _kind(
        "WAVEFT",
        (_waveft, _waveft_fields),
        {"c": "waveft_spectrum"},
        "n_frequency scaling wavelet_family use_idwt random_loc_seed "
        "proportional_parameters init_weights",
    ),
}
