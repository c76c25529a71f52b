"""ExPO, MagMax, EMR, TALL masks, BitDelta, Model Stock: the identities behind them."""

import functools as ft

from cases import stacked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import merge

each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def flat(tree):
    """All entries of k models, `[k, n]`, in float64."""
    rows = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([r.reshape(len(r), -1) for r in rows], axis=1)


def one(tree):
    """All entries of one model, in float64."""
    return flat(each(lambda x: x[None], tree))[0]


# --- ExPO and MagMax --------------------------------------------------------------


def test_expo_lies_on_the_line_beyond_the_aligned_model():
    models, base = stacked(1), each(lambda x: x[0], stacked(1, seed=5))
    got = merge.on_base(merge.expo)(models, base, alpha=0.3)
    want = each(lambda m, b: m[0] + 0.3 * (m[0] - b), models, base)
    close(got, want)
    close(merge.on_base(merge.expo)(models, base, alpha=-1.0), base)


def test_expo_of_several_extrapolates_their_mean():
    want = each(lambda x: 1.5 * x.mean(0), stacked(3))
    close(merge.expo(stacked(3), alpha=0.5), want)
    with pytest.raises(ValueError, match="alpha has shape"):
        merge.expo(stacked(3), alpha=[0.1, 0.2, 0.3])


def test_magmax_takes_the_largest_and_the_last_of_equals():
    x = flat(stacked(3))
    want = x[np.abs(x).argmax(0), np.arange(x.shape[1])]
    np.testing.assert_allclose(one(merge.magmax(stacked(3))), want, rtol=1e-6)
    ties = {"w": jnp.array([[1.0, -2.0], [-1.0, 2.0], [0.5, 1.0]])}
    np.testing.assert_array_equal(merge.magmax(ties)["w"], [-1.0, 2.0])


# --- EMR ---------------------------------------------------------------------------


def test_emr_is_the_papers_elect_mask_and_rescale():
    x, parts = flat(stacked(3)), merge.emr(stacked(3))
    sign = np.where(x.sum(0) > 0, 1, -1)
    agree = x * sign > 0
    unified = sign * np.where(agree, np.abs(x), 0).max(0)
    np.testing.assert_allclose(one(parts.unified), unified, rtol=1e-6)
    np.testing.assert_array_equal(flat(parts.masks), agree)
    whole, masked = np.abs(x).sum(1), np.abs(agree * unified).sum(1)
    np.testing.assert_allclose(parts.rescalers, whole / masked, rtol=1e-6)


def test_emr_keeps_the_size_and_the_signs_of_every_task():
    x, parts = stacked(4), merge.emr(stacked(4))
    tasks = jit(jax.vmap(merge.emr_task, (None, 0)))(parts, jnp.arange(4))
    got, want = flat(tasks), flat(x)
    np.testing.assert_allclose(np.abs(got).sum(1), np.abs(want).sum(1), rtol=1e-6)
    assert (got * want >= 0).all()
    for i in range(4):
        close(merge.emr_task(parts, i), each(lambda t, i=i: t[i], tasks))


def test_emr_gives_one_task_and_equal_tasks_back():
    alone = merge.emr(stacked(1))
    close(merge.emr_task(alone, 0), each(lambda x: x[0], stacked(1)), 0)
    same = each(lambda x: jnp.concatenate([x] * 3), stacked(1))
    close(merge.emr_task(merge.emr(same), 2), each(lambda x: x[0], same), 0)


def test_emr_by_leaf_weighs_a_small_leaf_as_much_as_a_large_one():
    x = {"a": jnp.array([[1.0], [3.0]]), "b": jnp.array([[2.0] * 4, [1.0] * 4])}
    np.testing.assert_allclose(merge.emr(x).rescalers * 11, [9, 7], rtol=1e-6)
    by_leaf = merge.emr(x, by="leaf").rescalers
    np.testing.assert_allclose(by_leaf * 5, [3, 4], rtol=1e-6)


