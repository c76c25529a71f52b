"""FusionBench 0.2.33's merges by statistics of data: Fisher and RegMean.

Its matrices are PyTorch's, [out, in]; here they stay so, and the uses of a forward of
PyTorch's layout say which axis is which.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge, rewrite

GOLDEN = np.load(Path(__file__).with_name("fusionbench.npz"))
LEAVES = ("l1.weight", "l1.bias", "l2.weight", "l2.bias")
OF = {"float32": ("out", 2e-5), "float64": ("out64", 1e-11)}
dtypes = pytest.mark.parametrize("dtype", OF)


def stacked(kind, leaves, dtype):
    read = lambda i, n: jnp.asarray(GOLDEN[f"in/{kind}{i}/{n}"], dtype)
    return {n: jnp.stack([read(i, n) for i in range(3)]) for n in leaves}


def apply(p, x):
    h = jax.nn.relu(x @ p["l1.weight"].T + p["l1.bias"])
    return h @ p["l2.weight"].T + p["l2.bias"]


def agree(got, case, dtype):
    kind, tolerance = OF[dtype]
    for name in LEAVES:
        want = GOLDEN[f"{kind}/{case}/{name}"]
        assert got[name].dtype == want.dtype == dtype
        scale = np.abs(want).max()
        np.testing.assert_allclose(got[name], want, tolerance, tolerance * scale)


@dtypes
@pytest.mark.parametrize("normalize", [True, False])
def test_fisher(normalize, dtype):
    with jax.enable_x64(dtype == "float64"):
        models = stacked("ft", LEAVES, dtype)
        fishers = stacked("fisher", LEAVES, dtype)
        got = merge.fisher(models, fishers, normalize=normalize)
        agree(got, f"fisher_norm={normalize}", dtype)


@dtypes
@pytest.mark.parametrize("off_diagonal", [1.0, 0.9])
def test_regmean(off_diagonal, dtype):
    with jax.enable_x64(dtype == "float64"):
        models = stacked("ft", LEAVES, dtype)
        grams = stacked("gram", ("l1", "l2"), dtype)
        by_leaf = {f"{layer}.weight": g for layer, g in grams.items()}
        one = jax.tree.map(lambda v: v[0], models)
        uses = rewrite.uses(apply, one, jnp.zeros(16, dtype))
        alpha = np.float32(off_diagonal)  # as theirs is, in float64 too
        got = merge.regmean(models, by_leaf, uses=uses, off_diagonal=alpha, ridge=0.0)
        agree(got, f"regmean_{off_diagonal}", dtype)
