"""Every adapter, every law: one parametrised suite."""

import functools as ft
from pathlib import Path

from adapters import ADAPTERS, BEYOND, LEAVES, MATRICES, everything, fresh, moved
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank, rewrite, tree

ROOT = Path(__file__).parents[1]
names = pytest.mark.parametrize("name", ADAPTERS)
folding = pytest.mark.parametrize("name", [n for n, r in ADAPTERS.items() if r.folds])
# Halves the compile time, where the point is not what optimised code computes.
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPES = ((8, 12), (12, 8))


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(a, b, tolerance):
    scale = float(jnp.abs(b).max()) + 1e-30
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def test_every_public_name_has_a_row():
    public = {n for n, v in vars(lowrank).items() if callable(v) and n[0] != "_"}
    rows = {n.split("/")[0] for n in (*ADAPTERS, *LEAVES)}
    assert public == rows | BEYOND.keys()
    for name, file in BEYOND.items():
        assert name in (ROOT / file).read_text(), name


@names
def test_a_fresh_state_changes_nothing(name):
    row = ADAPTERS[name]
    for shape in SHAPES:
        w, x = normal(0, *shape), normal(1, 5, shape[0])
        adapter, s = fresh(name, w)
        same = adapter.apply is None or np.allclose(
            adapter.apply(x, w, s), x @ w, atol=1e-5
        )
        if row.folds:
            same &= np.allclose(adapter.merge(w, s), w, atol=1e-5)
        assert same == row.starts


@folding
def test_applying_is_multiplying_by_the_merged_weight(name):
    for shape in SHAPES:
        w, x = normal(0, *shape), normal(1, 2, 5, shape[0])
        adapter, s = fresh(name, w)
        s = moved(adapter, s)
        merged = adapter.merge(w, s)
        assert merged.shape == w.shape
        assert float(jnp.abs(merged - w).max()) > 1e-3
        if adapter.apply is not None:
            close(adapter.apply(x, w, s), x @ merged, ADAPTERS[name].tolerance)


@names
def test_jit_vmap_and_the_dtypes_of_the_weight(name):
    w = normal(0, *SHAPES[0])
    adapter, s = fresh(name, w)
    s, x = moved(adapter, s), normal(1, 5, 8)
    run = adapter.merge or (lambda w, s: adapter.apply(x, w, s))
    want = run(w, s)
    close(jit(run)(w, s), want, 1e-5)
    twice = jax.tree.map(lambda v: jnp.stack([v, v]), (w, s))
    for got in jit(jax.vmap(run))(*twice):
        close(got, want, 1e-5)
    low, x = w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    adapter, s = fresh(name, low)
    assert all(v.dtype != jnp.bfloat16 for v in jax.tree.leaves(s))
    if adapter.merge is not None:
        assert adapter.merge(low, s).dtype == jnp.bfloat16
    if adapter.apply is not None:
        assert adapter.apply(x, low, s).dtype == jnp.bfloat16


@names
def test_the_key_decides_and_gradients_are_finite(name):
    w, x = normal(0, *SHAPES[1]), normal(1, 5, 12)
    adapter, s = fresh(name, w)
    again = fresh(name, w)[1]
    jax.tree.map(np.testing.assert_array_equal, s, again)
    run = adapter.apply or (lambda x, w, s: x @ adapter.merge(w, s))
    fixed = {n: s[n] for n in adapter.fixed}
    loss = lambda t: jnp.sum(jnp.sin(run(x, w, t | fixed)))
    for state in (s, moved(adapter, s)):
        trained = {n: v for n, v in state.items() if n not in adapter.fixed}
        assert all(v.dtype == w.dtype for v in jax.tree.leaves(trained))
        slopes = jit(jax.grad(loss))(trained)
        for leaf in jax.tree.leaves(slopes):
            assert np.isfinite(leaf).all()
    if ADAPTERS[name].grad:
        assert all(np.abs(v).max() > 0 for v in jax.tree.leaves(slopes))


@ft.cache
def model():
    """The model with every form of leaf, and its function compiled once."""
    apply, params, inputs = everything()
    return apply, jit(apply), params, inputs


def attached(name):
    """The adapter on every form of leaf, off its start."""
    apply, plain, params, inputs = model()
    row, key = ADAPTERS[name], jax.random.key(3)
    statistics = None
    if row.statistic is not None:
        statistics = _statistics(apply, params, inputs, row.statistic)
    adapted, state = lowrank.attach(
        apply,
        params,
        row.make(),
        *inputs,
        where=lambda path, _: path in MATRICES,
        key=key,
        statistics=statistics,
    )
    adapter = row.make()
    drawn = {p: moved(adapter, s, 5, 0.1) for p, s in state.leaves.items()}
    common = {p: moved(adapter, s, 6, 0.1) for p, s in state.shared.items()}
    return plain, params, inputs, adapted, state.replace(leaves=drawn, shared=common)


def _statistics(apply, params, inputs, statistic):
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    uses = rewrite.uses(apply, params, *inputs)
    out = {}
    for path in MATRICES:
        w = rewrite.as_matrix(leaves[path], uses[path][0])
        one = ft.partial(statistic, jax.random.key(0))
        for _ in w.shape[:-2]:
            one = jax.vmap(one)
        out[path] = one(w)
    return out


@names
def test_on_every_form_of_leaf(name):
    """Substituted in the program as merged in it and as folded beforehand."""
    plain, params, inputs, adapted, state = attached(name)
    got = jit(adapted)(params, state, *inputs)
    assert np.isfinite(got).all()
    assert np.abs(got - plain(params, *inputs)).max() > 1e-4
    if ADAPTERS[name].folds:
        folded = jit(lambda p, s: lowrank.fold(p, s, adapted))(params, state)
        close(got, plain(folded, *inputs), 5e-5)
