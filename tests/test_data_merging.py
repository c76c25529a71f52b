"""Merges that look at data: Fisher, RegMean, RegMean++, and batch statistics anew."""

import functools as ft

from cases import stacked
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import measure, merge, rewrite, tree

KEY = jax.random.key(5)
each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def first(models):
    return each(lambda v: v[0], models)


# --- Fisher ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_precision_gives_the_weighted_mean(value, normalize):
    """No information at all, too: there the floor decides."""
    models = stacked(3)
    alike = each(lambda v: jnp.full_like(v, value), models)
    weights = [0.5, 0.3, 0.4]
    got = merge.fisher(models, alike, weights=weights, normalize=normalize)
    close(got, merge.linear(models, weights=weights))


def test_fisher_takes_what_one_model_knows_from_it():
    models = stacked(3)
    known = each(lambda v: jnp.zeros_like(v).at[1].set(1.0), models)
    close(merge.fisher(models, known, floor=0.0), each(lambda v: v[1], models), 0)
    nothing = each(jnp.zeros_like, models)
    target = merge.fisher(models, nothing, floor=[1e-6, 0.0, 0.0])
    close(target, first(models))
    close(merge.fisher(models, nothing, floor=0.0), merge.average(models))


def test_fisher_merge_is_the_mode_of_the_product_of_posteriors():
    """Gaussian posteriors of linear regression, whose data are orthogonal."""
    x = jnp.linalg.qr(normal(0, 12, 3))[0] * jnp.array([[1.0, 2.0, 3.0]])
    y = normal(1, 12, 2)
    halves = (x, x[:, ::-1]), (y, normal(2, 12, 2))
    fit = lambda x, y: jnp.linalg.lstsq(x, y)[0]
    models = jnp.stack([fit(*d) for d in zip(*halves, strict=True)])
    apply = lambda w, x: x @ w
    fisher = ft.partial(measure.fisher, apply, likelihood="gaussian")
    fishers = jit(jax.vmap(fisher))(models, jnp.stack(halves[0]))
    together = fit(*map(jnp.concatenate, halves))
    close(merge.fisher(models, fishers, floor=0.0), together, 1e-4)


def test_fisher_normalize_levels_the_scale_of_models():
    models, fishers = stacked(3), each(jnp.abs, stacked(3, seed=1))
    scaled = each(lambda v: v.at[2].multiply(100.0), fishers)
    call = ft.partial(merge.fisher, models, floor=0.0, normalize=True)
    close(call(scaled), call(fishers))
    plain = ft.partial(merge.fisher, models, floor=0.0)
    assert jnp.abs(plain(scaled)["a"] - plain(fishers)["a"]).max() > 0.1


def test_fisher_refuses():
    models = stacked(2)
    with pytest.raises(ValueError, match="fishers differs at 'a'"):
        merge.fisher(models, stacked(3))
    with pytest.raises(ValueError, match="floor must be at least 0"):
        merge.fisher(models, models, floor=-1.0)
    counted = {**models, "steps": jnp.zeros(2, jnp.int32)}
    with pytest.raises(ValueError, match="'steps' of dtype int32"):
        merge.fisher(counted, counted)


# --- RegMean --------------------------------------------------------------------------

X = normal(3, 2, 20, 6)  # the data of two tasks, with unlike scales of features
X = X * jnp.exp(normal(4, 2, 1, 6))


@ft.cache
def compiled(apply, **options):
    def whole(models, x):
        grams = jax.vmap(ft.partial(measure.gram, apply))(models, x)
        uses = rewrite.uses(apply, first(models), x[0])
        return merge.regmean(models, grams, uses=uses, **options)

    return jit(whole)


def regmean(apply, models, x, **options):
    """RegMean on Grams of each model's own inputs `[k, ...]`."""
    return compiled(apply, **options)(models, x)


def plusplus(apply, models, tasks, **options):
    call = ft.partial(merge.regmean_plusplus, apply, **options)
    return jit(call)(models, tasks)


def recalibrated(apply, params, batches, **options):
    return jit(ft.partial(merge.recalibrate, apply, **options))(params, batches)


