"""Learned and searched merges against closed forms."""

import functools as ft

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


def square(params, target):
    """The squared distance of two trees."""
    parts = each(lambda a, b: jnp.sum((a - b) ** 2), params, target)
    return sum(jax.tree.leaves(parts))


def repeated(target, t=1):
    return each(lambda v: jnp.broadcast_to(v, (t, *v.shape)), target)


def test_learn_reaches_the_least_squares_optimum():
    target = model(seed=9)
    flat = lambda m: np.concatenate([np.ravel(v) for v in jax.tree.leaves(m)])
    rows = np.stack([flat(m) for m in tree.unstack(stacked(3))])
    want = np.linalg.lstsq(rows.T, flat(target), rcond=None)[0]
    got = merge.learn(
        stacked(3),
        repeated(target),
        method=merge.task_arithmetic,
        loss=square,
        coefficients={"weights": np.zeros(3)},
        optimiser=optax.sgd(0.01),
        epochs=300,
    )
    np.testing.assert_allclose(got.coefficients["weights"], want, atol=1e-5)
    close(got.params, merge.task_arithmetic(stacked(3), **got.coefficients))
    assert got.losses.shape == (300,)
    np.testing.assert_allclose(
        got.losses[0], square(each(jnp.zeros_like, target), target)
    )
    np.testing.assert_allclose(
        got.losses[-1], np.sum((rows.T @ want - flat(target)) ** 2), rtol=1e-5
    )


def softmaxed(models, *, logits):
    return merge.linear(models, weights=jax.nn.softmax(logits), normalize=False)


RECIPES = {
    "ties": (merge.ties, {"weights": [0.7, 0.2, 0.4], "scale": 0.6}, 3),
    "softmax": (softmaxed, {"logits": [0.3, -1.0, 0.4]}, 3),
    "slerp": (merge.slerp, {"t": 0.3}, 2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_any_merge_is_learned_back(name):
    """From another start, the recipe that made a model makes it again."""
    method, true, k = RECIPES[name]
    models = stacked(k)
    true = {n: jnp.asarray(v) for n, v in true.items()}
    start = each(lambda c: c - 0.2 * jnp.cos(jnp.arange(c.size)).reshape(c.shape), true)
    got = merge.learn(
        models,
        repeated(method(models, **true)),
        method=method,
        loss=square,
        coefficients=start,
        optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 300)),
        epochs=300,
    )
    close(got.params, method(models, **true), 1e-3)
    assert float(got.losses[-1]) < 1e-5 < 0.01 < float(got.losses[0])


@pytest.mark.parametrize("per", ["model", "leaf", "layer", "column", lambda p: p[0]])
def test_coefficients_of_every_granularity_are_learned_back(per):
    models = stacked(3)
    true = merge.coefficients(models, per=per)
    leaves, treedef = jax.tree.flatten(true)
    drawn = [1 + 0.3 * normal(*c.shape, seed=i) for i, c in enumerate(leaves)]
    true = jax.tree.unflatten(treedef, drawn)

    def method(deltas, *, blocks):
        scale = merge.by_leaf(blocks, deltas, per=per)
        return merge.task_arithmetic(merge.anisotropic(deltas, scale=scale))

    got = merge.learn(
        models,
        repeated(method(models, blocks=true)),
        method=method,
        loss=square,
        coefficients={"blocks": merge.coefficients(models, per=per)},
        optimiser=optax.adam(optax.cosine_decay_schedule(0.1, 1000)),
        epochs=1000,
    )
    assert got.losses[-1] < 1e-6 * got.losses[0]
    if per != "column":  # 3 models in 3 rows: a column is solved, but not well set
        close(got.coefficients["blocks"], true, 1e-3)


def test_the_gradient_is_the_slope():
    """One step of plain descent moves by the finite differences, in float64."""
    with jax.enable_x64(True):
        start = {"weights": jnp.array([0.5, 0.3, 0.4]), "scale": jnp.array(0.7)}
        flat, unravel = jax.flatten_util.ravel_pytree(start)
        target = model("float64", 9)
        given = {
            "method": ft.partial(merge.ties, density=0.6, consensus="weighted_mean"),
            "loss": square,
            "base": model("float64", 50),
        }
        models, rate = stacked(3, "float64"), optax.sgd(1.0)
        once = merge.learn(
            models, repeated(target), coefficients=start, optimiser=rate, **given
        )
        got = flat - jax.flatten_util.ravel_pytree(once.coefficients)[0]
        shifts = 1e-5 * jnp.concatenate([jnp.eye(4), -jnp.eye(4)])
        around = jax.vmap(unravel)(flat[None] + shifts)
        up, down = jnp.split(
            merge.score(models, target, coefficients=around, **given), 2
        )
        np.testing.assert_allclose(got, (up - down) / 2e-5, rtol=1e-7)