def test_emr_where_nothing_agrees():
    opposed = {"w": jnp.array([[1.0, -1.0], [-1.0, 1.0], [-0.5, -0.5]])}
    parts = merge.emr(opposed)
    np.testing.assert_array_equal(parts.unified["w"], [-1.0, -1.0])
    lonely = merge.emr({"w": jnp.array([[2.0], [-3.0], [0.0]])})
    np.testing.assert_array_equal(lonely.rescalers, [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(merge.emr_task(lonely, 0)["w"], [0.0])
    tied = merge.emr({"w": jnp.array([[2.0], [-2.0]])})
    np.testing.assert_array_equal(tied.unified["w"], [-2.0])


def test_emr_rounds_once_and_refuses_what_it_cannot_do():
    half = merge.emr(stacked(3, "bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(half.unified)} == {jnp.bfloat16.dtype}
    assert half.rescalers.dtype == jnp.float32
    assert merge.emr_task(half, 1)["a"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="there are 3 tasks"):
        merge.emr_task(half, 3)
    with pytest.raises(ValueError, match="'entry' or 'leaf'"):
        merge.emr(stacked(2), by="tree")
    with pytest.raises(ValueError, match="'n' of dtype int32"):
        merge.emr({"n": jnp.zeros((2, 3), jnp.int32)})


def test_sharded_and_batched_task_vectors_give_the_same_parts():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    last = jax.sharding.PartitionSpec(None, None, "d")
    spread = jax.sharding.NamedSharding(mesh, last)
    run = lambda x: (merge.emr(x), merge.bitdelta(x))
    want = jit(run)(stacked(3))
    close(jit(run)(jax.device_put(stacked(3), spread)), want)
    batch = each(lambda x: jnp.stack([x, x]), stacked(3))
    close(each(lambda x: x[1], jit(jax.vmap(run))(batch)), want)


# --- TALL masks and Consensus --------------------------------------------------------


def test_a_mask_of_threshold_one_is_the_best_binary_mask():
    """Section 4.1: it minimises |m * merged - task| entry by entry."""
    x = flat(stacked(3))
    merged = x.sum(0)
    got = flat(merge.tall_masks(stacked(3), threshold=1.0)).astype(bool)
    best = np.abs(merged - x) < np.abs(x)
    np.testing.assert_array_equal(got, best)


def test_thresholds_are_per_task_and_masks_shrink_with_them():
    low = flat(merge.tall_masks(stacked(3), threshold=0.2))
    high = flat(merge.tall_masks(stacked(3), threshold=0.6))
    assert (low >= high).all()
    assert low.sum() > high.sum()
    mixed = flat(merge.tall_masks(stacked(3), threshold=[0.2, 0.6, 0.2]))
    np.testing.assert_array_equal(mixed, np.stack([low[0], high[1], low[2]]))


def test_a_lone_task_needs_all_it_moved():
    masks = merge.tall_masks({"w": jnp.array([[1.0, 0.0, -2.0]])}, threshold=0.6)
    np.testing.assert_array_equal(masks["w"], [[True, False, True]])


def test_masks_of_another_multi_task_vector():
    x, merged = stacked(3), merge.ties(stacked(3))
    got = merge.tall_masks(x, merged, threshold=0.5)
    want = each(lambda v, m: abs(v) > 0.5 * abs(m[None] - v), x, merged)
    close(each(jnp.float32, got), each(jnp.float32, want), 0)
    with pytest.raises(ValueError, match="merged differs at 'a'"):
        merge.tall_masks(x, x)


@pytest.mark.parametrize("votes", range(5))
def test_consensus_keeps_what_enough_tasks_use(votes):
    x, masks = flat(stacked(3)), flat(merge.tall_masks(stacked(3), threshold=0.5))
    want = np.where(masks.sum(0) >= votes, x.sum(0), 0) * 0.3
    got = merge.consensus_ta(stacked(3), threshold=0.5, votes=votes, scale=0.3)
    np.testing.assert_allclose(one(got), want, rtol=1e-5, atol=1e-6)
    assert (votes < 4) == bool(np.any(one(got)))


def test_consensus_without_votes_is_the_merge_itself():
    plain = merge.task_arithmetic(stacked(3))
    close(merge.consensus_ta(stacked(3), votes=0), plain)
    ties = merge.ties(stacked(3), density=0.4, consensus="weighted_sum")
    close(merge.consensus_ties(stacked(3), density=0.4, votes=0), ties)
    masks = merge.tall_masks(stacked(3), ties, threshold=0.4)
    kept = each(lambda m, t: jnp.where(m.sum(0) >= 2, t, 0), masks, ties)
    close(merge.consensus_ties(stacked(3), density=0.4), kept)
    with pytest.raises(ValueError, match="votes must be at least 0"):
        merge.consensus_ta(stacked(3), votes=-1)


# --- BitDelta ------------------------------------------------------------------------


def test_bits_are_numpys_little_bits():
    x = np.random.default_rng(0).normal(size=(2, 3, 37))
    bits = merge.bitdelta({"w": jnp.asarray(x, jnp.float32)}).bits["w"]
    assert bits.shape == (2, 3, 2)
    want = np.packbits(x >= 0, axis=-1, bitorder="little")
    np.testing.assert_array_equal(np.asarray(bits).view(np.uint8)[..., :5], want)
    assert not np.asarray(bits).view(np.uint8)[..., 5:].any()


@pytest.mark.parametrize("per", ["leaf", "matrix"])
def test_bitdelta_is_the_nearest_of_its_signs(per):
    """No other scale is nearer, matrix by matrix."""
    random = np.random.default_rng(1).normal(size=(2, 4, 5, 7))
    x = {"w": jnp.asarray(random, jnp.float32), "b": jnp.ones((2,))}
    small = jit(ft.partial(merge.bitdelta, per=per))(x)
    assert small.scales["w"].shape == {"leaf": (2,), "matrix": (2, 4)}[per]
    back = jit(merge.bitdelta_restore)(small, x)
    sign = np.where(np.asarray(x["w"]) >= 0, 1, -1)
    np.testing.assert_array_equal(np.sign(back["w"]), sign)
    axes = (2, 3) if per == "matrix" else (1, 2, 3)
    best = (np.asarray(x["w"]) * sign).mean(axes)  # <x, s> / <s, s>
    np.testing.assert_allclose(small.scales["w"], best, rtol=1e-6)
    np.testing.assert_array_equal(back["b"], [1.0, 1.0])


def test_bitdelta_restores_dtypes_shapes_and_zeros():
    like = {"w": jnp.zeros((2, 3), jnp.bfloat16)}
    back = merge.bitdelta_restore(merge.bitdelta(like), like)
    assert back["w"].dtype == jnp.bfloat16
    assert not np.asarray(back["w"], np.float32).any()
    with pytest.raises(ValueError, match=r"small\.bits differs at 'w'"):
        merge.bitdelta_restore(merge.bitdelta(like), {"w": jnp.zeros((2, 40))})
    with pytest.raises(ValueError, match="'leaf' or 'matrix'"):
        merge.bitdelta(like, per="row")


def test_scale_distillation_finds_the_least_squares_scale():
    """The logits of a linear model are quadratic in the scale: its minimum is known."""
    random = np.random.default_rng(2)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    base, delta, inputs = jnp.zeros((8, 3)), 0.1 * normal(1, 8, 3), normal(64, 8)
    small, target = merge.bitdelta({"w": delta}), inputs @ delta[0]

    def loss(scales):
        back = merge.bitdelta_restore(small._replace(scales=scales), {"w": delta})
        return jnp.mean((inputs @ (base + back["w"][0]) - target) ** 2)

    optimiser = optax.sgd(0.1)

    def step(carry, _):
        scales, state = carry
        value, gradient = jax.value_and_grad(loss)(scales)
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(scales, updates), state), value

    start = small.scales, optimiser.init(small.scales)
    (scales, _), losses = jit(lambda s: jax.lax.scan(step, s, length=40))(start)
    seen = inputs @ jnp.sign(delta[0])
    best = jnp.sum(seen * target) / jnp.sum(seen**2)
    np.testing.assert_allclose(scales["w"][0], best, rtol=1e-4)
    assert losses[-1] < losses[0]


# --- Model Stock ---------------------------------------------------------------------


def noisy(k, cos, size=64, seed=0):
    """k models, each the centre and noise of its own, all at right angles; centre."""
    random = np.random.default_rng(seed).normal(size=(size, k + 1))
    frame = np.linalg.qr(random)[0].T
    centre, noise = np.sqrt(cos) * frame[0], np.sqrt(1 - cos) * frame[1:]
    return centre + noise, centre


@pytest.mark.parametrize("mean", ["cosine", "angle"])
@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("cos", [0.2, 0.5, 0.9])
def test_model_stock_is_the_foot_of_the_perpendicular_from_the_centre(mean, k, cos):
    """Section 4: of all points between base and mean, the nearest to the centre."""
    models, centre = noisy(k, cos)
    average = models.mean(0)
    foot = average * (average @ centre) / (average @ average)
    got = merge.model_stock({"w": jnp.asarray(models, jnp.float32)}, mean=mean)
    np.testing.assert_allclose(got["w"], foot, rtol=1e-4, atol=1e-6)
    ratio = k * cos / (1 + (k - 1) * cos)
    np.testing.assert_allclose(got["w"], ratio * average, rtol=1e-4, atol=1e-6)


def test_the_mean_angle_is_not_the_mean_cosine():
    x = np.random.default_rng(1).normal(size=(3, 40)) + 0.7
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(3, 1)]
    cos = np.cos(np.arccos(cosines).mean())
    want = 3 * cos / (1 + 2 * cos) * x.mean(0)
    got = merge.model_stock({"w": jnp.asarray(x, jnp.float32)}, mean="angle")["w"]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert abs(cos - cosines.mean()) > 1e-4
    with pytest.raises(ValueError, match="'cosine' or 'angle'"):
        merge.model_stock(stacked(3), mean="both")


@pytest.mark.parametrize("k", [2, 3])
def test_the_mean_angle_has_finite_gradients_where_models_are_parallel(k):
    same = jnp.ones((k, 4)) * jnp.array([1.0, -1.0, 2.0])[:k, None]
    total = lambda x: merge.model_stock({"w": x}, mean="angle")["w"].sum()
    assert np.isfinite(jit(jax.grad(total))(same)).all()


def test_periodic_merging_replaces_every_model_when_due():
    models, base = stacked(3), each(lambda x: x[0] * 0.1, stacked(1, seed=9))
    sync = merge.periodic(merge.on_base(merge.model_stock), period=4)
    traced = jit(lambda step: sync(models, base, step=step))
    want = merge.on_base(merge.model_stock)(models, base)
    for step in range(9):
        due = step in (4, 8)
        copies = each(lambda m: jnp.broadcast_to(m, (3, *m.shape)), want)
        close(traced(step), copies if due else models)
        close(sync(models, base, step=step), copies if due else models)
    with pytest.raises(ValueError, match="period must be at least 1"):
        merge.periodic(merge.average, period=0)


def test_periodic_averaging_of_gradient_descent_is_descent_of_the_mean():
    """On a quadratic, steps are linear: models in step with their mean stay with it."""
    sync = merge.periodic(merge.average, period=5)
    goals = jnp.array([[1.0], [2.0], [6.0]])

    def train(models, step):
        models = {"w": models["w"] - 0.1 * (models["w"] - goals)}
        return sync(models, step=step), None

    start = {"w": jnp.zeros((3, 1))}
    end, _ = jit(lambda s: jax.lax.scan(train, s, jnp.arange(1, 21)))(start)
    np.testing.assert_allclose(end["w"], np.full((3, 1), 3 * (1 - 0.9**20)), rtol=1e-5)


# --- delta-guided fusion -------------------------------------------------------------


def test_delta_guided_weighs_by_how_far_each_entry_moved():
    x = flat(stacked(3))
    weights = np.abs(x) / np.abs(x).sum(0)
    want = (weights * x).sum(0)
    np.testing.assert_allclose(one(merge.delta_guided(stacked(3))), want, rtol=1e-5)


def test_delta_guided_per_leaf_has_one_weight_for_each_model():
    x = np.asarray(stacked(3)["a"], np.float64)
    moved = np.abs(x).mean((1, 2))
    want = np.tensordot(moved / moved.sum(), x, 1)
    got = merge.delta_guided(stacked(3), per="leaf")["a"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_power_goes_from_the_mean_to_the_largest():
    close(merge.delta_guided(stacked(3), power=0.0), merge.average(stacked(3)), 1e-5)
    entries = {"w": jnp.array([[1.0, -2.0, 0.0], [-3.0, 1.0, 0.0]])}
    peak = merge.delta_guided(entries, power=200.0)
    close(peak, merge.magmax(entries))
    close(merge.delta_guided(stacked(1)), each(lambda x: x[0], stacked(1)))
    for power in (0.5, 3.0):
        total = lambda x, p=power: merge.delta_guided(x, power=p)["w"].sum()
        assert np.isfinite(jit(jax.grad(total))(entries)["w"]).all()
    with pytest.raises(ValueError, match="power must be at least 0"):
        merge.delta_guided(entries, power=-1.0)
    with pytest.raises(ValueError, match="'entry' or 'leaf'"):
        merge.delta_guided(entries, per="tree")
