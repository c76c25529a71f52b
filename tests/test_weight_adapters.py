"""Adapters of weights against their papers' formulas, written out densely."""

import functools as ft
import math

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank, tree
from jaxlab.lowrank import _pst, _wavelets

KEY = jax.random.key(0)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, *shape):
    """Drawn by numpy: nothing is compiled for a new shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def state(adapter, w, *statistic, seed=7, scale=0.5):
    """What is trained anywhere, what is fixed as `init` has it."""
    shapes = jax.eval_shape(adapter.init, KEY, w, *statistic)
    drawn = {
        name: scale * normal((seed, i), *v.shape)
        for i, (name, v) in enumerate(shapes.items())
        if name not in adapter.fixed
    }
    return (init(adapter, w, *statistic) if adapter.fixed else {}) | drawn


def init(adapter, w, *statistic):
    return jit(adapter.init)(KEY, w, *statistic)


def merge(adapter, w, s):
    return np.asarray(jit(adapter.merge)(w, s))


# Hydra


def test_hydras_sequential_branch_reads_the_layers_output_with_its_bias():
    adapter = lowrank.hydra(rank=2, scale=0.7)
    w, b, x = normal(0, 5, 4), normal(1, 4), normal(2, 3, 5)
    s = state(adapter, w)
    a, up, a_out, up_out = (np.asarray(s[n]) for n in ("a", "b", "a_out", "b_out"))
    x, f = np.asarray(x), np.asarray(x) @ np.asarray(w) + np.asarray(b)
    want = f + 0.7 * (x @ a @ up + f @ a_out @ up_out)
    close(x @ merge(adapter, w, s) + np.asarray(jit(adapter.bias)(b, s)), want)
    assert adapter.bias(None, {}) is None
    with pytest.raises(ValueError, match="sequential_rank 5 is above the 4 outputs"):
        lowrank.hydra(rank=2, sequential_rank=5).init(KEY, w)


# WaRA

WAVELETS = ("haar", "db2", "db3", "db7", "db10", "bior1.3", "bior2.2", "bior3.5")
WAVELETS += ("bior2.8", "bior4.4")


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_wavelet_transform_is_inverted_exactly(wavelet):
    """Of any level and shape, also where the filter is longer than the signal."""

    def there_and_back(w, levels):
        bands = lowrank.wavelet_bands(w, wavelet=wavelet, levels=levels)
        again = lowrank.from_wavelet_bands(bands, shape=w.shape, wavelet=wavelet)
        return bands[-1]["ll"], again

    for n, m, levels in ((7, 5, 3), (1, 34, 1)):
        w = np.random.default_rng(n).normal(size=(n, m)).astype(np.float32)
        coarse, again = jit(there_and_back, static_argnums=1)(w, levels)
        close(again, w, 1e-6 * np.abs(w).max() * levels)
        assert coarse.shape == tuple(-(-v // 2**levels) for v in (n, m))


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_those_of_the_name(wavelet):
    """Biorthogonal (or orthonormal) shifts, and the moments that must vanish."""
    bank, size = _wavelets.bank(wavelet), 64
    place = lambda f: np.roll(np.pad(f.taps, (0, size - len(f.taps))), f.start)
    shifts = lambda f: np.stack([np.roll(place(f), 2 * j) for j in range(size // 2)])
    down = np.concatenate([shifts(f) for f in bank.down])
    up = np.concatenate([shifts(f) for f in bank.up])
    close(down @ up.T, np.eye(size), 1e-9)
    if wavelet[0] != "b":
        close(down, up, 0)
    number = "1" if wavelet == "haar" else wavelet.strip("dbior")
    orders = [int(v) for v in number.split(".")]
    for f, order in zip((bank.down[1], bank.up[1]), orders * 2, strict=False):
        x = np.linspace(-1, 1, len(f.taps))
        moments = [abs(np.sum(f.taps * x**p)) for p in range(order + 1)]
        assert max(moments[:order]) < 1e-7
        assert moments[order] > 1e-5


def test_known_filters():
    root = math.sqrt(3)
    db2 = np.array([1 + root, 3 + root, 3 - root, 1 - root]) / (4 * math.sqrt(2))
    close(_wavelets.bank("db2").down[0].taps, db2, 1e-12)
    down, up = (f[0] for f in _wavelets.bank("bior2.2"))
    close(down.taps, np.array([-1, 2, 6, 2, -1]) * math.sqrt(2) / 8, 1e-12)
    close(up.taps, np.array([1, 2, 1]) * math.sqrt(2) / 4, 1e-12)
    down, up = (f[0] for f in _wavelets.bank("bior4.4"))
    assert (len(down.taps), len(up.taps)) == (9, 7)
    close(down.taps[4] / math.sqrt(2), 0.602949018236, 1e-9)  # JPEG 2000's 9/7
    low, high = _wavelets.analyse(jnp.array([1.0, 3.0, 5.0]), "haar")
    close(low, np.array([4, 10]) / math.sqrt(2), 1e-6)
    close(jnp.abs(high), np.array([2, 0]) / math.sqrt(2), 1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "bior2.2"])
def test_waras_update_is_the_inverse_transform_of_its_bands(wavelet):
    w = normal(0, 11, 14)
    adapter = lowrank.wara(rank=2, wavelet=wavelet, levels=2, alpha=3)
    s = state(adapter, w)
    split = ft.partial(lowrank.wavelet_bands, wavelet=wavelet, levels=2)
    bands = jax.eval_shape(split, w)

    @jit
    def update(s):
        drawn = [
            {name: s[f"a_{level}_{name}"] @ s[f"b_{level}_{name}"] for name in own}
            for level, own in enumerate(bands)
        ]
        return lowrank.from_wavelet_bands(drawn, shape=w.shape, wavelet=wavelet)

    close(merge(adapter, w, s), w + 1.5 * update(s))


def test_shared_wara_is_one_adapter_in_the_domain_of_the_features():
    adapter = lowrank.wara(rank=2, wavelet="db2", shared=True)
    w, x = normal(0, 8, 6), normal(1, 5, 8)
    s = state(adapter, w)

    @jit
    def features(x, s):
        bands = _wavelets.analyse(x.T, "db2")
        low, high = ((c.T @ s["a_0"] @ s["b_0"]).T for c in bands)
        return x @ w + _wavelets.synthesise(low, high, "db2", 6).T

    close(jit(adapter.apply)(x, w, s), features(x, s))
    assert set(s) == {"a_0", "b_0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 1, "levels": 0}, "levels must be at least 1"),
        ({"rank": 1, "wavelet": "bior2.3"}, r"wavelet 'bior2.3' is none of haar"),
        ({"rank": 1, "wavelet": "db11"}, "none of haar"),
        ({"rank": 3, "levels": 2}, r"rank 3 is above the band \[2, 3\] of a weight"),
    ],
)
def test_waras_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lowrank.wara(**options).init(KEY, normal(0, 8, 10))


# Bone


@pytest.mark.parametrize("form", ["column", "row"])
def test_bones_blocks_one_by_one(form):
    r, w = 2, normal(0, 6, 8)
    adapter = lowrank.bone(block=r, form=form)
    s = state(adapter, w)
    merged, w, blocks = merge(adapter, w, s), np.asarray(w), np.asarray(s["c"])
    for b in range(3):
        for a in range(4):
            at = slice(b * r, b * r + r), slice(a * r, a * r + r)
            c = blocks[b if form == "row" else a]
            close(merged[at], w[at] + c @ w[at] + c)
    with pytest.raises(ValueError, match=r"blocks of 4 do not divide .* \[6, 8\]"):
        lowrank.bone(block=4, form=form).init(KEY, w)
    with pytest.raises(ValueError, match="form must be 'column' or 'row'"):
        lowrank.bone(block=2, form="both")


# SaRA


def test_saras_state_is_the_sparse_part():
    """Of the weights, of the gradient and of an optimiser's moments."""
    w = normal(0, 32, 24)
    params, x = {"w": w}, normal(1, 2, 32)
    apply = lambda p, x: x @ p["w"]
    adapter = lowrank.sara(density=0.125)
    adapted, s = lowrank.attach(apply, params, adapter, x, where="w", key=KEY)
    assert sum(v.nbytes for v in jax.tree.leaves(s)) == 4 * 96
    assert sum(v.nbytes for v in jax.tree.leaves(adapted.fixed)) == 4 * 96
    indices = adapted.fixed["w"]["indices"]
    assert set(indices.tolist()) == set(np.argsort(np.abs(w).ravel())[:96].tolist())
    slopes = jit(jax.grad(lambda s: jnp.sum(jnp.sin(adapted(params, s, x)))))(s)
    dense = np.asarray(x).T @ np.cos(np.asarray(x) @ np.asarray(w))
    close(slopes["w"]["values"], dense.ravel()[np.asarray(indices)], 1e-4)
    s = s.replace(leaves={"w": {"values": normal(2, 96)}})
    folded = jit(lambda p, s: lowrank.fold(p, s, adapted))(params, s)
    changed = np.flatnonzero(np.asarray(folded["w"]) != np.asarray(w))
    assert set(changed.tolist()) == set(indices.tolist())