LAYOUTS = {
    # a leaf, and the function of it whose outputs are regressed
    "dense": ((6, 4), lambda w, x: x @ w),
    "torch": ((4, 6), lambda w, x: x @ w.T),
    "heads": ((6, 2, 2), lambda w, x: jnp.einsum("bd,dhk->bhk", x, w)),
    "heads joined": ((2, 3, 4), lambda w, x: jnp.einsum(
        "bhk,hkd->bd", x.reshape(-1, 2, 3), w)),
    "experts": ((2, 3, 4), lambda w, x: jnp.einsum(
        "beu,euv->bev", x.reshape(-1, 2, 3), w)),
    "grouped": ((1, 3, 4), lambda w, x: jax.lax.conv_general_dilated(
        x.reshape(-1, 1, 6), w, (1,), "VALID", feature_group_count=2,
        dimension_numbers=("NWC", "WIO", "NWC"))),
    "convolution": ((3, 2, 4), lambda w, x: jax.lax.conv_general_dilated(
        x.reshape(-1, 3, 2), w, (1,), "SAME",
        dimension_numbers=("NWC", "WIO", "NWC"))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_regmean_solves_the_least_squares_problem(name):
    """With any layout of the weight: the same as lstsq on the Jacobian."""
    shape, apply = LAYOUTS[name]
    models = normal(5, 2, *shape)
    got = regmean(apply, models, X, off_diagonal=1.0, ridge=0.0)
    flat = lambda w, x: apply(w, x).ravel()
    both = lambda w, x: (jax.jacobian(flat)(w, x), flat(w, x))
    design, target = jit(jax.vmap(both))(models, X)
    design = np.reshape(np.float64(design), (target.size, models[0].size))
    target = np.float64(target).ravel()
    want = np.linalg.lstsq(design, target)[0]
    close(got, jnp.float32(want).reshape(shape), 1e-4)


def test_regmean_weights_count_data():
    """A task that weighs twice is a task with its data twice."""
    apply, models = LAYOUTS["dense"][1], normal(5, 2, 6, 4)
    exact = {"off_diagonal": 1.0, "ridge": 0.0}
    twice = regmean(apply, models, X * jnp.array([2**0.5, 1.0])[:, None, None], **exact)
    close(regmean(apply, models, X, weights=(2.0, 1.0), **exact), twice, 1e-4)


def test_regmean_defaults_and_degenerate_grams():
    apply, models = LAYOUTS["dense"][1], normal(5, 2, 6, 4)
    average = merge.average(models)
    few = X[:, :2].at[:, :, 0].set(0.0)  # two rows, and a feature that is always 0
    got = regmean(apply, models, few)
    close(got[0], average[0])
    assert np.isfinite(got).all()
    close(regmean(apply, models, jnp.zeros_like(X)), average)
    close(regmean(apply, models, X, off_diagonal=0.0, ridge=1e6), average, 1e-4)
    same = jnp.stack([models[0], models[0]])
    close(regmean(apply, same, X), models[0], 1e-6)
    diagonal = jnp.sum(X**2, 1)[..., None]
    want = jnp.sum(diagonal * models, 0) / jnp.sum(diagonal, 0)
    close(regmean(apply, models, X, off_diagonal=0.0, ridge=0.0), want)


def test_regmean_leaves_without_gram_are_averaged():
    models = {"w": normal(5, 2, 6, 4), "b": normal(6, 2, 4)}
    apply = lambda p, x: x @ p["w"] + p["b"][None]
    got = regmean(apply, models, X, weights=(3.0, 1.0))
    close(got["b"], merge.linear(models, weights=[3.0, 1.0])["b"])


def test_regmean_refuses():
    models = normal(5, 2, 6, 4)
    uses = rewrite.uses(lambda w, x: x @ w, models[0], X[0])
    tied = rewrite.uses(lambda w, x: x @ w @ w.T, models[0], X[0])
    call = ft.partial(merge.regmean, models, uses=uses)
    gram = jnp.zeros((2, 6, 6))
    with pytest.raises(ValueError, match=r"grams differs at ''.*expected \(2, 6, 6\)"):
        call({"": jnp.zeros((2, 4, 4))})
    with pytest.raises(ValueError, match="'v', which is no leaf"):
        call({"v": gram})
    with pytest.raises(ValueError, match="2 ways in which it is multiplied"):
        merge.regmean(models, {"": gram}, uses=tied)
    with pytest.raises(ValueError, match=r"off_diagonal must be in \[0, 1\]"):
        call({"": gram}, off_diagonal=1.5)
    with pytest.raises(ValueError, match="ridge must be at least 0"):
        call({"": gram}, ridge=-1.0)


# --- RegMean++ ------------------------------------------------------------------------


def mlp(p, x):
    return jnp.tanh(x @ p["u"] + p["b"][None]) @ p["z"]


def scanned(p, x):
    layer = lambda h, w: (jnp.tanh(h @ w[0] + w[1][None]), None)
    return jax.lax.scan(layer, x, (p["w"], p["b"]))[0]


def unrolled(p, x):
    for w, b in zip(p["w"], p["b"], strict=True):
        x = jnp.tanh(x @ w + b[None])
    return x


PAIR = {"u": normal(7, 2, 6, 3), "b": normal(8, 2, 3), "z": normal(9, 2, 3, 4)}
TASKS = [[(x[:12],), (x[12:],)] for x in X]


def test_regmean_plusplus_of_one_layer_is_regmean():
    apply, models = LAYOUTS["dense"][1], normal(5, 2, 6, 4)
    close(plusplus(apply, models, TASKS), regmean(apply, models, X), 1e-4)


def solve(grams, weights):
    off = lambda g: 0.9 * g + 0.1 * np.diag(np.diag(g))
    grams = [off(np.float64(g)) for g in grams]
    parts = [g @ np.float64(w) for g, w in zip(grams, weights, strict=True)]
    return np.linalg.solve(sum(grams), sum(parts))


def test_regmean_plusplus_uses_features_of_the_merged_layers():
    """By hand: z is regressed on what the merged u and b give."""
    got = plusplus(mlp, PAIR, TASKS, ridge=0.0)
    u = solve([x.T @ x for x in X], PAIR["u"])
    b = np.asarray(PAIR["b"]).mean(0)
    hidden = [np.tanh(x @ u + b) for x in np.asarray(X)]
    z = solve([h.T @ h for h in hidden], PAIR["z"])
    want = {"u": u, "b": b, "z": z}
    close(got, each(jnp.float32, want), 1e-4)


def test_regmean_plusplus_within_a_block_is_regmean():
    """One block holds all: every model runs with its own weights."""
    got = plusplus(mlp, PAIR, TASKS, block=lambda _: "all", ridge=0.0)
    close(got, regmean(mlp, PAIR, X, ridge=0.0), 1e-4)


def test_regmean_plusplus_of_scanned_layers_is_that_of_the_unrolled():
    models = {"w": normal(10, 2, 2, 6, 6), "b": normal(11, 2, 2, 6)}
    got = plusplus(scanned, models, TASKS)
    flat = {f"{i}/{n}": v[:, i] for n, v in models.items() for i in range(2)}
    apart = lambda p, x: unrolled(
        {n: [p[f"{i}/{n}"] for i in range(2)] for n in models}, x
    )
    want = plusplus(apart, flat, TASKS)
    joined = {n: jnp.stack([want[f"{i}/{n}"] for i in range(2)]) for n in models}
    close(got, joined, 1e-4)


def test_regmean_plusplus_jits_and_keeps_dtypes():
    half = each(lambda v: v.astype(jnp.bfloat16), PAIR)
    tasks = each(lambda v: v.astype(jnp.bfloat16), TASKS)
    got = plusplus(mlp, half, tasks)
    assert {v.dtype for v in got.values()} == {jnp.dtype(jnp.bfloat16)}
    wide = plusplus(mlp, PAIR, TASKS)
    close(each(lambda v: v.astype("f4"), got), wide, 0.1)


def test_regmean_plusplus_merges_only_what_is_selected():
    got = plusplus(mlp, PAIR, TASKS, where=tree.glob("z"))
    average = merge.average(PAIR)
    close(got["u"], average["u"])
    assert jnp.abs(got["z"] - average["z"]).max() > 0.01


def test_regmean_plusplus_refuses():
    with pytest.raises(ValueError, match="each of the 2 models"):
        merge.regmean_plusplus(mlp, PAIR, TASKS[:1])
    with pytest.raises(ValueError, match="at least one batch"):
        merge.regmean_plusplus(mlp, PAIR, [TASKS[0], []])
    with pytest.raises(ValueError, match="no leaf to regress is selected"):
        merge.regmean_plusplus(mlp, PAIR, TASKS, where=tree.glob("b"))


# --- batch statistics -----------------------------------------------------------------


def norm(p, x):
    ahead = lambda v: v.reshape((1,) * (x.ndim - 1) + v.shape)
    unit = (x - ahead(p["mean"])) * ahead(jax.lax.rsqrt(p["var"] + 1e-5))
    return unit * ahead(p["scale"])


def normed(i, *layers):
    stats = {"mean": normal(i, *layers, 4), "var": normal(i + 1, *layers, 4) ** 2}
    return {**stats, "scale": 1 + normal(i + 2, *layers, 4)}


def network(p, x):
    """Two norms that feed each other, on either side of a convolution."""
    x = jnp.tanh(norm(p["bn0"], x))
    axes = ("NWC", "WIO", "NWC")
    x = jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=axes)
    return norm(p["bn1"], x)


NET = {"bn0": normed(20), "w": normal(23, 3, 4, 4), "bn1": normed(24)}
IMAGES = normal(27, 16, 5, 4) * 3 + 1
BATCHES = [(IMAGES[:4],), (IMAGES[4:],)]


def test_recalibrated_norms_give_normalised_activations():
    got = recalibrated(network, NET, BATCHES)
    out = network(got, IMAGES) / got["bn1"]["scale"][None, None]
    np.testing.assert_allclose(out.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1)), 1, rtol=1e-4)
    close(got["bn0"]["mean"], IMAGES.mean((0, 1)))
    close(got["bn0"]["var"], IMAGES.var((0, 1)))
    close(got["w"], NET["w"], 0)
    close(got["bn1"]["scale"], NET["bn1"]["scale"], 0)


