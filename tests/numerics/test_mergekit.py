"""Every merge method against mergekit 0.1.5, through the keywords that reproduce it."""

import functools as ft
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge, tree
from jaxlab.merge import _drop

GOLDEN = np.load(Path(__file__).with_name("mergekit.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
CASES = {c["name"]: c for c in ABOUT["cases"]}
SHAPES = ("v", "m", "t")
FLOAT32_INSIDE = ("dare_linear", "dare_ties", "della", "della_linear", "ramplus_tl")
LIKE_ANOTHER = ("lam=1.0", "lam=0.7/norm=False", "t=0.0", "t=1.0", "int8", "gamma=0.1")
IN_FLOAT64 = [
    n
    for n, c in CASES.items()
    if c["method"] not in FLOAT32_INSIDE and not any(x in n for x in LIKE_ANOTHER)
]
KEY = jax.random.key(0)
# Compiles twice as fast; that optimised code gives the same is test_conformance's part.
JIT = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Our keyword for each of theirs; a method takes those of these that it is given.
NAMES = {
    "weight": "weights",
    "lambda": "scale",
    "select_topk": "density",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
    "int8_mask": None,
}
RAM = {"epsilon": "threshold"}
FIXED = {
    "ties": {"per": "leaf"},
    "sce": {"eps": 1e-6},
    "model_stock": {"eps": 1e-6},
    **{m: {"key": KEY} for m in ("dare_linear", "dare_ties", "della", "della_linear")},
}
NORMALISES = {
    "ties": True,
    "dare_ties": False,
    "della": True,
    "breadcrumbs_ties": False,
}
ON_MODELS = ("linear", "slerp", "karcher", "passthrough", "nearswap", "arcee_fusion")


def ours(case):
    """The function of jaxlab that a case of mergekit's corresponds to."""
    given, method = dict(case["with"]), case["method"]
    keywords = dict(FIXED.get(method, {}))
    if method in NORMALISES:
        mean = given.pop("normalize", NORMALISES[method])
        keywords["consensus"] = "weighted_mean" if mean else "weighted_sum"
    if "key" in keywords:
        keywords["rescale"] = "l1" if given.pop("rescale", True) else None
    names = NAMES | (RAM if method.startswith("ram") else {})
    for name, value in given.items():
        value = list(value.values()) if isinstance(value, dict) else value
        if (name := names.get(name, name)) is not None:
            keywords[name] = value
    return ft.partial(getattr(merge, method), **keywords)


def run(case, dtype):
    """Our result for a case: the three shapes are three leaves of one model."""
    method = ours(case)
    read = lambda i: {s: jnp.asarray(GOLDEN[f"in/{s}/{i}"], dtype) for s in SHAPES}
    models = [read(i) for i in range(case["n"] + 1)]
    base, rest = models[0], models[1:]
    if case["base"] and case["method"] not in ON_MODELS:
        return JIT(merge.on_base(method))(tree.stack(rest), base)
    return JIT(method)(tree.stack(models if case["base"] else rest))


def check(got, kind, case, tolerance):
    """Relative in norm, and entry by entry against the largest entry."""
    for shape in SHAPES:
        want = GOLDEN[f"{kind}/{shape}/{case['name']}"].astype(np.float64)
        error = np.asarray(got[shape], np.float64) - want
        assert np.linalg.norm(error) <= tolerance * np.linalg.norm(want), shape
        assert np.abs(error).max() <= tolerance * np.abs(want).max(), shape


def test_every_method_is_here():
    assert ABOUT["mergekit"] == "0.1.5"
    assert len({c["method"] for c in CASES.values()}) == 20
    assert len(CASES) * len(SHAPES) == 120


@pytest.mark.parametrize("name", CASES)
def test_agrees_in_float32(name, monkeypatch):
    def stored(path, key, wanted):
        del key
        draws = [GOLDEN[f"u/{path}/{name}/{j}"] for j in range(wanted[0])]
        return jnp.stack([u.reshape(wanted[1:]) for u in draws])

    monkeypatch.setattr(_drop, "_uniform", stored)
    check(run(CASES[name], jnp.float32), "out", CASES[name], 1e-6)


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_agrees_in_float64(name):
    with jax.enable_x64(True):
        got = run(CASES[name], jnp.float64)
    check(got, "out64", CASES[name], 1e-12)
