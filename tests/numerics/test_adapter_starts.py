"""Where adapters start, which slopes they have, and what they refuse.

The adapters from `mask_lora` to `waveft`, in float64.
"""

import functools as ft
import math

from adapter_values import EVEN, KEYS, ODD, close, summed, weight
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
both = pytest.mark.parametrize("shape", [EVEN, ODD])


def start(adapter, shape, *statistic, sizes=None):
    """Its first state, shared entries included, as float64."""
    with jax.enable_x64(True):
        s = jit(adapter.init)(KEYS[0], jnp.asarray(weight(shape)), *statistic)
        if adapter.shared is not None:
            s = s | adapter.shared(KEYS[0], sizes or (shape,))
        return jax.tree.map(np.asarray, s)


def slopes(adapter, shape, s, g, *names):
    """Those of the sum of G and the merged weight, elementwise multiplied."""
    with jax.enable_x64(True):
        w, g, s = jax.tree.map(jnp.asarray, (weight(shape), g, s))
        loss = lambda t: jnp.sum(g * adapter.merge(w, s | t))
        return jit(jax.grad(loss))({k: s[k] for k in names})


def parts(shape):
    """U [n, k], the singular values, and V^T [k, m]."""
    return np.linalg.svd(weight(shape), full_matrices=False)


def upstream(shape):
    return np.random.default_rng(5).normal(size=shape)


# From the singular vectors


@both
def test_mica_starts_at_the_last_right_singular_vectors(shape):
    s, (_, sizes, v) = start(lowrank.mica(rank=2), shape), parts(shape)
    close(s["b"].T @ s["b"], v[-2:].T @ v[-2:])
    close(s["b"] @ s["b"].T, np.eye(2))
    close(np.sort(np.linalg.norm(weight(shape) @ s["b"].T, axis=0)), sizes[:-3:-1])


@both
def test_pissa_starts_at_the_principal_part_over_its_scale(shape):
    s, (u, sizes, v) = start(lowrank.pissa(rank=2, alpha=3), shape), parts(shape)
    close(1.5 * s["a"] @ s["b"], (u[:, :2] * sizes[None, :2]) @ v[:2])
    close(s["a"].T @ s["a"], np.diag(sizes[:2] / 1.5))
    close(s["b"] @ s["b"].T, np.diag(sizes[:2] / 1.5))
    for name in "ab":
        np.testing.assert_array_equal(s[name], s[f"{name}0"])


def test_pissa_of_a_sketch_as_wide_as_the_weight_is_exact():
    """It has 10 columns more than the rank."""
    s = start(lowrank.pissa(rank=2, alpha=3, rslora=True, niter=4), ODD)
    u, sizes, v = parts(ODD)
    want = (u[:, :2] * sizes[None, :2]) @ v[:2]
    close(3 / math.sqrt(2) * s["a"] @ s["b"], want, 1e-8)


@both
def test_olora_starts_at_the_first_columns_of_q(shape):
    s, (q, r) = start(lowrank.olora(rank=3), shape), np.linalg.qr(weight(shape).T)
    close(s["a"] @ s["b"], (q[:, :3] @ r[:3]).T)
    close(s["b"] @ s["b"].T, np.eye(3))
    close(s["b"].T @ s["b"], q[:, :3] @ q[:, :3].T)
    close(np.triu(s["a"].T), s["a"].T)


@both
def test_pela_starts_at_the_best_approximation(shape):
    s, (u, sizes, v) = start(lowrank.pela(rank=2), shape), parts(shape)
    close(s["a"] @ s["b"], (u[:, :2] * sizes[None, :2]) @ v[:2])
    close(s["a"].T @ s["a"], np.diag(sizes[:2]))
    close(s["b"] @ s["b"].T, np.diag(sizes[:2]))


@pytest.mark.parametrize("split", [False, True])
def test_psofts_basis_is_the_principal_subspace(split):
    s, (u, sizes, v) = start(lowrank.psoft(rank=2, split=split), ODD), parts(ODD)
    close(s["a"] @ s["b"], (u[:, :2] * sizes[None, :2]) @ v[:2])
    close(s["a"].T @ s["a"], np.diag(sizes[:2]) if split else np.eye(2))
    close(s["alpha"], np.ones(2))
    close(s["beta"], np.ones(2))


