"""Every merge method, every promise: one parametrised suite."""

import functools as ft
from pathlib import Path
import re

from cases import BEYOND, MERGE
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import merge, tree

ROOT = Path(__file__).parents[1]
names = pytest.mark.parametrize("name", MERGE)
exact = pytest.mark.parametrize("name", [n for n, c in MERGE.items() if c.exact_grad])
# Halves the compile time, where the point is not what optimised code computes.
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
each = jax.tree.map


def bound(name, seed=0):
    """The method with everything but its data bound."""
    case = MERGE[name]
    key = {"key": jax.random.key(seed)} if case.random else {}
    return ft.partial(case.fn, **case.coefficients, **key)


@ft.cache
def data(name, seed=0, dtype="float32"):
    return MERGE[name].data(dtype, seed)


@ft.cache
def eager(name, seed=0):
    """What the method gives when nothing is transformed."""
    return bound(name)(*data(name, seed))


def pair(name):
    """Two data sets on a new axis 0, and what each gives."""
    stack = lambda *xs: jnp.stack(xs)
    return each(stack, data(name, 0), data(name, 1)), (eager(name, 0), eager(name, 1))


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.array_equal(x, y) for x, y in pairs)


def total(out):
    """A scalar that every entry of a result moves by another amount."""
    one = lambda v: jnp.sum(
        v * jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)
    )
    return sum(
        (one(v) for v in jax.tree.leaves(out) if v.dtype != bool),
        0.0 * one(jax.tree.leaves(out)[0].astype(float)),
    )


def test_every_public_name_has_a_row():
    public = {n for n, v in vars(merge).items() if callable(v) and n[0] != "_"}
    assert public == MERGE.keys() | BEYOND.keys()
    assert not MERGE.keys() & BEYOND.keys()
    for name, file in BEYOND.items():
        used = rf"\bmerge\.{name}\b|\b{name}\("
        assert re.search(used, (ROOT / file).read_text()), name


@names
def test_jit_agrees_traces_once_and_the_key_decides(name):
    case, traces = MERGE[name], 0

    def counted(key, *args):
        nonlocal traces
        traces += 1
        keyword = {"key": key} if case.random else {}
        return case.fn(*args, **case.coefficients, **keyword)

    compiled, key = jax.jit(counted), jax.random.key(0)
    first = compiled(key, *data(name))
    close(first, eager(name))
    assert not differ(first, compiled(key, *data(name)))
    assert differ(first, compiled(jax.random.key(1), *data(name))) == case.random
    assert differ(first, compiled(key, *data(name, 1)))
    assert traces == 1


@names
def test_vmap_agrees_with_a_loop(name):
    batched, (first, second) = pair(name)
    got = jit(jax.vmap(bound(name)))(*batched)
    close(got, each(lambda *xs: jnp.stack(xs), first, second))


@names
def test_pmap_agrees_with_a_loop(name):
    batched, wanted = pair(name)
    got = jit(jax.pmap(bound(name), devices=jax.devices()[:2]))(*batched)
    for i, want in enumerate(wanted):
        close(each(lambda v, i=i: np.asarray(v)[i], got), want)


@names
def test_sharded_data_agree(name):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spec = lambda v: NamedSharding(mesh, PartitionSpec(*[None] * (v.ndim - 1), "d"))
    placed = each(lambda v: jax.device_put(v, spec(v)), data(name))
    close(jit(bound(name))(*placed), eager(name))


@names
def test_keeps_structure_and_rounds_the_float32_result(name):
    """With a bfloat16 and a float16 leaf in one model."""
    dtypes = {"a": jnp.bfloat16, "b": {"c": jnp.float16}}
    args = [each(lambda v, d: v.astype(d), x, dtypes) for x in data(name)]
    wide_args = each(lambda v: v.astype(jnp.float32), args)
    method = bound(name)
    got, wide = jit(lambda *xs: (method(*xs[0]), method(*xs[1])))(args, wide_args)
    assert jax.tree.structure(got) == jax.tree.structure(args[0])
    for x, y, d in zip(*map(jax.tree.leaves, (got, wide, dtypes)), strict=True):
        assert x.dtype == (d if MERGE[name].keeps_dtype else bool)
        half_ulp = 0.501 * float(jnp.finfo(d).eps) if MERGE[name].keeps_dtype else 0
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=half_ulp, atol=1e-7)


def degenerate(args):
    """Zero, equal and opposite models in place of the data."""
    ones = each(jnp.ones_like, args)
    sign = lambda v: (1 - 2 * (jnp.arange(v.shape[0]) % 2)).astype(v.dtype)
    flip = lambda v: v * sign(v).reshape(-1, *[1] * (v.ndim - 1))
    return [each(jnp.zeros_like, args), ones, each(flip, ones)]


@names
def test_gradients_are_finite(name):
    case = MERGE[name]
    key = {"key": jax.random.key(0)} if case.random else {}
    value = lambda args, c: total(case.fn(*args, **c, **key))
    gradient = jit(jax.grad(value, (0, 1)))
    coefficients = each(jnp.float32, dict(case.coefficients))
    for args in [data(name), *degenerate(data(name))]:
        for leaf in jax.tree.leaves(gradient(args, coefficients)):
            assert np.isfinite(leaf).all()


@exact
def test_gradient_is_the_slope(name):
    """Along one direction of data and coefficients at once, in float64."""
    case = MERGE[name]

    def slopes(point):
        value = lambda p: total(case.fn(*p[0], **p[1]))
        wave = lambda v: jnp.cos(1 + jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape)
        along = each(wave, point)
        at = lambda h: value(each(lambda v, a: v + h * a, point, along))
        terms = each(lambda g, a: jnp.sum(g * a), jax.grad(value)(point), along)
        return sum(jax.tree.leaves(terms)), (at(1e-5) - at(-1e-5)) / 2e-5

    with jax.enable_x64(True):
        small = tuple(args["b"] for args in case.data("float64", 0))
        point = (small, each(jnp.float64, dict(case.coefficients)))
        got, want = jit(slopes)(point)
    np.testing.assert_allclose(got, want, 1e-6)


@names
def test_leafwise_methods_see_one_leaf(name):
    """A leaf alone gives what it gives in company, where the row says so."""
    alone = bound(name)(*({"a": args["a"]} for args in data(name)))
    assert differ(alone["a"], eager(name)["a"]) == (not MERGE[name].leafwise)


@names
def test_coefficients_by_leaf_or_traced_give_the_same(name):
    case, args = MERGE[name], data(name)
    key = {"key": jax.random.key(0)} if case.random else {}
    traced = jit(lambda c: case.fn(*args, **c, **key))
    close(traced(each(jnp.float32, dict(case.coefficients))), eager(name), 1e-5)
    if case.leafwise:
        spread = lambda v: tree.path_map(lambda *_: v, args[0])
        by_leaf = {n: spread(v) for n, v in case.coefficients.items()}
        close(case.fn(*args, **by_leaf, **key), eager(name), 0)