def test_saras_second_stage_keeps_the_weight_and_trains_what_is_still_small():
    w, adapter = normal(0, 8, 6), lowrank.sara(density=0.5)
    s = state(adapter, w)
    w2, s2 = jit(ft.partial(lowrank.sara_reselect, density=0.25))(w, s)
    close(w2, merge(adapter, w, s), 0)
    close(merge(lowrank.sara(density=0.25), w2, s2), w2, 0)
    assert s2["values"].shape == (12,)
    left = np.setdiff1d(s["indices"], s2["indices"])
    assert set(s2["indices"].tolist()) < set(s["indices"].tolist())
    flat = np.abs(np.asarray(w2).ravel())
    assert flat[s2["indices"]].max() <= flat[left].min()
    with pytest.raises(ValueError, match="36 entries, above the 24 of s"):
        lowrank.sara_reselect(w, s, density=0.75)


def test_saras_penalty_is_the_nuclear_norm_and_its_slope_the_singular_vectors():
    w, adapter = normal(0, 6, 5), lowrank.sara(density=0.6)
    s = state(adapter, w)
    sparse = np.zeros(30, np.float64)
    sparse[s["indices"]] = s["values"]
    u, sizes, v = np.linalg.svd(sparse.reshape(6, 5), full_matrices=False)
    penalty = lambda values: lowrank.sara_penalty(w, s | {"values": values})
    slopes = jit(jax.value_and_grad(penalty))
    size, slope = slopes(s["values"])
    close(size, sizes.sum())
    close(slope, (u @ v).ravel()[np.asarray(s["indices"])], 1e-4)
    close(slopes(jnp.zeros_like(s["values"]))[1], 0, 0)