def test_tinyloras_factors_have_the_roots_of_the_singular_values():
    s = start(lowrank.tinylora(rank=2, size=200), ODD)
    u, sizes, v = parts(ODD)
    close(s["a"] @ s["b"], (u[:, :2] * sizes[None, :2]) @ v[:2])
    close(s["a"].T @ s["a"], np.diag(sizes[:2]))
    assert abs(s["p"].var() * 2 - 1) < 0.2  # 800 draws: 4 of their deviations


@both
@pytest.mark.parametrize(("keep", "k"), [(None, 2), (1, 1), (0.8, 3)])
def test_osf_parts_the_singular_directions(shape, keep, k):
    k += keep == 0.8 and min(shape) == 5
    s, (u, sizes, v) = start(lowrank.osf(keep=keep), shape), parts(shape)
    low = (u[:, k:] * sizes[None, k:]) @ v[k:]
    close((s["a0"] * s["d0"][None]) @ s["b0"], low)
    close(s["d0"], sizes[k:])
    sides = {"high_in": (u[:, :k] @ u[:, :k].T), "high_out": (v[:k].T @ v[:k])}
    smaller = "high_in" if shape[0] < shape[1] else "high_out"
    assert s[smaller].size == 0
    for name in sides.keys() - {smaller}:
        h = s[name] if name == "high_in" else s[name].T
        close(h @ h.T, sides[name])


@both
def test_osfs_slopes_are_orthogonal_to_what_is_preserved(shape):
    """Those of A and B projected, that of d as it is."""
    adapter, g = lowrank.osf(keep=2), upstream(shape)
    s, (u, _, v) = start(adapter, shape), parts(shape)
    got = slopes(adapter, shape, s, g, "a", "d", "b")
    a, d, b = s["a"], np.diag(s["d"]), s["b"]
    out_of_u = np.eye(shape[0]) - u[:, :2] @ u[:, :2].T
    out_of_v = np.eye(shape[1]) - v[:2].T @ v[:2]
    close(got["a"], out_of_u @ g @ (d @ b).T)
    close(got["b"], (a @ d).T @ g @ out_of_v)
    close(got["d"], np.diag(a.T @ g @ b.T))


# From the weight's entries


def test_sara_trains_the_smallest_entries_and_at_least_one():
    w = weight(EVEN)
    for density, count in ((0.25, 6), (0.001, 1)):
        s = start(lowrank.sara(density=density), EVEN)
        rest = np.delete(np.abs(w).ravel(), s["indices"])
        assert len(s["indices"]) == count
        assert np.abs(w.ravel()[s["indices"]]).max() <= rest.min()
        np.testing.assert_array_equal(s["values"], w.ravel()[s["indices"]])


def test_mask_tunings_places_and_slopes():
    """A mask has the slope of its binary value, G times W, also where it is 0."""
    g = upstream(EVEN)
    adapter = lowrank.mask_tuning(density=0.5)
    s = start(adapter, EVEN, jnp.asarray(g))
    rest = np.delete(np.abs(g).ravel(), s["indices"])
    assert np.abs(g.ravel()[s["indices"]]).min() >= rest.max()
    close(s["mask"], np.full(12, 0.01), 1e-9)
    s["mask"] = np.where(np.arange(12) % 2, s["mask"], -1.0)
    got = slopes(adapter, EVEN, s, g, "mask")["mask"]
    close(got, (g * weight(EVEN)).ravel()[s["indices"]])


@pytest.mark.parametrize("mask", ["magnitude", "statistic"])
def test_shira_sits_where_scores_are_largest(mask):
    scores = np.abs(weight(ODD) if mask == "magnitude" else upstream(ODD))
    given = [jnp.asarray(scores)] if mask == "statistic" else []
    s = start(lowrank.shira(rank=1, mask=mask), ODD, *given)
    places = set(zip(s["rows"].tolist(), s["columns"].tolist(), strict=True))
    best = np.argsort(-scores, None)[: sum(ODD)]
    assert places == {divmod(int(v), ODD[1]) for v in best}