def test_recalibration_is_a_fixed_point_however_data_are_split():
    got = recalibrated(network, NET, BATCHES)
    close(recalibrated(network, got, [(IMAGES,)], passes=1), got)
    once = recalibrated(network, NET, BATCHES, passes=1)
    close(once["bn0"], got["bn0"])
    assert jnp.abs(once["bn1"]["mean"] - got["bn1"]["mean"]).max() > 0.01


def test_recalibrate_follows_a_scan_under_jit():
    layers = {"bn": normed(30, 3), "w": normal(33, 3, 4, 4)}
    layer = lambda h, p: (norm(p["bn"], h @ p["w"]), None)
    apply = lambda p, x: jax.lax.scan(layer, x, p)[0]
    x = normal(34, 32, 4)
    got = recalibrated(apply, layers, [(x,)])
    for i in range(3):
        one = each(lambda v, i=i: v[i], got)
        x = x @ one["w"]
        close(one["bn"]["mean"], x.mean(0), 1e-4)
        close(one["bn"]["var"], x.var(0), 1e-4)
        x = norm(one["bn"], x)


def test_recalibrate_of_sharded_batches():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("d"))
    got = recalibrated(network, NET, [(jax.device_put(IMAGES, place),)])
    close(got, recalibrated(network, NET, [(IMAGES,)]))