# TLoRA


def dense_ring(matrices):
    """The matrix of cores [i, j, r, r'], one entry at a time."""
    sizes = [a.shape[:2] for a in matrices]
    n, m = (math.prod(v) for v in zip(*sizes, strict=True))
    out = np.zeros((n, m))
    for i, at in enumerate(np.ndindex(*(v[0] for v in sizes))):
        for j, to in enumerate(np.ndindex(*(v[1] for v in sizes))):
            slices = [a[p, q] for a, p, q in zip(matrices, at, to, strict=True)]
            out[i, j] = np.trace(ft.reduce(np.matmul, slices))
    return out


@pytest.mark.parametrize(
    ("order", "train"), [(2, False), (3, False), (3, True), (1, False)]
)
def test_tloras_cores_contract_as_the_formula_says(order, train):
    w = normal(0, 12, 8)
    adapter = lowrank.tlora(rank=2, transform_rank=3, order=order, train=train)
    fresh, s = init(adapter, w), state(adapter, w)
    cores = lambda s, c: [np.asarray(s[f"{c}{d}"], np.float64) for d in range(order)]
    close(dense_ring(cores(fresh, "t")), np.eye(12), 1e-6)
    transform = dense_ring(cores(s, "t"))
    b = [v[:, None] for v in cores(s, "b")]
    c = [v[None] for v in cores(s, "c")]
    residual = dense_ring(b + c)
    close(merge(adapter, w, s), transform @ np.asarray(w) + residual, 2e-5)
    ranks = {v.shape[2] for v in cores(s, "t")[:1]} | {cores(s, "t")[-1].shape[3]}
    assert ranks == ({1} if train else {3})


