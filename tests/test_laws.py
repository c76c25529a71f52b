"""Identities that define the merge methods."""

import functools as ft

from cases import MERGE, close, model, stacked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge, tree

KEY = jax.random.key(7)
each = jax.tree.map


def first(stack):
    return each(lambda v: v[0], stack)


ALONE = {
    **{n: {} for n in ("linear", "average", "multislerp", "karcher", "passthrough")},
    **{n: {} for n in ("task_arithmetic", "model_stock", "sce")},
    "ties": {"density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": {"density": 1.0},
    "ram": {"threshold": 0.0},
    "ramplus_tl": {"threshold": 0.0, "gain": 0.0},
    "dare_linear": {"density": 1.0, "key": KEY},
    "dare_ties": {"density": 1.0, "key": KEY},
    "della": {"density": 1.0, "key": KEY},
    "della_linear": {"density": 1.0, "key": KEY},
}


@pytest.mark.parametrize("name", ALONE)
def test_one_model_merges_to_itself(name):
    one = stacked(1)
    close(getattr(merge, name)(one, **ALONE[name]), first(one))


@pytest.mark.parametrize("name", ["linear", "average", "multislerp", "karcher"])
def test_equal_models_merge_to_themselves(name):
    same = each(lambda v: jnp.stack([v] * 3), model())
    close(getattr(merge, name)(same), model())


@pytest.mark.parametrize("name", ["slerp", "nuslerp", "nearswap", "arcee_fusion"])
def test_two_equal_models_merge_to_themselves(name):
    same = each(lambda v: jnp.stack([v] * 2), model())
    close(getattr(merge, name)(same, **MERGE[name].coefficients), model())


SCALED = [n for n, c in MERGE.items() if "scale" in c.coefficients and c.scales]


@pytest.mark.parametrize(
    "name", [n for n in SCALED if len(MERGE[n].data("f4", 0)) == 1]
)
def test_scale_0_gives_the_base_and_scale_2_doubles(name):
    case = MERGE[name]
    key = {"key": KEY} if case.random else {}
    call = ft.partial(case.fn, *case.data("float32", 0), **key)
    others = {n: v for n, v in case.coefficients.items() if n != "scale"}
    zero, one, two = (call(**others, scale=s) for s in (0.0, 1.0, 2.0))
    assert all((v == 0).all() for v in jax.tree.leaves(zero))
    close(two, each(lambda v: 2 * v, one))


def test_scale_0_gives_the_base_to_the_bit():
    base, deltas = model("bfloat16"), stacked(3, "bfloat16", 1)
    around = merge.on_base(ft.partial(merge.ties, scale=0.0))
    for got in (around(deltas, base), merge.add(base, first(deltas), scale=0.0)):
        assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(base)))


PERMUTABLE = (
    "linear average multislerp karcher task_arithmetic ties breadcrumbs "
    "breadcrumbs_ties sce ram ramplus_tl model_stock"
).split()


@pytest.mark.parametrize("name", PERMUTABLE)
def test_the_order_of_models_does_not_matter(name):
    case, order = MERGE[name], np.array([2, 0, 1])
    turn = lambda c: c[order] if np.ndim(c) else c
    turned = {n: turn(c) for n, c in case.coefficients.items()}
    want = case.fn(stacked(3), **case.coefficients)
    close(case.fn(each(lambda v: v[order], stacked(3)), **turned), want)


ODD = (
    "linear average slerp nuslerp multislerp karcher passthrough nearswap "
    "task_arithmetic ties breadcrumbs breadcrumbs_ties sce ram ramplus_tl model_stock"
).split()


@pytest.mark.parametrize("name", ODD)
def test_negative_models_merge_to_the_negative(name):
    case = MERGE[name]
    (data,) = case.data("float32", 0)
    want = each(jnp.negative, case.fn(data, **case.coefficients))
    close(case.fn(each(jnp.negative, data), **case.coefficients), want)


@pytest.mark.parametrize("name", ["linear", "multislerp", "karcher"])
def test_only_the_ratio_of_weights_counts(name):
    method = ft.partial(getattr(merge, name), stacked(3))
    close(method(weights=[1.0, 2.0, 3.0]), method(weights=[10.0, 20.0, 30.0]))


def test_shift_of_all_models_shifts_the_linear_merge():
    """The weights sum to one."""
    shifted = each(lambda v: v + 5, stacked(3))
    want = each(lambda v: v + 5, merge.linear(stacked(3), weights=[0.2, 0.5, 0.1]))
    close(merge.linear(shifted, weights=[0.2, 0.5, 0.1]), want, 2e-6)


