"""AdaMerging, aTLAS and the objectives without labels."""

from cases import close, model, stacked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import merge, tree

KEY = jax.random.key(3)
each = jax.tree.map


def normal(*shape, seed=0):
    """Float32 draws that cost no compilation."""
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


def apply(params, x):
    """Logits of two tasks, by two layers and two heads."""
    h = jnp.tanh(x @ params["a"])
    return [h @ params["b"]["c"].T, -h @ params["b"]["c"].T]


X = normal(40, 6, 3, seed=5)
GIVEN = {"base": model(seed=50), "apply": apply}


def merged_by(weights, density=None):
    deltas = merge.task_vectors(stacked(3), GIVEN["base"])
    if density:
        deltas = merge.trim(deltas, density=density)
        keep = merge.elect(deltas)
        deltas = each(lambda v, m: jnp.where(m, v, 0), deltas, keep)
    summed = merge.task_arithmetic(deltas, weights=weights)
    return merge.add(GIVEN["base"], summed)


@pytest.mark.parametrize(
    ("per", "density"), [("model", None), ("leaf", 0.5), ("layer", None)]
)
def test_adamerging_descends_the_entropy(per, density):
    got = merge.adamerging(stacked(3), X, per=per, density=density, epochs=4, **GIVEN)
    by_leaf = merge.by_leaf(got.coefficients, stacked(3), per=per)
    close(got.params, merged_by(by_leaf, density), 1e-5)
    start = merged_by(0.3, density)
    np.testing.assert_allclose(got.losses[0], merge.entropy(apply(start, X[0])), 1e-5)
    mean = lambda p: np.mean([merge.entropy(apply(p, x)) for x in X])
    assert mean(got.params) < mean(start)


def test_adamerging_takes_adams_first_step():
    """By 0.001 against the sign of the gradient, which finite differences give."""
    got = merge.adamerging(stacked(3), X[:1], per="model", **GIVEN)
    at = lambda c: float(merge.entropy(apply(merged_by(c), X[0])))
    e = 0.01 * np.eye(3)
    slope = np.array([at(0.3 + v) - at(0.3 - v) for v in e])
    np.testing.assert_allclose(got.coefficients, 0.3 - 1e-3 * np.sign(slope), 1e-5)


def test_adamerging_leaves_models_that_are_the_base():
    same = each(lambda v: jnp.stack([v] * 3), GIVEN["base"])
    got = merge.adamerging(same, X, start=0.5, **GIVEN)
    close(got.params, GIVEN["base"], 0)
    close(got.coefficients, each(lambda _: jnp.full(3, 0.5), same), 0)


def atlas(loss, **more):
    """`merge.atlas` by plain descent."""
    given = {"base": GIVEN["base"], "loss": loss, "optimiser": optax.sgd(0.003)}
    return merge.atlas(stacked(3), X, **(given | more))


def setting(value):
    """An optimiser that sets what starts at 0."""
    updates = lambda g, state, _: (each(lambda v: jnp.full_like(v, value), g), state)
    return optax.GradientTransformation(lambda _: (), updates)


@pytest.mark.parametrize("per", ["model", "leaf", "layer", "column"])
def test_atlas_with_coefficients_0_and_1(per):
    """Nothing gives the base, and everything the base with all task vectors added."""
    loss = lambda p, x: jnp.sum(p["a"])
    shape = each(jnp.shape, merge.coefficients(stacked(3), per=per))
    for value, want in ((0.0, GIVEN["base"]), (1.0, merged_by(1.0))):
        one = {"base": GIVEN["base"], "loss": loss, "optimiser": setting(value)}
        got = merge.atlas(stacked(3), X[:1], per=per, **one)
        close(got.params, want, 2e-6 * value)
        assert each(jnp.shape, got.coefficients) == shape
        assert all((c == value).all() for c in jax.tree.leaves(got.coefficients))


def test_atlas_finds_the_blocks_of_a_target():
    """A model made of one leaf of each of two experts needs 6 numbers."""
    deltas = merge.task_vectors(stacked(3), GIVEN["base"])
    true = {"a": jnp.array([1.0, 0.0, 0.0]), "b": {"c": jnp.array([0.0, 0.5, 0.0])}}
    target = merge.add(GIVEN["base"], merge.task_arithmetic(deltas, weights=true))
    square = lambda p, x: sum(
        jnp.sum((a - b) ** 2)
        for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(target), strict=True)
    )
    got = atlas(square, epochs=60)
    close(got.coefficients, true, 1e-3)
    close(got.params, target, 1e-3)
    assert sum(c.size for c in jax.tree.leaves(got.coefficients)) == 6