def test_tloras_distances_are_zero_at_the_identity_and_at_rotations():
    adapter = lowrank.tlora(rank=1, transform_rank=2)
    fresh, s = init(adapter, normal(0, 6, 6)), state(adapter, normal(0, 6, 6))
    want = sum(
        np.linalg.norm(np.asarray(s[f"t{d}"])[:, :, p, q] - np.eye(size) / 2)
        for d, size in enumerate((2, 3))
        for p in range(2)
        for q in range(2)
    )
    turn = [np.linalg.qr(normal(d, size, size))[0] for d, size in enumerate((2, 3))]
    tiled = [np.tile(q[:, :, None, None] / 2, (1, 1, 2, 2)) for q in turn]
    turned = fresh | {f"t{d}": jnp.asarray(q) for d, q in enumerate(tiled)}
    identity, orthogonal = (
        jit(jax.value_and_grad(fn))
        for fn in (lowrank.tlora_identity, lowrank.tlora_orthogonal)
    )
    close(identity(s)[0], want)
    close(orthogonal(turned)[0], 0)
    assert float(orthogonal(s)[0]) > 0.1
    assert float(identity(turned)[0]) > 0.1
    for fn in (identity, orthogonal):
        assert float(fn(fresh)[0]) == 0
        for at in (fresh, s):
            assert all(np.isfinite(v).all() for v in jax.tree.leaves(fn(at)[1]))


# PELA


def test_pelas_factors_are_the_truncated_decomposition():
    w, adapter = normal(0, 7, 5), lowrank.pela(rank=2)
    s = init(adapter, w)
    u, sizes, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    close(merge(adapter, w, s), (u[:, :2] * sizes[:2]) @ v[:2])
    close(s["a"].T @ s["a"], np.diag(sizes[:2]), 2e-5)
    close(s["b"] @ s["b"].T, np.diag(sizes[:2]), 2e-5)
    lost = np.linalg.norm(merge(adapter, w, s) - np.asarray(w))
    close(lost, np.sqrt((sizes[2:] ** 2).sum()), 1e-5)
    off = np.abs(merge(adapter, w, s) - np.asarray(w)).max()
    close(lowrank.weight_perturbation(w, s, size=0.1), (off - 0.1) ** 2)
    assert lowrank.pela_rank(100, 50, ratio=2) * 2 * 150 <= 100 * 50


def test_pelas_distillation_has_no_slope_into_the_teacher():
    ours, theirs = [normal(0, 3), normal(1, 2, 2)], [normal(2, 3), normal(3, 2, 2)]
    want = np.mean([np.mean((a - b) ** 2) for a, b in zip(ours, theirs, strict=True)])
    close(lowrank.feature_distillation(ours, theirs), want)
    slopes = jax.grad(lowrank.feature_distillation, argnums=1)(ours, theirs)
    assert all((v == 0).all() for v in slopes)
    with pytest.raises(ValueError, match="feature 1 differs"):
        lowrank.feature_distillation(ours, [theirs[0], theirs[0]])
    with pytest.raises(ValueError, match="2 features of student, 1 of teacher"):
        lowrank.feature_distillation(ours, theirs[:1])


# Orthogonal adaptation


def concepts(make, w, count=3):
    adapters = [make(i) for i in range(count)]
    states = [state(a, w, seed=i) for i, a in enumerate(adapters)]
    return adapters, states, *(np.stack([s[n] for s in states]) for n in "ab")


