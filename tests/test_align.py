"""Matching: planted permutations, optima by brute force, and the laws of tables."""

import functools as ft
import itertools as it

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rewrite_models
from scipy.optimize import linear_sum_assignment

from jaxlab import align, measure, rewrite, tree
from jaxlab.rewrite import Group, Member, Place, Symmetries

KEY = jax.random.key(0)
each = jax.tree.map


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / 2


def mlp_params(seed, sizes=(3, 6, 5, 2)):
    return [
        {"w": normal(10 * seed + i, n, m), "b": normal(10 * seed + 5 + i, m)}
        for i, (n, m) in enumerate(it.pairwise(sizes))
    ]


def mlp(params, x):
    for i, p in enumerate(params):
        x = x @ p["w"] + p["b"][None]
        x = x if i == len(params) - 1 else jnp.tanh(x)
    return x


def attention(p, x):
    """One layer without rotary positions: the dims of queries and keys permute too."""
    q, k, v = (jnp.einsum("str,rhd->sthd", x, p[n]) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("sthd,suhd->shtu", q, k))
    return jnp.einsum("shtu,suhd,hdr->str", a, v, p["o"])


def attention_params(seed, r=4, h=2, d=3):
    shapes = {"q": (r, h, d), "k": (r, h, d), "v": (r, h, d), "o": (h, d, r)}
    return {n: normal(7 * seed + i, *s) for i, (n, s) in enumerate(shapes.items())}


def own_mlp():
    return mlp, mlp_params(0), (normal(99, 8, 3),)


def own_attention():
    return attention, attention_params(0), (normal(98, 2, 5, 4),)


MODELS = {
    "mlp": own_mlp,
    "attention": own_attention,
    "gru": rewrite_models.gru,
    "resnet": rewrite_models.resnet,
    "transformer": rewrite_models.transformer,
}


@ft.cache
def model(name):
    apply, params, inputs = MODELS[name]()
    return apply, params, inputs, rewrite.symmetries(apply, params, *inputs)


def planted(name, seed, noise=0.0):
    """A model with permuted units, and the permutations that undo it."""
    _, params, _, groups = model(name)
    tables = rewrite.random_permutations(groups, key=jax.random.key(seed))
    keys = tree.keys_like(jax.random.key(seed + 1), params)
    noisy = each(lambda x, k: x + noise * jax.random.normal(k, x.shape), params, keys)
    return rewrite.permute(noisy, groups, tables), align.inverse(groups, tables)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def inner(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(x, y) for x, y in leaves)


@pytest.mark.parametrize("name", ["mlp", "gru", "resnet", "transformer"])
def test_weight_matching_recovers_what_was_planted(name):
    _, params, _, groups = model(name)
    moved, want = planted(name, 3, noise=0.01)
    found = align.weight_matching(params, moved, groups, key=KEY)
    assert found.keys() == want.keys()
    for group, table in found.items():
        np.testing.assert_array_equal(table, want[group], group)


def test_aligning_leaves_the_function_as_it_is():
    """In float64, for two models that have nothing to do with each other."""
    apply, params, inputs, groups = model("attention")
    with jax.enable_x64(True):
        double = each(lambda x: jnp.asarray(x, jnp.float64), params)
        inputs = each(lambda x: jnp.asarray(x, jnp.float64), inputs)
        other = each(lambda x: x[::-1] * 1.1, double)
        found = align.weight_matching(double, other, groups, key=KEY)
        moved = rewrite.permute(other, groups, found)
        got, want = jax.jit(apply)(moved, *inputs), jax.jit(apply)(other, *inputs)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
        assert inner(double, moved) > inner(double, other)