def noisy(t=5):
    return each(lambda v: v[None] + 0.1 * normal(t, *v.shape), model(seed=9))


ADAM = optax.adam(0.1)


def options(**more):
    return {
        "method": merge.task_arithmetic,
        "loss": square,
        "coefficients": {"weights": jnp.ones(3) / 3},
        "optimiser": ADAM,
    } | more


def test_an_iterator_gives_what_stacked_batches_give():
    want = merge.learn(stacked(3), noisy(), **options())
    got = merge.learn(stacked(3), iter(tree.unstack(noisy())), **options())
    close(got, want)
    nothing = merge.learn(stacked(3), iter([]), **options())
    close(nothing.coefficients["weights"], jnp.ones(3) / 3, 0)
    assert nothing.losses.shape == (0,)


def test_compiles_once():
    traces = 0

    def counted(params, target):
        nonlocal traces
        traces += 1
        return square(params, target)

    given = options(loss=counted)
    merge.learn(stacked(3), noisy(), **given)
    assert traces == 1
    merge.learn(stacked(3, seed=1), noisy(), **given)  # other models: no constants
    assert traces == 1
    merge.learn(stacked(3), iter(tree.unstack(noisy())), **given)
    merge.learn(stacked(3), iter(tree.unstack(noisy())), **given)
    assert traces == 2
    for seed in range(3):
        weights = {"weights": normal(7, 3, seed=seed)}
        merge.score(
            stacked(3, seed=seed),
            model(),
            method=merge.task_arithmetic,
            loss=counted,
            coefficients=weights,
        )
    assert traces == 3


def test_many_starts_are_trained_at_once():
    starts = {"weights": normal(4, 3)}
    train = lambda c: merge.learn(stacked(3), noisy(), **options(coefficients=c))
    got = jax.vmap(train)(starts)
    for i in range(4):
        want = train(each(lambda c, i=i: c[i], starts))
        close(each(lambda v, i=i: v[i], got), want, 1e-5)


def test_coefficients_stay_wide_and_the_model_narrow():
    narrow = each(lambda v: v.astype(jnp.bfloat16), stacked(3))
    batches = each(lambda v: v.astype(jnp.bfloat16), noisy())
    got = merge.learn(narrow, batches, **options(coefficients={"weights": [1, 0.0, 2]}))
    assert {v.dtype.name for v in jax.tree.leaves(got.params)} == {"bfloat16"}
    assert {c.dtype.name for c in jax.tree.leaves(got.coefficients)} == {"float32"}


def test_learn_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match="epochs must be"):
        merge.learn(stacked(3), noisy(), **options(), epochs=0)
    with pytest.raises(ValueError, match="run once"):
        merge.learn(stacked(3), iter([]), **options(), epochs=2)
    with pytest.raises(ValueError, match="share t"):
        merge.learn(stacked(3), (jnp.ones(3), jnp.ones(4)), **options())
    with pytest.raises(ValueError, match="share t"):
        merge.learn(stacked(3), jnp.ones(()), **options())


@pytest.mark.parametrize("at_once", [None, 1, 3])
def test_score_is_a_loop(at_once):
    weights, target, base = normal(7, 3), model(seed=9), model(seed=50)
    both = lambda p, y: {"square": square(p, y), "first": p["a"][0]}
    got = merge.score(
        stacked(3),
        target,
        method=merge.ties,
        loss=both,
        coefficients={"weights": weights},
        base=base,
        at_once=at_once,
    )
    around = merge.on_base(merge.ties)
    loop = [both(around(stacked(3), base, weights=w), target) for w in weights]
    close(got, tree.stack(loop), 1e-5)


# --- search ------------------------------------------------------------------------


def hunt(**more):
    given = {"method": merge.task_arithmetic, "loss": square, "key": KEY}
    start = {"coefficients": {"weights": jnp.zeros(3)}}
    return merge.search(stacked(3), TARGET, **(given | start | more))


TRUE = jnp.array([0.6, -0.3, 0.1])
TARGET = merge.task_arithmetic(stacked(3), weights=TRUE)


def test_search_finds_the_optimum_and_the_key_decides():
    got = hunt(generations=60)
    np.testing.assert_allclose(got.coefficients["weights"], TRUE, atol=1e-3)
    close(got.params, merge.task_arithmetic(stacked(3), **got.coefficients))
    np.testing.assert_allclose(square(got.params, TARGET), got.losses.min(), rtol=1e-3)
    close(hunt(generations=60), got, 0)
    other = hunt(generations=60, key=jax.random.key(4))
    assert not np.array_equal(other.losses[:5], got.losses[:5])


