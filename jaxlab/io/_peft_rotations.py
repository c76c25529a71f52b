"""PEFT's OFT and BOFT: blocks by their size or their number."""

from .. import lowrank
from ..types import Adapter
from ._peft_kind import Config, Layer


def oft(config: Config, layer: Layer) -> Adapter:
    """The adapter of an OFT configuration, on one layer."""
    sizes = {"blocks": config["r"], "block_size": config["oft_block_size"]}
    sizes = {name: _divisor(layer.n, v) for name, v in sizes.items() if v}
    return lowrank.oft(
        **sizes,
        share=config["block_share"],
        terms=config["num_cayley_neumann_terms"]
        if config["use_cayley_neumann"]
        else None,
        eps=config["eps"] if config["coft"] else None,
    )


def oft_fields(adapter: Adapter) -> Config:
    """The configuration that makes an `oft` adapter."""
    options = dict(adapter.config[1:])
    terms, eps = options["terms"], options["eps"]
    sizes = {"r": options["blocks"] or 0, "oft_block_size": options["block_size"] or 0}
    series = {} if terms is None else {"num_cayley_neumann_terms": terms}
    series |= {"use_cayley_neumann": terms is not None}
    ball = {"coft": eps is not None} | ({} if eps is None else {"eps": eps})
    return sizes | series | ball | {"block_share": options["share"]}


def _divisor(n: int, wanted: int) -> int:
    """The divisor of n that PEFT takes in place of another number: the nearest."""
    if wanted >= n:
        return n
    lower = next(d for d in range(wanted, 0, -1) if n % d == 0)
    higher = next(d for d in range(wanted, n + 1) if n % d == 0)
    return lower if wanted - lower <= higher - wanted else higher


def boft(config: Config, layer: Layer) -> Adapter:
    """The adapter of a BOFT configuration."""
    del layer
    sizes = {
        "blocks": config["boft_block_num"],
        "block_size": config["boft_block_size"],
    }
    sizes = {name: v for name, v in sizes.items() if v}
    return lowrank.boft(**sizes, factors=config["boft_n_butterfly_factor"])


def boft_fields(adapter: Adapter) -> Config:
    """The configuration that makes a `boft` adapter."""
    options = dict(adapter.config[1:])
    return {
        "boft_block_num": options["blocks"] or 0,
        "boft_block_size": options["block_size"] or 0,
        "boft_n_butterfly_factor": options["factors"],
    }