def test_shiras_random_places_are_all_different_and_follow_the_seed():
    chosen = []
    for seed in (None, 3, 4):
        s = start(lowrank.shira(rank=2, seed=seed), (8, 9))
        places = list(zip(s["columns"].tolist(), s["rows"].tolist(), strict=True))
        assert len(set(places)) == 34
        assert places == sorted(places)
        chosen.append(tuple(places))
    assert len(set(chosen)) == 3


# Random and shared entries


def test_concepts_have_disjoint_parts_of_one_basis_of_n_and_the_seed():
    make = ft.partial(lowrank.orthogonal_adaptation, rank=2)
    one, two, three = (start(make(concept=i), EVEN)["a"] for i in range(3))
    basis = np.concatenate([one, two, three], axis=1)
    close(basis.T @ basis, np.eye(6))
    np.testing.assert_array_equal(start(make(concept=1), (6, 9))["a"], two)
    other = start(make(concept=1, seed=1), EVEN)["a"]
    assert np.abs(other - two).max() > 0.1


def test_uniloras_projection_has_orthonormal_columns():
    s = start(lowrank.unilora(rank=2, size=7, bound=0.5), ODD)
    assert 0.1 < np.abs(s["theta"]).max() <= 0.5
    index = np.concatenate([s["index_a"].ravel(), s["index_b"].ravel()])
    counts = np.bincount(index, minlength=7)
    assert counts.max() - counts.min() <= 1
    close(s["scale_a"], np.ones((5, 2)))
    close(s["norm"], math.sqrt(7 / 24), 1e-7)
    whole = lowrank.unilora(rank=1, size=4).shared(KEYS[0], (EVEN, ODD))
    close(whole["norm"], math.sqrt(4 / 22), 1e-7)


def test_vblora_starts_within_its_bounds():
    options = {"rank": 8, "num_vectors": 50, "vector_length": 2}
    s = start(lowrank.vblora(**options, bank_bound=0.3, logits_std=0.4), EVEN)
    assert 0.28 < np.abs(s["bank"]).max() <= 0.3
    logits = np.concatenate([s["logits_a"].ravel(), s["logits_b"].ravel()])
    assert abs(logits.std() / 0.4 - 1) < 0.07  # 2000 draws: 4 of their deviations
    assert abs(logits.mean()) < 0.04


def test_projections_are_of_the_largest_sides_and_of_the_seed():
    sizes = (EVEN, (3, 9), (8, 2))
    s = start(lowrank.vera(rank=3, d_initial=0.3), EVEN, sizes=sizes)
    assert (s["proj_a"].shape, s["proj_b"].shape) == ((8, 3), (3, 9))
    close(s["d"], np.full(3, 0.3), 1e-7)
    other = start(lowrank.vera(rank=3, seed=1), EVEN, sizes=sizes)
    assert np.abs(other["proj_a"] - s["proj_a"]).max() > 1e-2
    sides = [start(lowrank.randlora(rank=3, bases=b, seed=2), EVEN, sizes=sizes)
             for b in ("dense", "sparse", "very_sparse")]  # fmt: skip
    for s in sides:
        assert (s["basis_a"].shape, s["basis_b"].shape) == ((3, 8), (9, 3, 3))
        close(s["gamma"], np.full((2, 4), s["gamma"][0, 0]))
    for s in sides[1:]:
        assert len(np.unique(s["basis_b"])) == 3
        close(s["basis_b"].std(ddof=1), 1, 1e-6)


def test_scalearn_starts_about_an_even_share():
    adapter = lowrank.scalearn(lowrank.mica(rank=2), sources=4, initial=3.0)
    source = start(lowrank.mica(rank=2), EVEN)
    four = jax.tree.map(lambda v: np.stack([v] * 4), source)
    s = start(adapter, EVEN, four)
    assert s["omega"].shape == (4, 4)
    assert 0 < np.abs(s["omega"] - 0.75).max() < 0.005
    np.testing.assert_array_equal(s["sources"]["b"][2], source["b"])