@pytest.mark.parametrize("name", ["mlp", "attention", "gru"])
def test_the_inner_product_never_falls(name):
    _, params, _, groups = model(name)
    other = each(lambda x: jnp.roll(x, 1, -1) + normal(5, *x.shape), params)
    scores = [inner(params, other)]
    for sweeps in (1, 2, 3, 100):
        found = align.weight_matching(params, other, groups, key=KEY, iterations=sweeps)
        scores.append(inner(params, rewrite.permute(other, groups, found)))
    assert all(b >= a - 1e-4 for a, b in it.pairwise(scores)), scores
    assert scores[-1] > scores[0] + 0.1
    again = align.weight_matching(params, other, groups, key=KEY, start=found)
    assert same(again, found), "a fixed point"


def test_one_hidden_layer_is_matched_as_well_as_can_be():
    sizes = (3, 5, 2)
    a, b = mlp_params(1, sizes), mlp_params(2, sizes)
    groups = rewrite.symmetries(mlp, a, normal(0, 4, 3))
    (name,) = [g.name for g in groups.groups]
    score = lambda p: inner(a, rewrite.permute(b, groups, {name: jnp.array(p)}))
    best = max(it.permutations(range(5)), key=score)
    found = align.weight_matching(a, b, groups, key=KEY)
    np.testing.assert_array_equal(found[name], best)


def test_heads_are_paired_by_their_best_match_inside():
    """All ways to pair two heads, and three dims in each, one by one."""
    a, b = (each(np.asarray, attention_params(s)) for s in (1, 2))
    groups = model("attention")[3]
    orders = list(map(list, it.permutations(range(3))))

    def dims(i, j, out, ins):
        """The best order of head j's dims for head i."""
        score = lambda p: (
            sum((a[n][:, i] * b[n][:, j][:, p]).sum() for n in out)
            + sum((a[n][i] * b[n][j][p]).sum() for n in ins)
        )
        return max(map(score, orders))

    pair = lambda i, j: dims(i, j, "qk", "") + dims(i, j, "v", "o")
    best = max(pair(0, 0) + pair(1, 1), pair(0, 1) + pair(1, 0))
    found = align.weight_matching(a, b, groups, key=KEY)
    got = inner(a, rewrite.permute(b, groups, found))
    np.testing.assert_allclose(got, best, rtol=1e-5)


def test_only_selected_leaves_count_and_all_are_permuted():
    a, moved = mlp_params(0), planted("mlp", 4)[0]
    spoilt = [{**moved[0], "b": 1e3 * moved[0]["b"][::-1]}, *moved[1:]]
    groups = model("mlp")[3]
    kernels = tree.glob("**/w")
    found = align.weight_matching(a, spoilt, groups, key=KEY, where=kernels)
    got = rewrite.permute(spoilt, groups, found)
    assert same([p["w"] for p in got], [p["w"] for p in a])
    with pytest.raises(ValueError, match="no floating-point leaf"):
        align.weight_matching(a, moved, groups, key=KEY, where=tree.glob("none"))


def test_tables_compose_and_invert_as_permuting_does():
    for name in ("attention", "transformer"):
        _, params, _, groups = model(name)
        one, two = (
            rewrite.random_permutations(groups, key=jax.random.key(s)) for s in (1, 2)
        )
        twice = rewrite.permute(rewrite.permute(params, groups, one), groups, two)
        both = align.compose(groups, one, two)
        assert same(rewrite.permute(params, groups, both), twice)
        back = align.inverse(groups, both)
        assert same(rewrite.permute(twice, groups, back), params)
        for table in align.compose(groups, both, back).values():
            assert (table == np.arange(table.shape[-1])).all()


def test_many_models_come_together_on_the_first():
    _, params, _, groups = model("attention")
    copies = [params] + [planted("attention", s)[0] for s in (1, 2, 3)]
    stacked = tree.stack(copies)
    found = align.match_many(stacked, groups, key=KEY)
    aligned = jax.vmap(lambda m, p: rewrite.permute(m, groups, p))(stacked, found)
    assert all(same(one, params) for one in tree.unstack(aligned))
    alone = align.match_many(tree.stack([params]), groups, key=KEY)
    assert same(alone, each(lambda t: t[None], align.compose(groups, {}, {})))