def test_recalibrate_takes_names_and_restores_a_linen_model():
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Dense(4)(x)
            x = linen.BatchNorm(not train, momentum=0.0)(x)
            return linen.BatchNorm(not train, momentum=0.0)(jnp.tanh(x))

    net, x = Net(), normal(40, 16, 3)
    params = net.init(KEY, x, train=False)
    _, trained = net.apply(params, x, train=True, mutable=["batch_stats"])
    apply = lambda p, x: net.apply(p, x, train=False)
    got = recalibrated(apply, params, [(x,)])
    close(got["batch_stats"], trained["batch_stats"])
    one = {"batch_stats/BatchNorm_0/mean": "batch_stats/BatchNorm_0/var"}
    partly = recalibrated(apply, params, [(x,)], statistics=one)["batch_stats"]
    close(partly["BatchNorm_0"], got["batch_stats"]["BatchNorm_0"])
    close(partly["BatchNorm_1"], params["batch_stats"]["BatchNorm_1"], 0)


def test_recalibrate_refuses():
    bare = {"w": NET["w"]}
    call = ft.partial(merge.recalibrate, network, NET)
    with pytest.raises(ValueError, match="batch statistics absent: no leaf is named"):
        merge.recalibrate(lambda p, x: x, bare, BATCHES)
    with pytest.raises(ValueError, match="absent: params has no 'bn2/mean'"):
        call(BATCHES, statistics={"bn2/mean": "bn2/var"})
    with pytest.raises(ValueError, match="no mean and variance of one norm"):
        call(BATCHES, statistics={"bn0/mean": "w"})
    with pytest.raises(ValueError, match=r"'bn0/scale' is not subtracted.*'mul'"):
        call(BATCHES, statistics={"bn0/scale": "bn0/var"})
    with pytest.raises(ValueError, match="at least one batch"):
        call([])
    with pytest.raises(ValueError, match="passes must be"):
        call(BATCHES, passes=0)