@pytest.mark.parametrize("consensus", ["mean", "majority", "weighted_mean"])
def test_ties_of_agreeing_models_is_their_mean(consensus):
    positive = each(jnp.abs, stacked(3))
    got = merge.ties(positive, density=1.0, consensus=consensus)
    close(got, merge.average(positive))


def test_ties_is_trim_elect_fuse():
    trimmed = merge.trim(stacked(3), density=0.5)
    by_hand = merge.fuse(trimmed, merge.elect(trimmed), mean="count")
    close(merge.ties(stacked(3), density=0.5), by_hand, 0)


def test_ram_is_fuse_of_what_changed():
    changed = each(lambda v: jnp.abs(v) > 0.7, stacked(3))
    close(
        merge.ram(stacked(3), threshold=0.7),
        merge.fuse(stacked(3), changed, mean="count"),
    )


def test_exact_ties_elect_plus_under_jit_too():
    """A multiply-add that rounds once would give these ties a sign."""
    x = jnp.abs(jax.random.normal(KEY, (2, 4096))).at[1].set(0.0)
    tied = {"w": jnp.stack([x[0], -x[0]])}
    elect = ft.partial(merge.elect, weights=[0.3, 0.3])
    for got in (elect(tied)["w"], jax.jit(elect)(tied)["w"]):
        assert got[0].all()
        assert not got[1].any()


def test_slerp_and_nuslerp_keep_to_the_sphere():
    x = jax.random.normal(KEY, (2, 50))
    unit = {"w": x / jnp.linalg.norm(x, axis=1, keepdims=True)}
    for t in (0.0, 0.25, 1.0, 1.5):
        got = merge.slerp(unit, t=t)
        close(got, merge.nuslerp(unit, weights=[1 - t, t]))
        np.testing.assert_allclose(jnp.linalg.norm(got["w"]), 1, rtol=1e-6)
    close(merge.slerp(unit, t=0.0), first(unit))


def test_karcher_of_two_is_the_middle_of_the_arc():
    pair = stacked(2)
    close(merge.karcher(pair, max_iter=50), merge.multislerp(pair), 2e-6)
    norms = lambda m: each(lambda v: jnp.linalg.norm(v), m)
    mean = each(lambda a, b: (a + b) / 2, *map(norms, tree.unstack(pair)))
    close(norms(merge.karcher(pair)), mean)


def test_karcher_is_where_the_pulls_cancel():
    x = jax.random.normal(KEY, (4, 30))
    m = merge.karcher({"w": x}, max_iter=100, tol=1e-7)["w"]
    m, u = m / jnp.linalg.norm(m), x / jnp.linalg.norm(x, axis=1, keepdims=True)
    angle = jnp.arccos(u @ m)
    logs = (angle / jnp.sin(angle))[:, None] * (u - (u @ m)[:, None] * m[None])
    np.testing.assert_allclose(logs.sum(0), 0, atol=2e-6)


@pytest.mark.parametrize("name", ["slerp", "karcher", "multislerp", "nuslerp"])
def test_nearly_parallel_models_are_exact(name):
    """Models a millionth apart: the float64 result to float32 rounding."""
    base = jax.random.normal(KEY, (1, 4096)) + 3
    noise = 1e-6 * jax.random.normal(jax.random.key(1), (2, 4096))
    data = {"w": base + noise}
    options = {"t": 0.3, "threshold": 1.0} if name == "slerp" else {}
    got = getattr(merge, name)(data, **options)["w"]
    with jax.enable_x64(True):
        wide = {"w": data["w"].astype(jnp.float64)}
        want = getattr(merge, name)(wide, **options)["w"]
    np.testing.assert_allclose(got, want, rtol=3e-7)


def test_nearswap_moves_by_at_most_t():
    base, other = stacked(2)["a"]
    got = merge.nearswap(stacked(2), t=0.1)["a"]
    assert (jnp.abs(got - base) <= 0.1 + 1e-6).all()
    close(merge.nearswap(stacked(2), t=100.0)["a"], other)


@pytest.mark.parametrize("density", [0.1, 0.35, 0.5, 1.0])
def test_trim_keeps_exactly_the_count(density):
    out = merge.trim(stacked(3), density=density)
    kept = sum((v != 0).reshape(3, -1).sum(1) for v in jax.tree.leaves(out))
    size = sum(v[0].size for v in jax.tree.leaves(out))
    assert kept.tolist() == [max(1, int(density * size))] * 3
    by_leaf = merge.trim(stacked(3), density=density, per="leaf")
    for v in jax.tree.leaves(by_leaf):
        assert (
            (v != 0).reshape(3, -1).sum(1) == max(1, int(density * v[0].size))
        ).all()