def test_many_models_by_their_activations():
    apply, params, inputs, groups = model("attention")
    copies = [params] + [planted("attention", s)[0] for s in (1, 2)]
    match = lambda a, b, groups, key: align.activation_matching(
        apply, a, b, groups, [inputs], key=key
    )
    found = align.match_many(tree.stack(copies), groups, key=KEY, match=match)
    for i, one in enumerate(copies):
        back = rewrite.permute(one, groups, {n: t[i] for n, t in found.items()})
        assert same(back, params)


def test_many_unlike_models_get_closer():
    models = tree.stack([mlp_params(s) for s in range(3)])
    groups = model("mlp")[3]
    found = align.match_many(models, groups, key=KEY)
    aligned = jax.vmap(lambda m, p: rewrite.permute(m, groups, p))(models, found)
    spread = lambda m: sum(float(jnp.var(x, 0).sum()) for x in jax.tree.leaves(m))
    assert spread(aligned) < spread(models)
    assert same(tree.unstack(aligned)[0], tree.unstack(models)[0])


@pytest.mark.parametrize("name", ["attention", "resnet"])
def test_activation_matching_finds_what_weight_matching_finds(name):
    apply, params, inputs, groups = model(name)
    moved, _ = planted(name, 6)
    found = align.activation_matching(apply, params, moved, groups, [inputs], key=KEY)
    assert same(rewrite.permute(moved, groups, found), params)


@pytest.mark.parametrize("by", ["product", "covariance", "correlation"])
def test_activations_are_compared_over_all_batches(by):
    a, b = mlp_params(1), mlp_params(2)
    groups = model("mlp")[3]
    batches = [normal(s, n, 3) for s, n in ((1, 9), (2, 9), (3, 9))]
    found = align.activation_matching(mlp, a, b, groups, iter(batches), key=KEY, by=by)
    x = np.concatenate(batches)
    for layer, group in enumerate(groups.groups):
        za, zb = (np.tanh(mlp(p[: layer + 1], x)) for p in (a, b))
        if by != "product":
            za, zb = za - za.mean(0), zb - zb.mean(0)
        if by == "correlation":
            za, zb = za / za.std(0), zb / zb.std(0)
        want = linear_sum_assignment(za.T @ zb, maximize=True)[1]
        np.testing.assert_array_equal(found[group.name], want)


def test_a_unit_that_never_varies_stays_finite():
    a = mlp_params(1)
    a[0]["w"] = a[0]["w"].at[:, 2].set(0.0)
    groups, x = model("mlp")[3], normal(1, 8, 3)
    found = align.activation_matching(mlp, a, a, groups, [x], key=KEY, by="correlation")
    assert same(found, align.compose(groups, {}, {}))


def loss(params, x, y):
    return jnp.mean((mlp(params, x) - y) ** 2)


def test_straight_through_lowers_the_loss_of_the_midpoint():
    sizes, x = (3, 8, 2), normal(1, 32, 3)
    y = jnp.sin(3 * x[:, :2])
    fit = optax.sgd(0.3, 0.9)

    @jax.jit
    def train(p):
        def step(carry, _):
            p, s = carry
            up, s = fit.update(jax.grad(loss)(p, x, y), s)
            return (optax.apply_updates(p, up), s), None

        return jax.lax.scan(step, (p, fit.init(p)), length=400)[0][0]

    a, b = train(mlp_params(1, sizes)), train(mlp_params(2, sizes))
    groups = rewrite.symmetries(mlp, a, x)
    middle = lambda t: float(
        loss(each(lambda p, q: (p + q) / 2, a, rewrite.permute(b, groups, t)), x, y)
    )
    matched = align.weight_matching(a, b, groups, key=KEY)
    learn = ft.partial(align.straight_through_matching, loss, a, b, groups)
    found = learn([(x, y)] * 60, key=KEY, optimiser=optax.sgd(0.3, 0.9))
    assert middle(found) < middle(matched)
    ends = (loss(a, x, y) + loss(b, x, y)) / 2
    assert middle(found) - ends < 0.5 * (middle({}) - ends)
    assert same(learn([], key=KEY), matched), "the projection of A"