def test_search_needs_no_gradient_and_survives_nan():
    """Steps of a hundredth, and nothing at all on a half of the space."""

    def steps(params, target):
        value = jnp.floor(100 * square(params, target))
        return jnp.where(params["a"][0, 0] > 0.5, jnp.nan, value)

    start = hunt(generations=1, loss=steps).losses[0]
    got = hunt(generations=40, loss=steps)
    assert np.isfinite(got.losses).all()
    assert float(got.losses.min()) < 0.05 * float(start)


def test_search_of_nothing_but_nan_returns_the_start():
    got = hunt(generations=3, loss=lambda p, y: jnp.full((), jnp.nan))
    close(got.coefficients["weights"], jnp.zeros(3), 0)
    assert np.isinf(got.losses).all()


def test_search_takes_any_strategy_of_the_library():
    import cmaes

    sep = ft.partial(cmaes.SepCMA, sigma=0.2, population_size=16)
    got = hunt(generations=60, strategy=sep, base=model(seed=50))
    want = merge.on_base(merge.task_arithmetic)(
        stacked(3), model(seed=50), **got.coefficients
    )
    close(got.params, want)
    assert got.losses[-1] < got.losses[0]


def test_search_refuses_one_coefficient():
    with pytest.raises(ValueError, match="at least 2 coefficients"):
        hunt(coefficients={"scale": 1.0})


# --- coefficients by block ----------------------------------------------------------

LAYERS = {"x": {"w": jnp.ones((2, 3, 4)), "b": jnp.ones((2, 4))}, "s": jnp.ones(2)}


def test_coefficients_have_the_shapes_of_their_blocks():
    make = lambda per: each(jnp.shape, merge.coefficients(LAYERS, per=per, fill=0.5))
    assert merge.coefficients(LAYERS, fill=0.5).tolist() == [0.5, 0.5]
    assert make("leaf") == {"x": {"w": (2,), "b": (2,)}, "s": (2,)}
    assert make("column") == {"x": {"w": (2, 1, 4), "b": (2, 4)}, "s": (2,)}
    assert make("layer") == {"x": (2,), "": (2,)}
    assert make(lambda path: path[-1]) == {"w": (2,), "b": (2,), "s": (2,)}
    with pytest.raises(ValueError, match="per must be"):
        make("row")


def test_by_leaf_shares_within_a_group():
    groups = {"x": jnp.array([1.0, 2.0]), "": jnp.array([3.0, 4.0])}
    got = merge.by_leaf(groups, LAYERS, per="layer")
    want = {"x": {"w": groups["x"], "b": groups["x"]}, "s": groups[""]}
    close(got, want, 0)
    shared = merge.by_leaf(groups["x"], LAYERS)
    close(shared, each(lambda _: groups["x"], LAYERS), 0)
    with pytest.raises(ValueError, match="no coefficient for the group 'x'"):
        merge.by_leaf({"": groups[""]}, LAYERS, per="layer")


def test_anisotropic_scales_blocks():
    x = {"w": normal(2, 3, 4)}
    for shape in [(), (2,), (2, 1, 1), (1, 3, 1), (2, 1, 4), (2, 3, 4)]:
        s = normal(*shape, seed=1)
        aligned = s.reshape(2, 1, 1) if shape == (2,) else s
        want = np.asarray(aligned) * np.asarray(x["w"])
        close(merge.anisotropic(x, scale={"w": s})["w"], want, 0)
    for shape in [(3,), (2, 4), (2, 3, 1, 1), (2, 2, 4)]:
        with pytest.raises(ValueError, match="scale of 'w' has shape"):
            merge.anisotropic(x, scale={"w": jnp.ones(shape)})


def test_random_parts_are_uniform_and_follow_the_path():
    big = {"w": jnp.zeros((100, 300))}
    parts = merge.random_parts(big, parts=10, key=KEY)["w"]
    counts = np.bincount(np.ravel(parts), minlength=10)
    assert counts.size == 10
    np.testing.assert_allclose(counts, 3000, atol=5 * np.sqrt(3000 * 0.9))
    more = merge.random_parts({"a": jnp.zeros(3), **big}, parts=10, key=KEY)
    np.testing.assert_array_equal(more["w"], parts)
    with pytest.raises(ValueError, match="at least 1"):
        merge.random_parts(big, parts=0, key=KEY)
