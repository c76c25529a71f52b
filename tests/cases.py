"""One row per public method: peculiarities are columns, no test asks for a name."""

from collections.abc import Callable, Mapping
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import merge, rewrite, tree


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


def models_and_fishers(dtype, seed):
    return stacked(3, dtype, seed), jax.tree.map(jnp.abs, stacked(3, dtype, seed + 50))


def models_and_grams(dtype, seed):
    """The Gram matrices as a tree by leaf, [k, 8, 8]."""
    square = lambda x: jnp.einsum("kni,knj->kij", x, x)
    return stacked(3, dtype, seed), jax.tree.map(square, stacked(3, dtype, seed + 50))


def regmean(models, grams, **options):
    """The last axis of every leaf of one model is its input's."""
    by_path = dict(zip(tree.paths(grams), jax.tree.leaves(grams), strict=True))
    use = lambda path: rewrite.Use(path, "dot_general", (), (), (1,), (0,), (3, 8))
    uses = {path: (use(path),) for path in by_path}
    return merge.regmean(models, by_path, uses=uses, **options)


def close(a, b, tolerance=1e-6):
    """Leaf by leaf, two trees are equal within a tolerance."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


class Case(NamedTuple):
    """How a public function is called, and what it promises beyond the usual."""

    fn: Callable[..., Any]
    coefficients: Mapping[str, Any] = {}  # keywords that may be traced
    data: Callable[[str, int], tuple[Any, ...]] = of(3)
    random: bool = False  # takes key=
    leafwise: bool = True  # a leaf's result depends on that leaf alone
    keeps_dtype: bool = True  # False: returns booleans
    exact_grad: bool = True  # False: masks, ranks and thresholds are constants to it
    scales: bool = True  # False: `scale` is more than a factor of the result


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
    "wise_ft": Case(merge.wise_ft, {"alpha": 0.3}, of(2)),
    "nearswap": Case(merge.nearswap, {"t": 0.2}, of(2)),
    "arcee_fusion": Case(merge.arcee_fusion, {}, of(2), exact_grad=False),
    "fisher": Case(merge.fisher, W | {"floor": 1e-2}, models_and_fishers),
    "regmean": Case(
        regmean, W | {"off_diagonal": 0.7, "ridge": 1e-2}, models_and_grams
    ),
    "transfer": Case(merge.transfer),
    "periodic": Case(ft.partial(merge.periodic(merge.linear, period=2), step=4), W),
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
    "expo": Case(merge.expo, {"alpha": 0.4}),
    "magmax": Case(merge.magmax, SCALE),
    "consensus_ta": Case(merge.consensus_ta, SCALE | {"threshold": 0.4}),
    "consensus_ties": STEP(
        merge.consensus_ties,
        DENSITY | SCALE | {"threshold": np.array([0.2, 0.4, 0.3])},
        leafwise=False,
    ),
    "delta_guided": Case(merge.delta_guided),
    "tsv_m": Case(merge.tsv_m, SCALE),
    "iso_c": Case(merge.iso_c, SCALE),
    "iso_cts": Case(ft.partial(merge.iso_cts, common=0.3), SCALE),
    "wudi": Case(ft.partial(merge.wudi, steps=3), {"learning_rate": 0.02}),
    "svc": Case(merge.svc, {"alpha": 0.8}),
    "knots": STEP(merge.knots, leafwise=False),
    "opcm": Case(merge.opcm, {"alpha": 0.5}, leafwise=False),
    "trust_region": STEP(merge.trust_region, SCALE | {"quantile": 0.7}, leafwise=False),
    "doge_ta": STEP(
        ft.partial(merge.doge_ta, steps=3, subspace=2),
        DENSITY | SCALE | {"learning_rate": 0.02},
        leafwise=False,
        scales=False,
    ),
    # steps
    "task_vectors": Case(merge.task_vectors, {}, models_and_base),
    "add": Case(merge.add, SCALE, two_of_one),
    "on_base": Case(merge.on_base(merge.task_arithmetic), W | SCALE, models_and_base),
    "trim": STEP(merge.trim, DENSITY, leafwise=False),
    "anisotropic": Case(merge.anisotropic, SCALE),
    "trim_outliers": STEP(merge.trim_outliers, DENSITY | {"gamma": 0.1}),
    "drop": RANDOM(merge.drop, DENSITY),
    "drop_by_rank": RANDOM(merge.drop_by_rank, {"density": 0.5, "epsilon": 0.2}),
    "compeft": STEP(merge.compeft, DENSITY | {"alpha": 0.8}, leafwise=False),
    "tall_masks": STEP(merge.tall_masks, {"threshold": 0.4}, keeps_dtype=False),
    "elect": STEP(merge.elect, W, keeps_dtype=False),
    "fuse": Case(merge.fuse, W | SCALE),
}

BEYOND: dict[str, str] = {
    # name -> the tests of a public function that is no merge of stacked trees alone
    "adamerging": "tests/test_adapt.py",
    "atlas": "tests/test_adapt.py",
    "by_leaf": "tests/test_learn.py",
    "coefficients": "tests/test_learn.py",
    "entropy": "tests/test_adapt.py",
    "frank_wolfe": "tests/test_frank_wolfe.py",
    "greedy_soup": "tests/test_soups.py",
    "learn": "tests/test_learn.py",
    "learned_soup": "tests/test_soups.py",
    "most_confident": "tests/test_adapt.py",
    "pseudo_label": "tests/test_adapt.py",
    "random_parts": "tests/test_learn.py",
    "score": "tests/test_learn.py",
    "search": "tests/test_learn.py",
    "bitdelta": "tests/test_data_free_merging.py",
    "bitdelta_restore": "tests/test_data_free_merging.py",
    "emr": "tests/test_data_free_merging.py",
    "emr_task": "tests/test_data_free_merging.py",
    "recalibrate": "tests/test_data_merging.py",
    "recycle": "tests/test_transfer.py",
    "regmean_plusplus": "tests/test_data_merging.py",
    "opcm_init": "tests/test_opcm.py",
    "opcm_step": "tests/test_opcm.py",
    "rws": "tests/test_robust_weight_signatures.py",
    "rws_dequantize": "tests/test_robust_weight_signatures.py",
    "rws_patch": "tests/test_robust_weight_signatures.py",
    "rws_quantize": "tests/test_robust_weight_signatures.py",
    "rws_unpatch": "tests/test_robust_weight_signatures.py",
    "ternary": "tests/test_compeft.py",
    "ternary_dot": "tests/test_compeft.py",
    "ternary_restore": "tests/test_compeft.py",
    "ternary_sum": "tests/test_compeft.py",
    "ternary_vote": "tests/test_compeft.py",
    "tsv_c": "tests/test_spectral_merging.py",
    "tsv_expand": "tests/test_spectral_merging.py",
}
