"""Adapters (adalora to lora_prune): all options count, and wrong ones are refused."""

import functools as ft

import jax
import jax.numpy as jnp
import pytest

from jaxlab import lowrank

of = ft.partial
OPTIONS = [
    (of(lowrank.adalora, rank=2), {"rank": 3, "alpha": 3}),
    (of(lowrank.boft, block_size=2), {"block_size": 4, "factors": 2}),
    (of(lowrank.bone, block=2), {"block": 4, "form": "row"}),
    (of(lowrank.bottleneck, rank=2), {"rank": 3, "form": "tanh", "scale": 2.0}),
    (of(lowrank.c3a, block=2), {"block": 4, "start": "gaussian"}),
    (
        of(lowrank.compacter, rank=4),
        {"rank": 8, "divisions": 2, "factors": 2, "form": "relu"},
    ),
    (
        of(lowrank.contracon, heads=2),
        {"heads": 1, "kernel": 3, "dilation": 2, "drawn": True},
    ),
    (of(lowrank.corda, rank=2), {"rank": 3, "alpha": 3, "mode": "kpm"}),
    (of(lowrank.delora, rank=2), {"rank": 3, "bound": 1.0}),
    (of(lowrank.dora, rank=2, alpha=4), {"alpha": 3, "rslora": True, "detach": False}),
    (of(lowrank.eva, rank=2, alpha=4), {"alpha": 3, "rslora": True, "whiten": True}),
    (of(lowrank.fourierft, frequencies=2), {"frequencies": 3, "scale": 1.0, "seed": 1}),
    (of(lowrank.gralora, rank=4), {"rank": 2, "blocks": 4, "hybrid": 1, "alpha": 3}),
    (of(lowrank.hira, rank=2), {"rank": 3}),
    (of(lowrank.hra, rank=2), {"rank": 3, "orthogonal": True}),
    (of(lowrank.hydra, rank=2), {"rank": 3, "sequential_rank": 1, "scale": 2.0}),
    (
        of(lowrank.hyperformer, rank=2),
        {"rank": 3, "embedding": 3, "hidden": 5, "projected": 4, "form": "relu"},
    ),
    (of(lowrank.ia3), {"feedforward": True}),
    (of(lowrank.kasa, rank=2, alpha=4), {"rank": 3, "alpha": 3, "rslora": True}),
    (of(lowrank.loha, rank=2), {"rank": 3, "alpha": 3}),
    (
        of(lowrank.lokr, rank=2),
        {"rank": 3, "alpha": 3, "factor": 4, "decompose_both": True},
    ),
    (
        of(lowrank.lora, rank=2, alpha=4),
        {
            "rank": 4,
            "alpha": 3,
            "rslora": True,
            "bias": True,
            "frozen_a": True,
            "start": "orthogonal",
        },
    ),
    (
        of(lowrank.lora_ga, rank=2),
        {"rank": 1, "alpha": 3, "direction": "ArBr", "gamma": None, "niter": 4},
    ),
    (of(lowrank.lora_gain, rank=2), {"rank": 3, "bias": True}),
    (of(lowrank.lora_prune, rank=2), {"rank": 3, "alpha": 3}),
]


def test_adapters_are_equal_exactly_where_all_options_are():
    plain = [make() for make, _ in OPTIONS]
    assert len(set(plain)) == len(plain)
    for adapter, (make, others) in zip(plain, OPTIONS, strict=True):
        assert make() == adapter
        for name, value in others.items():
            assert make(**{name: value}) != adapter, (make.func, name)


def fresh(make, *statistic, shape=(6, 4), **options):
    """A call of `init` for a weight of a shape."""
    return lambda: make(**options).init(jax.random.key(0), jnp.ones(shape), *statistic)


