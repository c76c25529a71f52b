"""FusionBench 0.2.33's merges, through the calls that reproduce them.

Its matrices are PyTorch's, [out, in]; ours are [in, out], so they come in transposed
and the results are compared transposed.
"""

import functools as ft
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge

GOLDEN = np.load(Path(__file__).with_name("fusionbench.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
LEAVES = ("l1.weight", "l1.bias", "l2.weight", "l2.bias")


class Data(NamedTuple):
    """What a case is made of: a model, three tuned from it, and their statistics."""

    base: dict[str, jax.Array]
    models: dict[str, jax.Array]  # stacked
    deltas: dict[str, jax.Array]  # stacked
    fisher: dict[str, jax.Array]  # stacked
    gram: dict[str, jax.Array]  # stacked


def turned(x):
    """From one library's layout of a leaf to the other's; stacks keep axis 0."""
    return np.swapaxes(x, -1, -2) if x.ndim > 1 else x


def data(dtype):
    def read(kind, leaves=LEAVES):
        return {n: jnp.asarray(turned(GOLDEN[f"in/{kind}/{n}"]), dtype) for n in leaves}

    def stacked(kind, leaves=LEAVES):
        found = [read(f"{kind}{i}", leaves) for i in range(3)]
        return {n: jnp.stack([f[n] for f in found]) for n in leaves}

    base, models = read("base"), stacked("ft")
    deltas = merge.task_vectors(models, base)
    return Data(base, models, deltas, stacked("fisher"), stacked("gram", ("l1", "l2")))


def weight(tree):
    """The cases of one matrix: the first layer's."""
    return {"": tree["l1.weight"]}


def svc(g, merged):
    """What is calibrated there is a model, here a task vector."""
    return merge.add(weight(g.base), merge.svc(weight(g.deltas), merged))


def knots(deltas):
    """Each task vector through the shared basis and back, and the basis's lengths."""
    parts, method = [], lambda x, i: parts.append(x[""]) or {"": x[""][i]}
    back = [merge.knots(deltas, method=ft.partial(method, i=i))[""] for i in range(3)]
    lengths = jnp.sqrt(jnp.sum(parts[0] ** 2, (0, 1)))
    return {f"recon{i}": x for i, x in enumerate(back)} | {"S": lengths}


def emr(deltas):
    """Their unified task vector, rescalers, and masks by leaf and task."""
    parts = merge.emr(deltas, by="leaf")
    masks = {
        f"mask/{n}/{i}": m for n, x in parts.masks.items() for i, m in enumerate(x)
    }
    return parts.unified | masks | {"rescalers": parts.rescalers}


def ties(deltas, consensus):
    """Their TIES of one long vector, which keeps one entry more than it says."""
    size = sum(x[0].size for x in deltas.values())
    density = (int(0.2 * size) + 1.5) / size
    merged = merge.ties(deltas, density=density, consensus=consensus)
    return {"": np.concatenate([np.ravel(turned(merged[n])) for n in sorted(merged)])}


def doge_ta(g):
    """Weights alone; its masks too keep one entry more than they say."""
    only = lambda models: {n: x for n, x in models.items() if n.endswith("weight")}
    size = sum(x.size for x in only(g.base).values())
    density = (int(0.3 * size) + 1.5) / size
    return merge.on_base(merge.doge_ta)(only(g.models), only(g.base), density=density)


def two(models):
    return {n: x[:2] for n, x in models.items()}


# name of the case: (our call, on `Data`, with a leaf for each of theirs)
CASES = {
    "tsvm": lambda g: merge.tsv_m(g.deltas),
    "tsvm_lossless": lambda g: merge.tsv_m(g.deltas, fraction=1.0),
    "iso_c": lambda g: merge.iso_c(g.deltas),
    "iso_cts_0.8": lambda g: merge.iso_cts(g.deltas, common=0.8),
    "wudi_20": lambda g: merge.wudi(g.deltas, steps=20),
    "svc_avg": lambda g: svc(g, weight(merge.average(g.deltas))),
    "svc_sum": lambda g: svc(g, None),
    "knots": lambda g: knots(weight(g.deltas)),
    "opcm_0.2": lambda g: merge.on_base(merge.opcm)(g.models, g.base, alpha=0.2),
    "opcm_0.5": lambda g: merge.on_base(merge.opcm)(g.models, g.base, alpha=0.5),
    "doge_ta": doge_ta,
    "trust_region_0.8": lambda g: merge.on_base(merge.trust_region)(
        g.models, g.base, quantile=0.8, scale=0.3
    ),
    "magmax": lambda g: merge.magmax(g.deltas),
    "emr": lambda g: emr(g.deltas),
    "ties_global_K20_mean": lambda g: ties(g.deltas, "mean"),
    "ties_global_K20_sum": lambda g: ties(g.deltas, "weighted_sum"),
    "slerp_0.3": lambda g: merge.slerp(two(g.models), t=0.3),
    "model_stock2": lambda g: merge.on_base(merge.model_stock)(two(g.models), g.base),
}
FLOAT32_INSIDE = ("model_stock2",)
IN_FLOAT64 = [
    n
    for n in CASES
    if n not in FLOAT32_INSIDE and any(k.startswith(f"out64/{n}/") for k in GOLDEN)
]


def check(got, kind, name, tolerance):
    """Every leaf of theirs, relative to its largest entry."""
    wanted = [k for k in GOLDEN if k.startswith(f"{kind}/{name}/")]
    assert wanted
    for key in wanted:
        want = turned(GOLDEN[key]).astype(np.float64)
        error = np.asarray(got[key.removeprefix(f"{kind}/{name}/")], np.float64) - want
        assert error.shape == want.shape
        assert np.abs(error).max() <= tolerance * np.abs(want).max(), key


@pytest.mark.parametrize("name", CASES)
def test_agrees_in_float32(name):
    check(CASES[name](data(jnp.float32)), "out", name, 1e-5)


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_agrees_in_float64(name):
    with jax.enable_x64(True):
        check(CASES[name](data(jnp.float64)), "out64", name, 1e-11)
