"""rewrite.passes: a function of whole leaves, evaluated in blocks, is the same."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import rewrite, tree
from jaxlab.rewrite import _evaluate
from jaxlab.rewrite._select import Search
from jaxlab.rewrite._threefry import bits_slice

KEY = jax.random.key(3)


def lift(x: Any, like: Any) -> Any:
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def mean(x):
    return x.mean(0)


def trim(x):
    size = jnp.abs(x)
    rank = tree.count(np.array([0.3, 0.5, 0.9]), x[0].size)
    cut = tree.kth_largest([size], rank, stacked=True)
    return jnp.where(size >= lift(cut, x), x, 0).sum(0)


def quantiles(x):
    size = jnp.abs(x)
    low, high = (
        tree.kth_largest([size], tree.count(f, x[0].size), stacked=True)
        for f in (0.75, 0.25)
    )
    return jnp.where((size >= lift(low, x)) & (size <= lift(high, x)), x, 0)[0]


def drop(x):
    keep = jax.random.uniform(KEY, x.shape) < 0.5
    return jnp.where(keep, x, jnp.zeros_like(x)).sum(0)


def drop_to_norm(x):
    keep = jax.random.bernoulli(KEY, 0.5, x.shape)
    kept = jnp.where(keep, x, 0)
    axes = tuple(range(1, x.ndim))
    scale = jnp.abs(x).sum(axes) / jnp.abs(kept).sum(axes)
    return (kept * lift(scale, x)).sum(0)


def gram(x):
    flat = x.reshape(x.shape[0], -1)
    weight = jnp.linalg.norm(jnp.einsum("kn,ln->kl", flat, flat), axis=1)
    return jnp.tensordot(weight, x, 1)


def extremes(x):
    return (x[0] - x.min()) / (x.max() - x.min())


def any_all(x):
    both = jnp.any(x[0] > 0) & jnp.all(x[1] < 100)
    return jnp.where(both, x[0], x[1])


def nested(x):  # a statistic of a statistic
    centred = x - x.mean()
    spread = jnp.sqrt(jnp.square(centred).mean())
    return jax.jit(lambda y: y[0] / spread)(centred)


def remat(x):
    return jax.checkpoint(lambda y: jnp.tanh(y).sum(0))(x)


def softmax(x):
    return jax.nn.softmax(x, -1).sum(0)


def row_norms(x):
    return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).sum(0)


def ranks(x):
    order = jnp.argsort(jnp.argsort(x.reshape(*x.shape[:2], -1), -1), -1)
    return (x * order.reshape(x.shape).astype(x.dtype)).sum(0)


def positions(x):
    return x[0] + jax.lax.broadcasted_iota(jnp.float32, x.shape[1:], 0)


def joined(x):
    return jnp.concatenate([x, jnp.zeros_like(x[:1])]).max(0)


def transposed(x):
    y = jnp.moveaxis(x, 1, -1)
    return jnp.moveaxis(y * 2, -1, 1).sum(0)


def running(x):
    return jnp.cumsum(x, 0)[-1]


def zeros(x):
    return jnp.zeros(x.shape[1:], x.dtype)


ANY_SHAPE = [
    mean, trim, quantiles, drop, drop_to_norm, gram, extremes, any_all, nested, remat,
    joined, running, zeros,
]  # fmt: skip
BY_ROWS = [softmax, row_norms, ranks, positions, transposed]


def run(fn: Callable, x: np.ndarray, step: int, kind: str) -> np.ndarray:
    """`fn(x)`, where x `[k, *leaf]` arrives in blocks of `step` rows."""
    leaf = rewrite.Leaf((jax.ShapeDtypeStruct(x.shape, x.dtype),), (1,))
    wrapped = lambda arrays: [fn(arrays[0])]
    if kind == "flat":
        plan = rewrite.flat(wrapped, [leaf])
        assert plan is not None
        x = x.reshape(len(x), -1)
    else:
        plan = rewrite.passes(wrapped, [leaf])

    def blocks(_: int, sample: bool):
        if sample:
            rows = np.linspace(0, x.shape[1] - 1, min(step, x.shape[1])).astype(int)
            yield 0, [np.ascontiguousarray(x[:, rows])]
            return
        for row in range(0, x.shape[1], step):
            yield row, [np.ascontiguousarray(x[:, row : row + step])]

    known = rewrite.statistics(plan, blocks)
    parts = [np.asarray(y) for _, y in rewrite.results(plan, known, 0, blocks)]
    return np.concatenate(parts)


def data(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, *shape)).astype("f4")


@pytest.mark.parametrize("shape", [(97,), (24, 5), (6, 4, 3)])
@pytest.mark.parametrize("fn", ANY_SHAPE, ids=lambda f: f.__name__)
def test_flat_blocks_agree(fn, shape):
    x = data(shape)
    want = np.asarray(fn(jnp.asarray(x)))
    got = run(fn, x, 16, "flat").reshape(shape)
    np.testing.assert_allclose(
        got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max())
    )


@pytest.mark.parametrize("shape", [(24, 5), (6, 4, 3)])
@pytest.mark.parametrize("fn", BY_ROWS, ids=lambda f: f.__name__)
def test_row_blocks_agree(fn, shape):
    x = data(shape)
    leaf = rewrite.Leaf((jax.ShapeDtypeStruct(x.shape, x.dtype),), (1,))
    assert rewrite.flat(lambda a: [fn(a[0])], [leaf]) is None
    want = np.asarray(fn(jnp.asarray(x)))
    np.testing.assert_allclose(run(fn, x, 5, "rows"), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("fn", ANY_SHAPE, ids=lambda f: f.__name__)
def test_methods_of_any_shape_also_go_by_rows(fn):
    x = data((24, 5))
    want = np.asarray(fn(jnp.asarray(x)))
    atol = 2e-6 * max(1, np.abs(want).max())
    np.testing.assert_allclose(run(fn, x, 7, "rows"), want, rtol=0, atol=atol)


@pytest.mark.parametrize("fn", [trim, quantiles, drop, mean], ids=lambda f: f.__name__)
def test_no_bit_depends_on_the_block_size(fn):
    x = data((40, 6))
    want = run(fn, x, 240, "flat")
    for step in (7, 64, 101):
        np.testing.assert_array_equal(run(fn, x, step, "flat"), want)


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda x: jnp.cumsum(x[0], 0), "cumsum along the split axis"),
        (lambda x: jnp.sort(x[0], 0), "sort along the split axis"),
        (lambda x: x[0][::-1], "rev along the split axis"),
        (
            lambda x: x[0] + jnp.arange(24.0).reshape(24, 1)[::-1],
            "neither read nor made",
        ),
        (lambda x: jnp.linalg.svd(x[0], full_matrices=False)[0], "svd"),
    ],
)
def test_what_blocks_cannot_do_is_refused_by_name(fn, match):
    leaf = rewrite.Leaf((jax.ShapeDtypeStruct((3, 24, 5), np.float32),), (1,))
    with pytest.raises(rewrite.Refused, match=match):
        rewrite.passes(lambda a: [fn(a[0])], [leaf])


def by_width(x):  # the same steps in any shape, but another constant
    return x.sum(0) / x.shape[-1]


def test_a_function_that_asks_for_the_shape_is_not_flattened():
    leaf = rewrite.Leaf((jax.ShapeDtypeStruct((3, 24, 5), np.float32),), (1,))
    assert rewrite.flat(lambda a: [by_width(a[0])], [leaf]) is None
    x = data((24, 5))
    np.testing.assert_allclose(run(by_width, x, 5, "rows"), x.sum(0) / 5, rtol=1e-6)


def test_leaves_that_share_a_threshold_are_evaluated_together():
    xs = {"a": data((30, 4)), "b": data((50,), 1) * 3}

    def fn(models):
        size = jax.tree.map(jnp.abs, models)
        total = sum(x[0].size for x in models.values())
        cut = tree.kth_largest(size, tree.count(0.4, total), stacked=True)
        pick = lambda s, x: jnp.where(s >= lift(cut, x), x, 0).sum(0)
        return jax.tree.map(pick, size, models)

    assert not rewrite.leafwise(fn, xs)
    assert rewrite.leafwise(lambda t: jax.tree.map(lambda x: x.mean(0), t), xs)
    leaves = [
        rewrite.Leaf((jax.ShapeDtypeStruct(x.shape, x.dtype),), (1,))
        for x in xs.values()
    ]
    plan = rewrite.passes(
        lambda a, b: list(fn({"a": a[0], "b": b[0]}).values()), leaves
    )
    arrays = list(xs.values())

    def blocks(leaf: int, sample: bool):
        del sample
        for row in range(0, arrays[leaf].shape[1], 7):
            yield row, [np.ascontiguousarray(arrays[leaf][:, row : row + 7])]

    known = rewrite.statistics(plan, blocks)
    for i, want in enumerate(fn(jax.tree.map(jnp.asarray, xs)).values()):
        parts = [np.asarray(y) for _, y in rewrite.results(plan, known, i, blocks)]
        np.testing.assert_array_equal(np.concatenate(parts), np.asarray(want))


def test_thresholds_of_large_leaves_are_exact(monkeypatch):
    """With room for few values, the search samples, counts and narrows."""
    x = data((500, 8))
    x[:, ::3] = np.round(x[:, ::3])  # many ties
    want = run(trim, x, 4000, "flat")
    for room in (3, 64, 2000):
        monkeypatch.setattr(_evaluate, "ROOM", room)
        np.testing.assert_array_equal(run(trim, x, 300, "flat"), want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_search_finds_the_kth_largest(draw):
    n = draw.draw(st.integers(1, 400))
    seed = draw.draw(st.integers(0, 2**16))
    values = np.random.default_rng(seed).standard_normal(n).astype("f4") ** 2
    if draw.draw(st.booleans()):
        values = np.round(values)
    if draw.draw(st.booleans()):
        values[: n // 2] = 0
    rank = draw.draw(st.integers(-1, n + 2))
    search = Search(rank, np.dtype("f4"), room=draw.draw(st.integers(1, n + 1)))
    if draw.draw(st.booleans()):
        search.guess(values[:: max(1, n // 9)], n)
    for _ in range(200):
        if search.answer is not None:
            break
        for part in np.array_split(values, draw.draw(st.integers(1, 4))):
            search.feed(part)
        search.turn()
    ordered = np.sort(values)[::-1]
    expected = np.inf if rank < 1 else ordered[rank - 1] if rank <= n else 0
    assert search.answer == expected


@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 50), 1), ((2, 5, 6), 1), ((40,), 0), ((2, 3, 5), 0)]
)
def test_random_bits_of_a_slice_are_the_library_s(shape, axis):
    want = np.asarray(jax.random.bits(KEY, shape))
    start, size = 1, shape[axis] - 1
    got = bits_slice(KEY, shape, axis, start, size)
    taken = np.take(want, range(start, start + size), axis)
    np.testing.assert_array_equal(np.asarray(got), taken)


def test_random_bits_go_past_32_bits():
    from jax.extend.random import threefry_2x32

    shape, start = (2, 3_000_000_000), 2_900_000_000
    got = bits_slice(KEY, shape, 1, start, 4)
    index = shape[1] + start + np.arange(4, dtype=np.uint64)
    count = np.concatenate([index >> np.uint64(32), index]).astype(np.uint32)
    words = np.asarray(threefry_2x32(jax.random.key_data(KEY), jnp.asarray(count)))
    np.testing.assert_array_equal(np.asarray(got)[1], words[:4] ^ words[4:])


def test_other_generators_are_not_drawn_in_part():
    key = jax.random.key(0, impl="rbg")
    leaf = rewrite.Leaf((jax.ShapeDtypeStruct((3, 64), np.float32),), (1,))
    with pytest.raises(rewrite.Refused):
        rewrite.passes(lambda a: [a[0][0] * jax.random.uniform(key, (64,))], [leaf])


def test_leaves_of_one_size_share_their_executables():
    from jaxlab.rewrite._blocks import _compile

    x = data((30,))
    run(trim, x, 10, "flat")
    before = _compile.cache_info().misses
    run(trim, data((30,), 1), 10, "flat")
    run(trim, data((60,), 1), 10, "flat")
    assert _compile.cache_info().misses == before