least = r"^rank must be at least 1, got 0$"
most = r"^rank 5 is above min\(n, m\) of a weight \[6, 4\]$"
G = jnp.ones((6, 6))
RANKED = (
    "adalora corda delora dora eva hira loha lora lora_ga lora_gain lora_prune kasa"
)
ERRORS = [
    *[
        (of(getattr(lowrank, name), rank=0), least)
        for name in [
            *RANKED.split(),
            "bottleneck",
            "compacter",
            "gralora",
            "hra",
            "hydra",
            "hyperformer",
            "lokr",
        ]
    ],
    *[
        (
            fresh(
                getattr(lowrank, name),
                *([G] if name in ("corda", "eva") else []),
                rank=5,
            ),
            most,
        )
        for name in RANKED.split()
        if name != "kasa"
    ],
    (fresh(lowrank.boft, shape=(6, 4), block_size=4), "block_size=4 does not divide 6"),
    (fresh(lowrank.boft, shape=(6, 4), blocks=4), "blocks=4 does not divide 6 inputs"),
    (fresh(lowrank.boft, block_size=1), "block_size=1 .* into blocks of 2 or more"),
    (fresh(lowrank.boft, block_size=3, factors=2), "factors=2 needs even blocks"),
    (fresh(lowrank.boft, block_size=2, factors=2), "a multiple of 2 of them: 6 inputs"),
    (of(lowrank.boft), "either block_size or blocks is needed"),
    (of(lowrank.boft, block_size=2, blocks=2), "and not both"),
    (of(lowrank.boft, blocks=0), "blocks=0: below 1"),
    (of(lowrank.boft, block_size=2, factors=0), "factors must be at least 1, got 0"),
    (of(lowrank.bone, block=0), "block must be at least 1, got 0"),
    (of(lowrank.compacter, rank=4, divisions=0), "divisions must be at least 1, got 0"),
    (of(lowrank.compacter, rank=4, factors=0), "factors must be at least 1, got 0"),
    (of(lowrank.compacter, rank=4, form="x"), "form 'x' is none of"),
    (of(lowrank.hyperformer, rank=4, form="x"), "form 'x' is none of"),
    (of(lowrank.contracon, heads=0), "heads must be at least 1, got 0"),
    (of(lowrank.contracon, heads=1, dilation=0), "dilation must be at least 1, got 0"),
    (of(lowrank.bone, block=2, form="both"), "form must be .*, got 'both'"),
    (fresh(lowrank.bone, block=4), r"blocks of 4 do not divide a weight \[6, 4\]"),
    (fresh(lowrank.bone, block=3, form="row"), r"blocks of 3 do not divide"),
    (of(lowrank.bottleneck, rank=2, form="none"), "form 'none' is none of"),
    (of(lowrank.c3a, block=2, start="ones"), "start 'ones' is unknown"),
    (fresh(lowrank.c3a, block=4), r"block 4 does not divide a weight \[6, 4\]"),
    (fresh(lowrank.c3a, block=0), "block 0 does not divide"),
    (of(lowrank.compacter, rank=6, divisions=4), "divisions 4 does not divide rank 6"),
    (
        fresh(lowrank.compacter, rank=6, divisions=3),
        "divisions 3 does not divide the 4 outputs",
    ),
    (of(lowrank.contracon, heads=2, kernel=4), "kernel must be odd, got 4"),
    (of(lowrank.contracon, heads=2, kernel=-1), "kernel must be odd, got -1"),
    (fresh(lowrank.contracon, heads=3), "heads 3 does not divide the 4 outputs"),
    (of(lowrank.contracon_task, []), "at least one task"),
    (of(lowrank.corda, rank=2, mode="cpm"), "mode must be 'ipm' or 'kpm', got 'cpm'"),
    (of(lowrank.corda, rank=2, alpha=0), "alpha must be above 0 for corda, got 0"),
    (fresh(lowrank.corda, rank=2), r"corda needs .* \[6, 6\] .* got none"),
    (fresh(lowrank.corda, jnp.ones((4, 4)), rank=2), r"one of shape \(4, 4\)"),
    (fresh(lowrank.eva, rank=2), r"eva needs .* \[6, 6\] .* got none"),
    (fresh(lowrank.eva, jnp.ones((6, 4)), rank=2), r"one of shape \(6, 4\)"),
    (of(lowrank.eva_ranks, {}, rank=2), "needs leaves and rho >= 1"),
    (of(lowrank.eva_ranks, {"a": G}, rank=2, rho=0.5), "rho >= 1, got rho=0.5"),
    (of(lowrank.eva_ranks, {"a": G}, rank=0), least),
    (of(lowrank.fourierft, frequencies=0), "frequencies must be at least 1, got 0"),
    (
        fresh(lowrank.fourierft, frequencies=25),
        r"frequencies=25 is above the entries of a weight \[6, 4\]",
    ),
    (of(lowrank.gralora, rank=3), "rank 3 is no multiple of the 2 blocks"),
    (of(lowrank.gralora, rank=2, blocks=0), "no multiple of the 0 blocks"),
    (of(lowrank.gralora, rank=2, hybrid=-1), "hybrid must be at least 0, got -1"),
    (fresh(lowrank.gralora, rank=4, hybrid=1), most),
    (fresh(lowrank.gralora, rank=4, blocks=4), r"blocks 4 does not divide .* \[6, 4\]"),
    (fresh(lowrank.hra, rank=7), r"rank 7 is above n of a weight \[6, 4\]"),
    (
        of(lowrank.hydra, rank=2, sequential_rank=0),
        "sequential_rank must be at least 1, got 0",
    ),
    (fresh(lowrank.hydra, rank=5, sequential_rank=1), most),
    (fresh(lowrank.hydra, rank=2, sequential_rank=5), "5 is above the 4 outputs"),
    (fresh(lowrank.kasa, rank=4), r"rank 4 leaves nothing of a weight \[6, 4\]"),
    (of(lowrank.lokr, rank=1, factor=0), "factor must be positive, or -1, got 0"),
    (of(lowrank.lokr, rank=1, factor=-2), "factor must be positive, or -1, got -2"),
    (of(lowrank.lora, rank=2, start="zeros"), "start must be .*, got 'zeros'"),
    (of(lowrank.lora, rank=3, start="orthogonal"), "needs an even rank .* got rank=3"),
    (of(lowrank.lora, rank=2, start="orthogonal", frozen_a=True), "frozen_a=True"),
    (lambda: lowrank.lora(rank=2, bias=True).bias(None, {}), "a layer with a bias"),
    (lambda: lowrank.lora_gain(rank=2, bias=True).bias(None, {}), "layer with a bias"),
    (of(lowrank.lora_ga, rank=2, direction="BrA2r"), "direction must be .* 'BrA2r'"),
    (of(lowrank.lora_ga, rank=2, gamma=0), "gamma must be above 0, got 0"),
    (of(lowrank.lora_ga, rank=2, alpha=-1), "above 0 for lora_ga, got -1"),
    (fresh(lowrank.lora_ga, rank=2), r"the gradient \[6, 4\] .* got none"),
    (fresh(lowrank.lora_ga, G, rank=2), r"got one of shape \(6, 6\)"),
    (fresh(lowrank.lora_ga, jnp.ones((6, 4)), rank=3), r"2 \* rank = 6 is above"),
    (of(lowrank.adalora_allocator, target=0, total=9), "target and interval >= 1"),
    (of(lowrank.adalora_allocator, target=1, total=9, interval=0), "interval >= 1"),
    (
        of(lowrank.adalora_allocator, target=1, total=9, warmup=5, final=4),
        r"total > warmup \+ final",
    ),
    (of(lowrank.adalora_allocator, target=1, total=9, beta1=1.0), "beta1 and beta2"),
    (of(lowrank.adalora_allocator, target=1, total=9, beta2=0.0), "beta1 and beta2"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