def test_atlas_times_k_holds_atlas_and_more():
    parts = merge.random_parts(GIVEN["base"], parts=4, key=KEY)
    loss = lambda p, x: jnp.sum((p["a"] - 1) ** 2) + jnp.sum(p["b"]["c"] ** 2)
    plain, split = atlas(loss, epochs=10), atlas(loss, epochs=10, parts=parts)
    assert {c.shape for c in jax.tree.leaves(split.coefficients)} == {(3, 4)}
    assert split.losses[-1] < plain.losses[-1]
    whole = each(jnp.zeros_like, parts)  # one part: the same as none
    one = atlas(loss, epochs=10, parts=whole)
    close(one.params, plain.params, 1e-5)
    deltas = merge.task_vectors(stacked(3), GIVEN["base"])
    dealt = each(lambda c, p: c[:, p], split.coefficients, parts)
    scaled = merge.fuse(merge.anisotropic(deltas, scale=dealt))
    close(split.params, merge.add(GIVEN["base"], scaled), 1e-5)
    with pytest.raises(ValueError, match="by leaf"):
        atlas(loss, parts=parts, per="model")
    with pytest.raises(ValueError, match="parts differs at 'a'"):
        atlas(loss, parts=parts | {"a": jnp.zeros(3, int)})


def test_atlas_adapts_without_labels():
    sure = lambda p, x: merge.entropy(apply(p, x))
    views = lambda p, x: merge.pseudo_label(
        apply(p, x)[0], apply(p, x + 0.1)[0], threshold=0.5
    )
    for loss in (sure, views):
        got = merge.atlas(stacked(3), X, base=GIVEN["base"], loss=loss)
        mean = lambda p, loss=loss: np.mean([loss(p, x) for x in X])
        assert mean(got.params) < mean(GIVEN["base"])


# --- objectives ----------------------------------------------------------------------


def test_entropy_is_that_of_the_distribution():
    logits = normal(7, 5)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    want = -(p * np.log(p)).sum(1).mean()
    np.testing.assert_allclose(merge.entropy(logits), want, 1e-6)
    np.testing.assert_allclose(
        merge.entropy([logits, logits[:3]]),
        want + (-(p[:3] * np.log(p[:3])).sum(1).mean()),
        1e-6,
    )
    impossible = jnp.array([[0.0, -jnp.inf, 0.0]])
    np.testing.assert_allclose(merge.entropy(impossible), np.log(2), 1e-6)
    assert np.isfinite(jax.grad(merge.entropy)(logits)).all()
    half = merge.entropy(logits.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, want, 1e-2)
    with pytest.raises(ValueError, match="class axis"):
        merge.entropy(jnp.zeros(()))


def test_pseudo_label_is_the_cross_entropy_of_the_confident():
    weak = jnp.array([[4.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 5.0]])
    strong = normal(3, 3)
    log = np.asarray(jax.nn.log_softmax(strong))
    got = merge.pseudo_label(weak, strong, threshold=0.9)
    np.testing.assert_allclose(got, -(log[0, 0] + log[2, 2]) / 2, 1e-6)
    trusted = jnp.array([-1, 1, 0])
    got = merge.pseudo_label(weak, strong, threshold=0.9, trusted=trusted)
    np.testing.assert_allclose(got, -(log[0, 0] + log[1, 1] + log[2, 0]) / 3, 1e-6)
    assert merge.pseudo_label(weak, strong, threshold=1.0) == 0
    slope = jax.grad(lambda w: merge.pseudo_label(w, strong, threshold=0.9))(weak)
    assert not slope.any()
    with pytest.raises(ValueError, match="views differ"):
        merge.pseudo_label(weak, strong[:2])


def test_most_confident_is_balanced():
    logits = normal(60, 4)
    got = np.asarray(merge.most_confident(logits, count=5))
    p = np.asarray(jax.nn.softmax(logits))
    top = [set(np.argsort(-p[:, c])[:5].tolist()) for c in range(4)]
    for i, label in enumerate(got):
        claims = [c for c in range(4) if i in top[c]]
        assert label == (max(claims, key=lambda c: p[i, c]) if claims else -1)
    with pytest.raises(ValueError, match="count must be"):
        merge.most_confident(logits, count=61)


def test_results_keep_the_structure_of_a_model():
    got = merge.adamerging(stacked(3), X[:1], **GIVEN)
    tree.check_like(got.params, GIVEN["base"])