def test_straight_through_starts_with_weight_matching():
    a, (b, want) = mlp_params(0), planted("mlp", 2)
    groups, x = model("mlp")[3], normal(1, 4, 3)
    batches = [(x, mlp(a, x))]
    found = align.straight_through_matching(loss, a, b, groups, batches, key=KEY)
    assert same(found, want)


def test_singular_vectors_follow_their_formula():
    a, b = {"w": normal(1, 5, 4), "b": normal(2, 4)}, {"w": normal(3, 5, 4)}
    b["b"] = a["b"]
    threshold, total, counts = 0.4, 0.0, []
    (u, s, v), (p, t, q) = (np.linalg.svd(m["w"], full_matrices=False) for m in (a, b))
    for i, j in it.product(range(4), range(4)):
        if s[i] >= threshold * s[0] and t[j] >= threshold * t[0]:
            total += (u[:, i] @ p[:, j]) * (v[i] @ q[j])
    counts = [(x >= threshold * x[0]).sum() for x in (s, t)]
    got, leaves = align.singular_vectors(a, b, threshold=threshold)
    np.testing.assert_allclose(got, total / max(counts), rtol=1e-4)
    assert leaves.keys() == {"w"}
    assert align.singular_vectors(a, each(jnp.zeros_like, a))[0] == 0


def test_the_report_is_of_before_and_after():
    a, (b, want) = mlp_params(0), planted("mlp", 5)
    groups, x = model("mlp")[3], normal(1, 8, 3)
    here = ft.partial(loss, x=x, y=mlp(a, x))
    report = align.report(here, a, b, groups, want, points=5)
    before = measure.linear_connectivity(here, a, b, points=5).barrier
    np.testing.assert_allclose(report.barrier, (before, 0), atol=1e-6)
    np.testing.assert_allclose(report.distance, (tree.norm(tree.subtract(a, b)), 0))
    assert report.singular_vectors[0] < 0.7
    np.testing.assert_allclose(report.singular_vectors[1], 1, rtol=1e-5)


def test_bad_input_is_refused_by_name():
    a, groups, x = mlp_params(0), model("mlp")[3], normal(1, 4, 3)
    match = ft.partial(align.weight_matching, key=KEY)
    with pytest.raises(ValueError, match="params_b differs at '1/b'"):
        match(a, [a[0], {**a[1], "b": normal(0, 4)}, a[2]], groups)
    wrong = Group("0/w:1", 6, (Member("0/w", Place(0)),))
    with pytest.raises(ValueError, match=r"'0/w:1' of \(6,\) does not fit '0/w'"):
        match(a, a, Symmetries((wrong,)))
    gone = Group("0/w:1", 6, (Member("9/w", Place(0)),))
    with pytest.raises(ValueError, match="no leaf '9/w'"):
        match(a, a, Symmetries((gone,)))
    name = groups.groups[0].name
    with pytest.raises(ValueError, match="needs a permutation of shape"):
        match(a, a, groups, start={name: np.zeros(6, int)})
    with pytest.raises(ValueError, match="no group is named 'other'"):
        align.inverse(groups, {"other": np.arange(6)})
    act = ft.partial(align.activation_matching, mlp, a, a, groups, key=KEY)
    with pytest.raises(ValueError, match="batches is empty"):
        act([])
    with pytest.raises(ValueError, match="by must be one of"):
        act([x], by="cosine")
    with pytest.raises(ValueError, match="no leaf shows the activations"):
        act([x], where=tree.glob("0/b"))
    whole = [{"w": p["w"].astype(jnp.int32), "b": p["b"]} for p in a]
    with pytest.raises(ValueError, match="'0/w' of dtype int32"):
        align.straight_through_matching(loss, whole, whole, groups, [], key=KEY)
    with pytest.raises(ValueError, match="threshold must be in"):
        align.singular_vectors(a, a, threshold=1.0)
