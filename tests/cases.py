"""One row per public method: peculiarities are columns, no test asks for a name."""

from collections.abc import Callable, Mapping
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import merge


def model(dtype="float32", seed=0):
    """One model of two leaves: 8 devices divide them, one shape compiles once."""
    keys = iter(jax.random.split(jax.random.key(seed), 2))
    leaf = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)
    return {"a": leaf(3, 8), "b": {"c": leaf(3, 8)}}


def stacked(k, dtype="float32", seed=0):
    """k models on axis 0 of every leaf."""
    models = [model(dtype, 100 * seed + i) for i in range(k)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *models)


def of(k):
    """The data of a method of k stacked models: `(dtype, seed) -> arguments`."""
    return lambda dtype, seed: (stacked(k, dtype, seed),)


def models_and_base(dtype, seed):
    return stacked(3, dtype, seed), model(dtype, seed + 50)


def two_of_one(dtype, seed):
    return model(dtype, seed), model(dtype, seed + 50)


class Case(NamedTuple):
    """How a public function is called, and what it promises beyond the usual."""

    fn: Callable[..., Any]
    coefficients: Mapping[str, Any] = {}  # keywords that may be traced
    data: Callable[[str, int], tuple[Any, ...]] = of(3)
    random: bool = False  # takes key=
    leafwise: bool = True  # a leaf's result depends on that leaf alone
    keeps_dtype: bool = True  # False: returns booleans
    exact_grad: bool = True  # False: masks, ranks and thresholds are constants to it


W = {"weights": np.array([0.5, 0.3, 0.4])}
DENSITY = {"density": np.array([0.6, 0.4, 0.75])}
BOTH = W | DENSITY
SCALE = {"scale": 0.7}
STEP = ft.partial(Case, exact_grad=False)
RANDOM = ft.partial(Case, random=True, exact_grad=False)
MERGE = {
    # models -> a model
    "linear": Case(merge.linear, W),
    "average": Case(merge.average),
    "slerp": Case(merge.slerp, {"t": 0.3}, of(2)),
    "nuslerp": Case(merge.nuslerp, {"weights": np.array([0.5, 0.3])}, of(2)),
    "multislerp": Case(merge.multislerp, W),
    "karcher": Case(merge.karcher, W),
    "passthrough": Case(merge.passthrough, SCALE, of(1)),
    "nearswap": Case(merge.nearswap, {"t": 0.2}, of(2)),
    "arcee_fusion": Case(merge.arcee_fusion, {}, of(2), exact_grad=False),
    # task vectors -> a task vector
    "task_arithmetic": Case(merge.task_arithmetic, W | SCALE),
    "ties": STEP(merge.ties, BOTH | SCALE, leafwise=False),
    "breadcrumbs": STEP(merge.breadcrumbs, BOTH | SCALE | {"gamma": 0.1}),
    "breadcrumbs_ties": STEP(merge.breadcrumbs_ties, BOTH | SCALE | {"gamma": 0.1}),
    "sce": STEP(merge.sce, {"density": 0.5}),
    "ram": STEP(ft.partial(merge.ram, threshold=0.5)),
    "ramplus_tl": STEP(ft.partial(merge.ramplus_tl, threshold=0.5)),
    "model_stock": Case(merge.model_stock),
    "dare_linear": RANDOM(merge.dare_linear, BOTH | SCALE),
    "dare_ties": RANDOM(merge.dare_ties, BOTH | SCALE),
    "della": RANDOM(merge.della, W | SCALE | {"density": 0.5, "epsilon": 0.2}),
    "della_linear": RANDOM(merge.della_linear, W | {"density": 0.5, "epsilon": 0.2}),
    # steps
    "task_vectors": Case(merge.task_vectors, {}, models_and_base),
    "add": Case(merge.add, SCALE, two_of_one),
    "on_base": Case(merge.on_base(merge.task_arithmetic), W | SCALE, models_and_base),
    "trim": STEP(merge.trim, DENSITY, leafwise=False),
    "trim_outliers": STEP(merge.trim_outliers, DENSITY | {"gamma": 0.1}),
    "drop": RANDOM(merge.drop, DENSITY),
    "drop_by_rank": RANDOM(merge.drop_by_rank, {"density": 0.5, "epsilon": 0.2}),
    "elect": STEP(merge.elect, W, keeps_dtype=False),
    "fuse": Case(merge.fuse, W | SCALE),
}

BEYOND: dict[str, str] = {
    # name -> the tests of a public function that is no merge of stacked trees alone
}
