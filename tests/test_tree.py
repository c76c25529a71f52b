"""Properties of the tree operations, by hypothesis."""

import fnmatch
import functools as ft

from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import tree
from jaxlab.tree._order import _count

settings.register_profile("here", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("here")
SIZES = st.sampled_from([(), (1,), (5,), (2, 3), (0,)])  # few, so that few compile
FLOATS = st.floats(width=32, allow_nan=False)
names = st.text("ab_0", min_size=1, max_size=3)


def leaves(elements=FLOATS):
    return hnp.arrays(np.float32, SIZES, elements=elements)


def trees(leaf):
    nest = lambda inner: (
        st.dictionaries(names, inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3)
    )
    return st.recursive(leaf, nest, max_leaves=5)


some_tree = trees(leaves())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@given(some_tree, st.integers(1, 3))
def test_unstack_undoes_stack(one, k):
    models = [jax.tree.map(lambda v, i=i: v + i, one) for i in range(k)]
    stacked = tree.stack(models)
    for v, x in zip(jax.tree.leaves(stacked), jax.tree.leaves(one), strict=True):
        assert v.shape == (k, *x.shape)
    for got, want in zip(tree.unstack(stacked), models, strict=True):
        same(got, want)


@given(some_tree, st.data())
def test_combine_undoes_partition(one, data):
    paths = tree.paths(one)
    chosen = data.draw(st.sets(st.sampled_from(paths), min_size=1))
    yes, no = tree.partition(one, lambda path, _: path in chosen)
    assert len(jax.tree.leaves(yes)) + len(jax.tree.leaves(no)) == len(paths)
    same(tree.combine(yes, no), one)
    same(tree.combine(no, yes), one)


@given(some_tree)
def test_paths_name_leaves_in_order(one):
    seen = []
    tree.path_map(lambda path, leaf: seen.append(path), one)
    assert seen == tree.paths(one)
    assert len(seen) == len(jax.tree.leaves(one))


def matches(pattern, path):
    """The slow definition: `**` any components, `*` within one."""
    if not pattern:
        return not path
    head, *rest = pattern
    if head == "**":
        return any(matches(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], head) and matches(rest, path[1:])


parts = st.sampled_from(["a", "b", "ab", "a.b", "a_0", "b_1"])
globs = st.sampled_from(
    ["a", "*", "**", "a*", "*b", "a?b", "[ab]", "[!a]", "a.b", "b_*"]
)


@given(st.lists(globs, min_size=1, max_size=4), st.lists(parts, min_size=1, max_size=4))
@example(["**"], ["a"])
@example(["a", "**"], ["a", "b", "b"])
@example(["**", "a", "**"], ["b", "a", "b"])
def test_glob_is_its_slow_definition(pattern, path):
    if pattern[-1] == "**" and len(pattern) > 1:
        pattern = [*pattern, "*"]  # a final ** asks for at least one component
    got = tree.glob("/".join(pattern))("/".join(path), None)
    assert got == matches(pattern, path)


@given(some_tree, some_tree)
def test_check_like_accepts_only_its_like(one, other):
    tree.check_like(one, jax.tree.map(lambda v: v + 1, one))
    shapes = lambda t: jax.tree.map(np.shape, t)
    if jax.tree.structure(one) == jax.tree.structure(other):
        alike = shapes(one) == shapes(other)
    else:
        alike = False
    if not alike:
        with pytest.raises(ValueError, match=r"tree (has|differs)"):
            tree.check_like(one, other)


@given(st.sets(names, min_size=1, max_size=5), names)
def test_a_new_leaf_moves_no_other_key(present, new):
    key = jax.random.key(3)
    before = tree.keys_like(key, dict.fromkeys(present, 0))
    after = tree.keys_like(key, dict.fromkeys(present | {new}, 0))
    data = lambda k: jax.random.key_data(k).tolist()
    assert all(data(after[n]) == data(before[n]) for n in present)
    assert len({tuple(data(k)) for k in after.values()}) == len(after)


positive = st.floats(0, width=32, allow_nan=False)
few = st.sampled_from([0.0, 1.0, 2.0, 1e-45, 3e38, np.inf])  # many ties


@given(trees(leaves(positive)) | trees(leaves(few)), st.data())
def test_kth_largest_is_the_sorted_one(one, data):
    flat = np.concatenate([np.ravel(v) for v in jax.tree.leaves(one)])
    k = data.draw(st.integers(0, flat.size + 2))
    got = tree.kth_largest(one, k)
    ordered = np.sort(flat)[::-1]
    want = np.inf if k == 0 else ordered[k - 1] if k <= flat.size else 0
    assert got == np.float32(want)
    if 0 < k <= flat.size:
        assert (flat > got).sum() < k <= (flat >= got).sum()


@given(hnp.arrays(np.float32, (3, 4, 5), elements=positive), st.data())
def test_kth_largest_per_model_and_per_leaf(x, data):
    ranks = data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=3))
    two = {"a": x, "b": x[:, :1, 0] + 1}
    stacked = tree.kth_largest(two, np.array(ranks), stacked=True)
    per_leaf = tree.kth_largest(two, np.array(ranks), per="leaf", stacked=True)
    for i, r in enumerate(ranks):
        model = {"a": x[i], "b": two["b"][i]}
        assert stacked[i] == tree.kth_largest(model, r)
        assert per_leaf["a"][i] == np.sort(x[i], axis=None)[-r]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_kth_largest_in_other_dtypes(dtype):
    with jax.enable_x64(True):
        x = jnp.abs(jax.random.normal(jax.random.key(0), (1000,), jnp.float64))
        x = x.astype(dtype)
        ordered = np.sort(np.asarray(x, np.float64))[::-1]
        for k in (1, 17, 500, 1000):
            assert float(tree.kth_largest([x], k)) == ordered[k - 1]