def test_concepts_of_one_basis_add_without_interference():
    """Each sees its own inputs as if it were alone; plain LoRA's do not."""
    w, measure = normal(0, 12, 5), jit(lowrank.interference)
    own = lambda i: lowrank.orthogonal_adaptation(rank=2, concept=i)
    adapters, states, a, b = concepts(own, w)
    merged = [merge(c, w, s) for c, s in zip(adapters, states, strict=True)]
    summed = sum(merged) - 2 * np.asarray(w)
    for i, alone in enumerate(merged):
        x = np.asarray(normal(i, 4, 2)) @ a[i].T  # inputs in the span of its basis
        close(x @ summed, x @ alone)
    off = ~np.eye(3, dtype=bool)
    close(np.asarray(measure(a, b))[off], 0, 1e-6)
    plain = concepts(lambda i: lowrank.lora(rank=2), w)[2:]
    assert np.asarray(measure(*plain))[off].min() > 0.05
    with pytest.raises(ValueError, match="concept 6 is beyond the 6 of 12 inputs"):
        own(6).init(KEY, w)


def test_interference_is_that_of_the_updates():
    a, b = normal(0, 3, 6, 2), normal(1, 3, 2, 4)
    updates = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    size = np.linalg.norm
    want = [[size(p.T @ q) / size(p) / size(q) for q in updates] for p in updates]
    measure, none = jit(lowrank.interference), np.array([0, 1, 1], np.float32)
    close(measure(a, b), want)
    close(measure(a, b * none[:, None, None])[0], 0, 0)


# PST


def scored(w, s):
    u, v, a, b = (np.asarray(s[n]) for n in ("u", "v", "score_a", "score_b"))
    moved_w = np.asarray(w) + u @ v
    structure = np.asarray(s["score_in"])[:, None] + np.asarray(s["score_out"])[None]
    return moved_w, np.abs(moved_w) + 0.5 * a @ b + 2 * structure


def test_pst_prunes_exactly_the_least_important():
    w = normal(0, 10, 6)
    adapter = lowrank.pst(rank=2, score_rank=1, low_rank=0.5, structure=2)
    s = state(adapter, w)
    moved_w, scores = scored(w, s)
    assert (scores < 0).any()
    run = jit(adapter.merge)
    for sparsity in (0.0, 0.3, 0.45, 0.9, 0.999):
        merged = np.asarray(run(w, s | {"sparsity": jnp.float32(sparsity)}))
        count = int(60 * sparsity)
        assert (merged == 0).sum() == count
        want = moved_w.ravel().copy()
        want[np.argsort(scores.ravel())[:count]] = 0
        close(merged.ravel(), want)


def test_pst_prunes_exactly_among_equals():
    adapter = lowrank.pst(rank=1, sparsity=0.45)
    for w in (jnp.ones((5, 4)), jnp.zeros((5, 4)), jnp.ones((5, 4)).at[2].set(2)):
        mask = jit(_pst._kept)(w, jnp.float32(0.45))
        assert int(mask.sum()) == 11
    s = init(adapter, w)
    kept = merge(adapter, jnp.ones((5, 4)).at[4].set(2), s)
    assert kept[4].tolist() == [2.0] * 4
    assert kept.ravel()[:7].tolist() == [1.0] * 7


def test_psts_slopes_go_straight_through_the_mask():
    """Those of the relaxed problem with the mask as a variable, at the mask."""
    w, g = normal(0, 6, 4), normal(1, 6, 4)
    adapter = lowrank.pst(rank=2, score_rank=1, sparsity=0.4, low_rank=0.5, structure=2)
    s = state(adapter, w)
    slopes = jit(jax.grad(lambda s: jnp.sum(g * adapter.merge(w, s))))(s)
    moved_w, _ = scored(w, s)
    mask = merge(adapter, w, s) != 0
    through = np.asarray(g) * moved_w
    close(slopes["score_a"], 0.5 * through @ np.asarray(s["score_b"]).T)
    close(slopes["score_in"], 2 * through.sum(1))
    close(slopes["score_out"], 2 * through.sum(0))
    own = np.asarray(g) * mask + through * np.sign(moved_w)
    close(slopes["u"], own @ np.asarray(s["v"]).T, 1e-4)
    assert float(slopes["sparsity"]) == 0