def test_constant_starts():
    s = start(lowrank.scale_lora(rank=3), EVEN)
    close(s["a"], np.full((6, 3), 3**-0.5))
    close(s["b"], np.full((3, 4), 3**-0.5))
    for variant in (1, 2, 4):
        s = start(lowrank.road(variant=variant, group=2), EVEN)
        np.testing.assert_array_equal(s["alpha"], np.ones(2 * variant))
    s = start(lowrank.trainable_tokens(indices=(5, 2)), EVEN)
    np.testing.assert_array_equal(s["rows"], weight(EVEN)[[5, 2]])
    assert start(lowrank.pst(rank=1, sparsity=0.25), EVEN)["sparsity"] == 0.25


def test_road_turns_a_bias_as_it_turns_an_output():
    adapter, angle = lowrank.road(group=2), math.pi / 6
    with jax.enable_x64(True):
        s = {"theta": jnp.full(1, angle), "alpha": jnp.full(1, 2.0)}
        got = adapter.bias(jnp.array([3.0, 5.0]), s)
        assert adapter.bias(None, s) is None
    c, d = 2 * math.cos(angle), 2 * math.sin(angle)
    close(got, [3 * c - 5 * d, 3 * d + 5 * c])


def test_coft_passes_the_slope_as_it_is():
    """The slope at Q outside the ball is that of the rotation at its projection."""
    q, g = np.array([[3.0, -1.0, 2.0]]), upstream((3, 4))
    inside = q * 0.4 / np.linalg.norm([q, -q])
    bounded, free = lowrank.oft(blocks=1, eps=0.4), lowrank.oft(blocks=1)
    got = slopes(bounded, (3, 4), {"q": q}, g, "q")["q"]
    close(got, slopes(free, (3, 4), {"q": inside}, g, "q")["q"])


def test_one_term_of_the_series_is_the_identity():
    adapter, g = lowrank.oft(block_size=3, terms=1), upstream(EVEN)
    with jax.enable_x64(True):
        w, s = jnp.asarray(weight(EVEN)), {"q": jnp.ones((2, 3))}
        np.testing.assert_array_equal(jit(adapter.merge)(w, s), weight(EVEN))
    close(slopes(adapter, EVEN, s, g, "q")["q"], np.zeros((2, 3)), 0)


def test_slopes_of_products_of_factors():
    """G B^T and A^T G, by way of the mask, the weight or the scale."""
    g, w = upstream(EVEN), weight(EVEN)
    rng = np.random.default_rng(6)
    s = {"a": rng.normal(size=(6, 2)), "b": rng.normal(size=(2, 4))}
    ways = {
        lowrank.mask_lora(rank=2, alpha=3): 1.5 * g * (w != 0),
        lowrank.scale_lora(rank=2): g * w,
        lowrank.pela(rank=2): g,
    }
    for adapter, seen in ways.items():
        got = slopes(adapter, EVEN, s, g, "a", "b")
        close(got["a"], summed(seen, s["b"].T))
        close(got["b"], summed(s["a"].T, seen))


# Errors