def test_trim_outliers_skips_the_largest():
    x = {"w": jnp.arange(1.0, 101.0)[None]}
    kept = merge.trim_outliers(x, density=0.3, gamma=0.1)["w"][0]
    assert np.flatnonzero(kept).tolist() == list(range(60, 90))
    few = merge.trim_outliers(x, density=0.95, gamma=0.5)["w"][0]
    assert np.flatnonzero(few).tolist() == list(range(95))


def test_drop_keeps_the_mean_and_l1_keeps_the_norm():
    x = {"w": jax.random.normal(KEY, (2, 200, 200))}
    thin = merge.drop(x, density=[0.3, 0.8], key=KEY)["w"]
    kept = (thin != 0).mean((1, 2))
    np.testing.assert_allclose(kept, [0.3, 0.8], atol=0.01)
    np.testing.assert_allclose(
        thin[0][thin[0] != 0] * 0.3, x["w"][0][thin[0] != 0], 1e-5
    )
    same = merge.drop(x, density=0.3, rescale="l1", key=KEY)["w"]
    norm = lambda v: jnp.abs(v).sum((1, 2))
    np.testing.assert_allclose(norm(same), norm(x["w"]), rtol=1e-5)


def test_a_new_leaf_moves_no_other_draw():
    x = stacked(2)
    more = {**x, "0": x["a"]}
    got = [merge.drop(v, density=0.5, key=KEY)["b"] for v in (x, more)]
    close(*got, 0)


def test_drop_by_rank_ranks_rows_and_shares_ties():
    rows = {"w": jnp.tile(jnp.arange(1.0, 101.0), (1, 400, 1))}
    kept = (merge.drop_by_rank(rows, density=0.5, epsilon=0.4, key=KEY)["w"] != 0)[0]
    by_rank = kept.mean(0)
    np.testing.assert_allclose(by_rank[:10].mean(), 0.14, atol=0.03)
    np.testing.assert_allclose(by_rank[-10:].mean(), 0.86, atol=0.03)
    equal = {"w": jnp.ones((1, 400, 100))}
    thin = merge.drop_by_rank(equal, density=0.5, epsilon=0.4, key=KEY)["w"]
    np.testing.assert_allclose(thin[thin != 0], 2.0, rtol=1e-6)
    ends = {"w": jnp.array([[3.0, 1.0, 3.0, 2.0]])}
    chance = merge.drop_by_rank(ends, density=0.5, epsilon=0.3, key=jax.random.key(1))
    scale = {0.2: 1.0, 0.4: 2.0, 0.7: 3.0}
    for p, size in scale.items():
        for v in chance["w"][0][ends["w"][0] == size]:
            assert v == 0 or np.isclose(v, size / p)


def test_traced_weights_that_sum_to_0_are_not_normalised():
    call = jax.jit(lambda w: merge.linear(stacked(2), weights=w))
    want = merge.linear(stacked(2), weights=[1.0, -1.0], normalize=False)
    close(call(jnp.array([1.0, -1.0])), want)


def test_coefficients_may_hold_traced_entries():
    call = jax.jit(lambda w: merge.linear(stacked(2), weights=[w, 3.0]))
    close(call(1.0), merge.linear(stacked(2), weights=[1.0, 3.0]))


def test_on_base_rounds_once():
    """Task vectors in bfloat16 would lose most of a small update."""
    base = each(lambda v: v.astype(jnp.bfloat16), model())
    tuned = each(lambda b: b.astype(jnp.float32) + 1e-4, base)
    models = each(lambda v: jnp.stack([v] * 2), tuned)
    got = merge.on_base(merge.linear)(models, base)
    want = each(lambda v, b: v.astype(b.dtype), tuned, base)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


def test_learned_weights_find_a_known_mixture():
    """The gradient flows through a merge to its coefficients, tensor by tensor."""
    target = merge.linear(stacked(3), weights=[0.6, 0.3, 0.1])

    def loss(w):
        got = merge.task_arithmetic(stacked(3), weights=w)
        return sum(
            jnp.sum((a - b) ** 2)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(target), strict=True)
        )

    step = jax.jit(lambda w: each(lambda v, g: v - 0.01 * g, w, jax.grad(loss)(w)))
    w = each(lambda _: jnp.full(3, 1 / 3), model())
    for _ in range(400):
        w = step(w)
    for leaf in jax.tree.leaves(w):
        np.testing.assert_allclose(leaf, [0.6, 0.3, 0.1], atol=1e-3)