def test_a_model_follows_the_schedule_without_another_compilation():
    """Also each of the stacked layers of a scan."""
    apply = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    params, x = {"w": normal(0, 3, 8, 8)}, normal(1, 2, 8)
    attach = ft.partial(lowrank.attach, apply, params, where="w", key=KEY)
    adapted, s = attach(lowrank.pst(rank=1), x)

    @jit
    def pruned(params, step):
        level = lowrank.sparsity_schedule(step, steps=10, final=0.75)
        model = lowrank.prune_to(adapted, level)
        return lowrank.fold(params, s, model)["w"], model(params, s, x), level

    for step, rise in ((0, 0), (3, 1 - (2 / 3) ** 3), (7, 1), (10, 1)):
        w, y, level = pruned(params, step)
        close(level, 0.75 * rise, 1e-6)
        zeros = (w == 0).sum((1, 2))
        assert zeros.tolist() == [math.floor(48 * rise + 1e-4)] * 3
        close(y, apply({"w": w}, x), 1e-4)
    with pytest.raises(ValueError, match="and cooldown"):
        lowrank.sparsity_schedule(0, steps=5, final=0.5, warmup=0.5, cooldown=0.5)
    plain = attach(lowrank.lora(rank=1), x)[0]
    with pytest.raises(ValueError, match="no adapter of this model has a sparsity"):
        lowrank.prune_to(plain, 0.5)


# PERP

PERP = {
    "lora_prune": lowrank.lora_prune(rank=2, alpha=3),
    "mask_lora": lowrank.mask_lora(rank=2, alpha=3),
    "scale_lora": lowrank.scale_lora(rank=2),
}


@pytest.mark.parametrize("name", PERP)
def test_what_was_pruned_stays_pruned_after_folding(name):
    w = np.asarray(normal(0, 8, 6))
    w = jnp.asarray(np.where(np.abs(w) < 0.6, 0, w))
    adapter = PERP[name]
    s = state(adapter, w)
    for weight in (w, w.astype(jnp.bfloat16)):
        merged = merge(adapter, weight, s)
        assert ((merged == 0) == (np.asarray(w) == 0)).all()
    w, product = np.asarray(w), np.asarray(s["a"]) @ np.asarray(s["b"])
    mask = w != 0
    close(merge(adapter, w, init(adapter, w)), w, 1e-6)
    want = w * product if name == "scale_lora" else w + 1.5 * mask * product
    close(merge(adapter, w, s), want)
    x = normal(1, 3, 8)
    if name == "lora_prune":
        want = np.asarray(x) @ (w + 1.5 * product)
        close(jit(adapter.apply)(x, w, s), want)


def test_mask_lora_trains_what_it_folds():
    """No slope comes from where the weight is pruned."""
    w = jnp.asarray(np.tile(np.array([1, 0], np.float32), (4, 3)))
    adapter, x = PERP["mask_lora"], normal(0, 3, 4)
    s = state(adapter, w)
    loss = lambda s: jnp.sum(jnp.sin(x @ adapter.merge(w, s)))
    slope = np.asarray(jit(jax.grad(loss))(s)["b"])
    assert (slope[:, 1::2] == 0).all()
    assert (slope[:, ::2] != 0).all()


def test_biases_and_norms_are_found_by_name():
    params = {
        "embeddings": {"LayerNorm": {"weight": jnp.ones(4), "bias": jnp.ones(4)}},
        "layers": {
            "ln_1": {"scale": jnp.ones((2, 4))},
            "q": {"kernel": jnp.ones((4, 4))},
        },
        "bn": {"running_mean": jnp.ones(4)},
        "normal": {"kernel": jnp.ones((2, 2, 4))},
        "mlp": {"b": jnp.ones(4), "w": jnp.ones((4, 4))},
    }
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    biases = {p for p, v in leaves.items() if lowrank.is_bias(p, v)}
    norms = {p for p, v in leaves.items() if lowrank.is_norm(p, v)}
    assert biases == {"embeddings/LayerNorm/bias", "mlp/b"}
    assert norms == {
        "embeddings/LayerNorm/weight",
        "embeddings/LayerNorm/bias",
        "layers/ln_1/scale",
    }