def test_kth_largest_of_sharded_leaves():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    x = jnp.abs(jax.random.normal(jax.random.key(0), (3, 16, 8)))
    for spec in (PartitionSpec(None, "d"), PartitionSpec(None, None, "d")):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        got = jax.jit(ft.partial(tree.kth_largest, k=7, stacked=True))({"w": placed})
        np.testing.assert_array_equal(got, np.sort(x.reshape(3, -1))[:, -7])


def test_kth_largest_ranks_nan_above_infinity():
    x = [jnp.array([1.0, jnp.nan, jnp.inf])]
    assert jnp.isnan(tree.kth_largest(x, 1))
    assert tree.kth_largest(x, 2) == jnp.inf
    assert tree.kth_largest(x, 3) == 1


@given(st.floats(0, 1), st.integers(1, 10**12))
@example(0.29, 100)
@example(0.7, 10)
def test_count_is_exact(fraction, total):
    want = 0 if fraction == 0 else min(total, max(1, int(fraction * total)))
    assert int(tree.count(fraction, total)) == want


@given(st.floats(0, 1, width=32, allow_subnormal=False), st.integers(1, 10**12))
def test_traced_counts_are_exact(fraction, total):
    want = 0 if fraction == 0 else min(total, max(1, int(fraction * total)))
    assert int(_traced_count(np.float32(fraction), total)) == want


def _traced_count(fraction, total):
    return jax.vmap(lambda f: tree.count(f, total))(jnp.asarray(fraction)[None])[0]


@given(some_tree.filter(lambda t: jax.tree.leaves(t)))
def test_norms_are_those_of_the_flat_vector(one):
    small = jax.tree.map(lambda v: np.clip(v, -1e15, 1e15), one)
    flat = np.concatenate([np.ravel(v) for v in jax.tree.leaves(small)])
    flat = flat.astype(np.float64)
    flat[np.abs(flat) < np.finfo(np.float32).tiny] = 0  # to XLA, subnormals are 0
    for kind, want in ((1, 1), (2, 2), ("inf", np.inf)):
        size = np.linalg.norm(flat, want) if flat.size else 0
        tiny = 1e-18 if kind == 2 else 0  # squares below float32's range
        np.testing.assert_allclose(tree.norm(small, ord=kind), size, 1e-5, tiny)
    np.testing.assert_allclose(tree.dot(small, small), (flat**2).sum(), 1e-5, 1e-36)


@given(trees(leaves(st.floats(-100, 100, width=32, allow_subnormal=False))))
def test_arithmetic_is_leaf_by_leaf(one):
    same(tree.subtract(tree.add(one, one), one), one)
    same(tree.scale(one, 2.0), tree.add(one, one))
    assert abs(float(tree.cosine(one, one))) <= 1


def test_wrong_arguments_are_named():
    x = {"w": jnp.ones(3)}
    bad = [
        (lambda: tree.glob(), "at least one pattern"),
        (lambda: tree.glob("a", ""), "at least one pattern"),
        (lambda: tree.stack([]), "at least one tree"),
        (lambda: tree.stack([x, {"w": jnp.ones(2)}]), r"trees\[1\] differs at 'w'"),
        (lambda: tree.unstack({"a": jnp.ones(3), "b": jnp.ones(())}), "'b'"),
        (lambda: tree.partition(x, tree.glob("v")), "selects no leaf"),
        (lambda: tree.combine(x, x), "'w' is in 2"),
        (lambda: tree.combine({"w": None}), "'w' is in 0"),
        (lambda: tree.widen(jnp.ones(3, int)), "int32"),
        (lambda: tree.kth_largest({}, 1), "without leaves"),
        (lambda: tree.kth_largest(x, 1, per="row"), "per must be"),
        (lambda: tree.norm(x, ord=3), "ord must be"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("shape", [(1, 70_000, 40_000), (1, 2_500_000_000)])
def test_counts_go_beyond_32_bits(shape):
    """What every round of kth_largest counts with; fused, so it needs no memory."""
    count = jax.jit(lambda hit: _count(jnp.broadcast_to(hit, shape)))
    assert int(count(jnp.array(True))[0]) == np.prod(shape, dtype=np.int64)