p = ft.partial
RANKED = {  # those of a rank from 1 to min(n, m), which is 4 here
    "mask_lora": lowrank.mask_lora,
    "mica": lowrank.mica,
    "olora": lowrank.olora,
    "orthogonal_adaptation": p(lowrank.orthogonal_adaptation, concept=0),
    "pela": lowrank.pela,
    "pissa": lowrank.pissa,
    "psoft": lowrank.psoft,
    "pst": lowrank.pst,
    "scale_lora": lowrank.scale_lora,
    "tinylora": lowrank.tinylora,
    "unilora": lowrank.unilora,
}
ANY_RANK = {
    "miss": lowrank.miss,
    "parallel": lowrank.parallel,
    "randlora": lowrank.randlora,
    "scaled_parallel": lowrank.scaled_parallel,
    "shira": lowrank.shira,
    "tlora": p(lowrank.tlora, transform_rank=1),
    "tlora/transform": lambda rank: lowrank.tlora(rank=1, transform_rank=rank),
    "pst/score": lambda rank: lowrank.pst(rank=1, score_rank=rank),
    "vblora": lowrank.vblora,
    "vera": lowrank.vera,
    "wara": lowrank.wara,
}
REFUSED = [
    (p(lowrank.mask_tuning, density=0.0), r"density must be in \(0, 1\], got 0.0"),
    (p(lowrank.mask_tuning, density=1.1), r"density must be in \(0, 1\], got 1.1"),
    (p(lowrank.mask_tuning, threshold=0.1, start=0.1), "start 0.1 must be above the"),
    (p(lowrank.miss, rank=1, mode="bone"), "mode must be .* got 'bone'"),
    (p(lowrank.oft), "either block_size or blocks is needed"),
    (p(lowrank.oft, block_size=2, blocks=2), "either block_size or blocks is needed"),
    (p(lowrank.oft, blocks=0), "blocks=0: below 1"),
    (p(lowrank.oft, blocks=1, terms=0), "terms must be at least 1, got 0"),
    (p(lowrank.oft, blocks=1, eps=0), "eps must be positive, got 0"),
    (p(lowrank.olora, rank=1, alpha=0), "alpha must be above 0 for olora, got 0"),
    (p(lowrank.pissa, rank=1, alpha=-1), "alpha must be above 0 for pissa, got -1"),
    (p(lowrank.pissa, rank=1, niter=-1), "niter must be at least 0, got -1"),
    (p(lowrank.orthogonal_adaptation, rank=1, concept=-1), "concept must be at least"),
    (p(lowrank.parallel, rank=1, form="odd"), "form 'odd' is none of"),
    (p(lowrank.scaled_parallel, rank=1, form="odd"), "form 'odd' is none of"),
    (p(lowrank.psoft, rank=1, terms=0), "terms must be at least 1, got 0"),
    (p(lowrank.pst, rank=1, sparsity=1), r"sparsity must be in \[0, 1\), got 1"),
    (p(lowrank.pst, rank=1, sparsity=-0.1), r"sparsity must be in \[0, 1\), got -0.1"),
    (p(lowrank.randlora, rank=1, bases="odd"), "bases 'odd' is none of dense, sparse"),
    (p(lowrank.road, variant=3), "variant must be 1, 2 or 4, got 3"),
    (p(lowrank.road, group=5), "group must be even, got 5"),
    (p(lowrank.sara, density=0), r"density must be in \(0, 1\], got 0"),
    (p(lowrank.sara, density=2), r"density must be in \(0, 1\], got 2"),
    (p(lowrank.scalearn, lowrank.ia3(), sources=0), "sources must be at least 1"),
    (p(lowrank.shira, rank=1, mask="odd"), "mask must be \"random\", .*: 'odd'"),
    (p(lowrank.tinylora, size=0), "size 0 and groups None must be at least 1"),
    (p(lowrank.tinylora, size=3, groups=0), "size 3 and groups 0 must be at least 1"),
    (p(lowrank.tlora, rank=1, transform_rank=1, order=0), "order must be at least 1"),
    (p(lowrank.trainable_tokens, indices=()), r"rows of the table, each once: \(\)"),
    (p(lowrank.trainable_tokens, indices=(2, 2)), r"each once: \(2, 2\)"),
    (p(lowrank.unilora, size=0), "size must be at least 1, got 0"),
    (p(lowrank.vblora, rank=1, topk=0), "topk must be from 1 to 256 vectors, got 0"),
    (p(lowrank.vblora, rank=1, num_vectors=1), "topk must be from 1 to 1 vectors"),
    (p(lowrank.wara, rank=1, levels=0), "levels must be at least 1, got 0"),
    (p(lowrank.wara, rank=1, wavelet="db11"), "wavelet 'db11' is none of haar, db1"),
    (p(lowrank.wara, rank=1, wavelet="bior2.3"), "wavelet 'bior2.3' is none of haar"),
    (p(lowrank.waveft, frequencies=0), "frequencies must be at least 1, got 0"),
    (p(lowrank.waveft, frequencies=1, wavelet="sym1"), "wavelet 'sym1' is none of db1"),
]
UNFIT = [
    (p(lowrank.mask_tuning, density=0.5), "needs the gradient as statistic"),
    (p(lowrank.miss, rank=7), "rank 7 is above the 6 inputs"),
    (p(lowrank.miss, rank=4, mode="bat"), "rank 4 does not divide"),
    (
        p(lowrank.miss, rank=1, mode="mini", width=3),
        "width 3 does not divide the 4 out",
    ),
    (p(lowrank.oft, block_size=4), "block_size=4 does not divide 6 inputs"),
    (p(lowrank.oft, blocks=6), "blocks=6 does not divide 6 inputs into blocks of 2"),
    (p(lowrank.orthogonal_adaptation, rank=2, concept=3), "beyond the 3 of 6 inputs"),
    (p(lowrank.osf, keep=4), "keep=4 preserves 4 of 4 directions"),
    (p(lowrank.osf, keep=0), "keep=0 preserves 0 of 4 directions"),
    (p(lowrank.osf, keep=0.2), "keep=0.2 preserves 0 of 4 directions"),
    (p(lowrank.osf, keep=1.0), "keep=1.0 preserves 4 of 4 directions"),
    (p(lowrank.road, group=8), "group 8 does not divide the 4 outputs"),
    (p(lowrank.shira, rank=3), r"rank 3 has 30 entries, above those of \[6, 4\]"),
    (p(lowrank.shira, rank=1, mask="statistic"), "mask='statistic' with no statistic"),
    (p(lowrank.trainable_tokens, indices=(1, 6)), r"index 6 is no row of \[6, ...\]"),
    (p(lowrank.trainable_tokens, indices=(-1,)), "rows of the table"),
    (
        p(lowrank.vblora, rank=1, vector_length=3),
        r"vector_length=3 does not .*\[6, 4\]",
    ),
    (p(lowrank.wara, rank=3), r"rank 3 is above the band \[3, 2\] of .* at level 1"),
    (p(lowrank.wara, rank=2, levels=2), r"above the band \[2, 1\] of .* at level 2"),
    (p(lowrank.waveft, frequencies=25), "frequencies=25 is above"),
]
shown = lambda v: v if isinstance(v, str) else ""


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=shown)
def test_options_are_refused_where_they_are_given(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def fits(make):
    w = jax.ShapeDtypeStruct(EVEN, jnp.float32)
    return jax.eval_shape(make().init, KEYS[0], w)


@pytest.mark.parametrize(("make", "message"), UNFIT, ids=shown)
def test_options_are_refused_that_do_not_fit_the_weight(make, message):
    with pytest.raises(ValueError, match=message):
        fits(make)


@pytest.mark.parametrize("name", RANKED | ANY_RANK)
def test_ranks_from_1_on(name):
    for rank in (0, -1):
        with pytest.raises(ValueError, match=f"rank must be at least 1, got {rank}"):
            (RANKED | ANY_RANK)[name](rank=rank)


@pytest.mark.parametrize("name", RANKED)
def test_ranks_up_to_the_smaller_side(name):
    assert fits(p(RANKED[name], rank=4))
    with pytest.raises(ValueError, match=r"rank 5 is above min\(n, m\) of .*\[6, 4\]"):
        fits(p(RANKED[name], rank=5))


def test_statistics_are_refused_where_they_do_not_belong():
    w, sources = jnp.ones(EVEN), {"a": jnp.ones((3, 6, 1)), "b": jnp.ones((3, 1, 4))}
    with pytest.raises(ValueError, match="mask='magnitude' with a statistic"):
        lowrank.shira(rank=1, mask="magnitude").init(KEYS[0], w, w)
    adapter = lowrank.scalearn(lowrank.lora(rank=1), sources=2)
    with pytest.raises(ValueError, match="got 3 sources, expected 2"):
        adapter.init(KEYS[0], w, sources)
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    with pytest.raises(ValueError, match="4294967296 entries is beyond 32-bit"):
        jax.eval_shape(lowrank.sara(density=0.5).init, KEYS[0], huge)