# Mask tuning


def test_masks_are_binary_and_sit_where_the_gradient_is_large():
    w, g = normal(0, 8, 6), normal(1, 8, 6)
    adapter = lowrank.mask_tuning(density=0.25)
    s = init(adapter, w, g)
    large = np.argsort(-np.abs(g).ravel())[:12]
    assert set(s["indices"].tolist()) == set(large.tolist())
    values = jnp.array([0.004, 0.005, 0.0051, -1.0] * 3)
    ratio = merge(adapter, w, s | {"mask": values}).ravel() / np.asarray(w).ravel()
    assert set(ratio.tolist()) == {0.0, 1.0}
    close(ratio[np.asarray(s["indices"])], [0, 0, 1, 0] * 3, 0)
    loss = lambda mask: jnp.sum(g * adapter.merge(w, s | {"mask": mask}))
    slope = jit(jax.grad(loss))(values)
    close(slope, (np.asarray(g) * np.asarray(w)).ravel()[np.asarray(s["indices"])])
    for make, message in (
        (lambda: adapter.init(KEY, w), "needs the gradient as statistic"),
        (lambda: lowrank.mask_tuning(density=0), r"density must be in \(0, 1\]"),
        (lambda: lowrank.mask_tuning(start=0.001), "must be above the threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_gradients_are_dropped_as_often_as_they_disagree():
    task, general = normal(0, 40), normal(1, 40)
    drop = lambda k, **o: lowrank.gradient_dropout(
        {"w": task}, {"w": general}, key=k, **o
    )
    kept = np.asarray(jit(jax.vmap(drop))(jax.random.split(KEY, 3000))["w"])
    share = (kept != 0).mean(0)
    t, g = np.asarray(task), np.asarray(general)
    purity = (1 + np.sign(t) * (t + g) / (np.abs(t) + np.abs(g))) / 2
    close(share, purity, 4.5 * 0.5 / math.sqrt(3000))
    agree = np.sign(t) == np.sign(g)
    assert (share[agree] == 1).all()
    assert share[~agree].max() < 1
    assert ((kept == t[None]) | (kept == 0)).all()
    half = np.asarray(drop(KEY, strength=0.5)["w"]) / t
    assert np.allclose(np.minimum(abs(half - 1), abs(half - 0.5)), 0, atol=1e-6)
    close(drop(KEY, strength=0.0)["w"], t, 0)
    assert (lowrank.gradient_dropout(t * 0, g * 0, key=KEY) == 0).all()


def test_general_knowledge_has_the_slope_of_the_divergence():
    z, general, hot = normal(0, 5, 3), normal(1, 5, 3), 2.0

    def divergence(z):
        p, q = jax.nn.softmax(general / hot), jax.nn.log_softmax(z / hot)
        return hot**2 * jnp.mean(jnp.sum(p * (jnp.log(p) - q), -1))

    ours = ft.partial(lowrank.general_knowledge, temperature=hot)
    both = jit(jax.value_and_grad(ours, argnums=(0, 1)))
    true = jit(jax.value_and_grad(divergence))
    (value, (slope, other)), (want, right) = both(z, general), true(z)
    close(slope, right, 1e-6)
    close(other, 0, 0)
    close(value - both(general, general)[0], want, 1e-5)


# All of them

RANKED = {
    "hydra": ft.partial(lowrank.hydra, rank=9),
    "wara": ft.partial(lowrank.wara, rank=5),
    "pela": ft.partial(lowrank.pela, rank=9),
    "orthogonal_adaptation": ft.partial(
        lowrank.orthogonal_adaptation, rank=9, concept=0
    ),
    "pst": ft.partial(lowrank.pst, rank=9),
    "mask_lora": ft.partial(lowrank.mask_lora, rank=9),
    "lora_prune": ft.partial(lowrank.lora_prune, rank=9),
    "scale_lora": ft.partial(lowrank.scale_lora, rank=9),
}


@pytest.mark.parametrize("name", RANKED)
def test_ranks_that_do_not_fit_are_refused(name):
    w = jax.ShapeDtypeStruct((8, 12), jnp.float32)
    with pytest.raises(ValueError, match=r"rank (9 is above min|5 is above the band)"):
        jax.eval_shape(RANKED[name]().init, KEY, w)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        RANKED[name](rank=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lowrank.sara(density=0), r"density must be in \(0, 1\]"),
        (lambda: lowrank.sara(density=1.5), r"density must be in \(0, 1\]"),
        (lambda: lowrank.pst(rank=1, sparsity=1), r"sparsity must be in \[0, 1\)"),
        (lambda: lowrank.pst(rank=1, score_rank=0), "rank must be at least 1"),
        (lambda: lowrank.tlora(rank=1, transform_rank=0), "rank must be at least 1"),
        (
            lambda: lowrank.tlora(rank=1, transform_rank=1, order=0),
            "order must be at least 1",
        ),
        (
            lambda: lowrank.orthogonal_adaptation(rank=1, concept=-1),
            "concept must be at least 0",
        ),
        (lambda: lowrank.bone(block=0), "block must be at least 1"),
        (lambda: lowrank.pela_rank(4, 4, ratio=0), "ratio must be positive"),
        (lambda: lowrank.feature_distillation([], []), "0 features of student"),
        (
            lambda: lowrank.gradient_dropout(
                {"w": jnp.ones(2)}, {"w": jnp.ones(3)}, key=KEY
            ),
            "general",
        ),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def arrays(jaxpr):
    """The sizes of all that a program computes."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from arrays(inner)


@pytest.mark.parametrize(
    "adapter",
    [
        lowrank.hydra(rank=2),
        lowrank.lora_prune(rank=2),
        lowrank.orthogonal_adaptation(rank=2, concept=1),
        lowrank.pela(rank=2),
        lowrank.tlora(rank=2, transform_rank=2),
        lowrank.wara(rank=2, levels=2),
        lowrank.bone(block=8, form="row"),
    ],
    ids=lambda a: a.config[0],
)
def test_applying_forms_no_matrix_of_the_weights_size(adapter):
    """Nor of the inputs' squared: forward and backward, for a few rows."""
    n, m = 256, 128
    w = jax.ShapeDtypeStruct((n, m), jnp.float32)
    x = jax.ShapeDtypeStruct((4, n), jnp.float32)
    s = jax.eval_shape(adapter.init, KEY, w)
    fixed = {name: s.pop(name) for name in adapter.fixed}
    loss = lambda s, x, w, fixed: jnp.sum(jnp.sin(adapter.apply(x, w, s | fixed)))
    program = jax.make_jaxpr(jax.grad(loss))(s, x, w, fixed)
    assert max(arrays(program.jaxpr)) <= n * m // 2


def test_what_is_trained_is_as_small_as_promised():
    n, m, r = 64, 32, 2
    w = jax.ShapeDtypeStruct((n, m), jnp.float32)

    def trained(adapter):
        s = jax.eval_shape(adapter.init, KEY, w)
        return sum(v.size for name, v in s.items() if name not in adapter.fixed)

    assert trained(lowrank.hydra(rank=r)) == r * (n + m) + 2 * r * m
    assert trained(lowrank.wara(rank=r)) == 4 * r * (n + m) // 2
    assert trained(lowrank.wara(rank=r, shared=True)) == r * (n + m) // 2
    assert trained(lowrank.bone(block=4)) == 4 * m
    assert trained(lowrank.bone(block=4, form="row")) == 4 * n
    assert trained(lowrank.sara(density=1 / 64)) == n * m // 64
    assert trained(lowrank.orthogonal_adaptation(rank=r, concept=3)) == r * m
    assert trained(lowrank.pst(rank=r)) == 2 * r * (n + m) + n + m
    transform, residual = 9 * 2 * 8 * 8, r * r * (8 + 8 + 4 + 8)
    assert trained(lowrank.tlora(rank=r, transform_rank=3)) == transform + residual
