"""Narrow dtypes, where the peer rounds too often or overflows."""

import functools as ft

from cases import MERGE
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge

N = 1 << 15
JIT = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
METHODS = (
    "linear slerp multislerp karcher task_arithmetic ties dare_linear sce model_stock"
).split()


def narrow_data(name):
    """Data of the method's own form, as one longer leaf, rounded to bfloat16."""
    args = MERGE[name].data("float32", 0)
    key = iter(jax.random.split(jax.random.key(1), len(args)))
    draw = lambda v: jax.random.normal(next(key), (*v["a"].shape[:-2], N))
    return [{"a": draw(v).astype(jnp.bfloat16)} for v in args]


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_the_float64_result_rounded_once(name):
    """mergekit misses it in 12 to 61 % of the elements.

    Float32 decides where the exact result lies on a midpoint (weights that are small
    fractions put many there) and where a vote is tied, so that much is allowed.
    """
    case = MERGE[name]
    keyword = {"key": jax.random.key(0)} if case.random else {}
    call = JIT(lambda args: case.fn(*args, **case.coefficients, **keyword)["a"])
    args = narrow_data(name)
    got = np.asarray(call(args), np.float64)
    with jax.enable_x64(True):
        exact = call(jax.tree.map(lambda v: v.astype(jnp.float64), args))
        assert exact.dtype == jnp.float64
    exact = np.asarray(exact)
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact) + 1e-30)) - 8)
    wrong = np.mean(np.abs(got - exact) > half_ulp + 1e-6)
    assert wrong < 1e-3, f"{100 * wrong:.3f} % of the elements"


@pytest.mark.parametrize("method", [merge.dare_linear, merge.della_linear])
def test_float16_norms_do_not_overflow(method):
    """The L1 norm of 70000 ones is beyond float16; mergekit gives Inf there."""
    ones = {"w": jnp.ones((1, 70_000), jnp.float16)}
    call = ft.partial(method, density=0.5, rescale="l1", key=jax.random.key(0))
    out = JIT(call)(ones)["w"]
    assert np.isfinite(out).all()
    assert set(np.round(np.unique(out), 1)) == {0.0, 2.0}


def test_float16_energies_and_sums_do_not_overflow():
    big = {"w": jnp.full((3, 4096), 3e4, jnp.float16)}
    for method in (merge.sce, merge.model_stock, merge.karcher, merge.multislerp):
        np.testing.assert_allclose(JIT(method)(big)["w"], 3e4, rtol=1e-3)
