"""Iterative feature merging: what is a duplicate, and what is left without it."""

import itertools as it

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import align, rewrite


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) / 2


def mlp(p, x):
    h = jnp.tanh(x @ p["u"] + p["b"][None])
    return jax.nn.gelu(h @ p["v"]) @ p["w"]


def mlp_params(hidden=5):
    shapes = {"u": (3, hidden), "b": (hidden,), "v": (hidden, 4), "w": (4, 2)}
    return {n: normal(i, *s) for i, (n, s) in enumerate(shapes.items())}


COPIES = np.array([0, 1, 1, 2, 3, 3, 3, 4])


def duplicated():
    """The model with some hidden units two and three times, outgoing weights shared."""
    p = mlp_params()
    share = 1.0 / np.bincount(COPIES)[COPIES]
    v = p["v"][COPIES] * share[:, None]
    return p, {**p, "u": p["u"][:, COPIES], "b": p["b"][COPIES], "v": v}


def merge(apply, params, x, **options):
    groups = rewrite.symmetries(apply, params, x)
    uses = rewrite.uses(apply, params, x)
    return groups, align.merge_features(params, groups, uses, **options)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.0, 1e-6])
def test_exact_duplicates_and_only_they_are_removed(threshold):
    plain, params = duplicated()
    x = normal(9, 6, 3)
    groups, found = merge(mlp, params, x, threshold=threshold)
    names = {g.size: g.name for g in groups.groups}
    assert found.complexity == {names[8]: 5, names[4]: 4}
    np.testing.assert_array_equal(found.clusters[names[8]], COPIES)
    np.testing.assert_array_equal(found.clusters[names[4]], np.arange(4))
    close(mlp(found.params, x), mlp(params, x))
    for name in plain:
        close(found.params[name], plain[name])


def test_a_model_without_duplicates_stays():
    params, x = mlp_params(), normal(9, 6, 3)
    _, found = merge(mlp, params, x, threshold=0.0)
    assert all(np.array_equal(found.params[n], params[n]) for n in params)


def test_a_merged_unit_has_the_mean_of_what_comes_in_and_the_sum_of_what_goes_out():
    params, x = mlp_params(), normal(9, 6, 3)
    groups = rewrite.symmetries(mlp, params, x)
    name = next(g.name for g in groups.groups if g.size == 5)
    _, found = merge(mlp, params, x, sizes={name: 2})
    assert found.complexity[name] == 2
    for c in range(2):
        mine = found.clusters[name] == c
        close(found.params["u"][:, c], params["u"][:, mine].mean(1))
        close(found.params["b"][c], params["b"][mine].mean())
        close(found.params["v"][c], params["v"][mine].sum(0))
    assert found.params["w"].shape == (4, 2)


def by_hand(vectors, threshold):
    """Centroids merged two at a time, with every distance taken anew."""
    clusters = [[i] for i in range(len(vectors))]
    while len(clusters) > 1:
        mean = np.array([vectors[c].mean(0) for c in clusters])
        far = ((mean[:, None] - mean[None]) ** 2).sum(-1)
        i, j = min(it.combinations(range(len(clusters)), 2), key=lambda p: far[p])
        if far[i, j] > threshold * far.max():
            break
        clusters[i] += clusters.pop(j)
    return {frozenset(c) for c in clusters}


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6])
def test_pairs_are_merged_as_by_hand(threshold):
    x, params = normal(9, 6, 3), mlp_params(hidden=12)
    groups, found = merge(mlp, params, x, threshold=threshold)
    first = groups.groups[0]
    assert first.size == 12, "the group that is merged first sees all weights"
    vectors = np.concatenate([params["u"].T, params["v"]], 1)
    label = found.clusters[first.name]
    got = {frozenset(np.flatnonzero(label == c).tolist()) for c in set(label.tolist())}
    assert got == by_hand(vectors, threshold)


def test_more_is_merged_as_the_threshold_grows():
    x, params = normal(9, 6, 3), mlp_params(hidden=12)
    counts = [
        merge(mlp, params, x, threshold=t)[1].complexity
        for t in (0.0, 0.1, 0.3, 0.6, 1.0)
    ]
    for name in counts[0]:
        sizes = [c[name] for c in counts]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == 1


def convolutional(p, x):
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    row = lambda v: v[None, None, None]
    x = conv(x, p["a"])
    x = (x - row(p["mean"])) * jax.lax.rsqrt(row(p["var"]) + 1e-5) * row(p["scale"])
    return conv(jax.nn.relu(x), p["b"]).mean((1, 2))


def test_channels_before_a_batch_norm():
    p = {"a": normal(1, 3, 3, 2, 3), "b": normal(2, 3, 3, 3, 2)}
    p |= {n: jnp.abs(normal(i, 3)) for i, n in enumerate(("mean", "var", "scale"), 3)}
    twice = np.array([0, 0, 1, 2])
    wide = {n: v[..., twice] for n, v in p.items()}
    half = jnp.asarray([0.5, 0.5, 1.0, 1.0])
    wide["b"] = p["b"][:, :, twice] * half[None, None, :, None]
    x = normal(8, 2, 4, 4, 2)
    _, found = merge(convolutional, wide, x, threshold=0.0)
    close(convolutional(found.params, x), convolutional(wide, x))
    for name in p:
        close(found.params[name], p[name])


def experts(p, x):
    """Each expert has its own units: as many are left of each."""
    h = jnp.tanh(jnp.einsum("td,edf->etf", x, p["up"]))
    y = jnp.einsum("etf,efd->etd", h, p["down"])
    return jnp.einsum("etd,e->td", y, p["gate"])


def test_units_per_expert_leave_equal_sizes():
    p = {"up": normal(1, 2, 3, 5), "down": normal(2, 2, 5, 3), "gate": jnp.ones(2)}
    p["gate"] = p["gate"].at[1].set(2.0)
    pairs = {0: [(0, 1), (2, 3)], 1: [(1, 4)]}
    for e, same in pairs.items():
        for i, j in same:
            p["up"] = p["up"].at[e, :, j].set(p["up"][e, :, i])
            p["down"] = p["down"].at[e, j].set(p["down"][e, i])
    x = normal(3, 4, 3)
    groups, found = merge(experts, p, x, threshold=0.0)
    (name,) = [g.name for g in groups.groups if g.size == 5]
    assert found.complexity[name] == 4, "one pair of each"
    assert found.params["up"].shape == (2, 3, 4)
    close(experts(found.params, x), experts(p, x))
    scaled = lambda p, x: experts({**p, "down": p["down"] * 2.0}, x)
    assert merge(scaled, p, x, threshold=0.0)[1].complexity[name] == 5


def test_a_weight_per_channel_is_neither_read_nor_summed():
    """Depthwise: a merged channel keeps its own filter."""
    conv = lambda x, w, groups: jax.lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )

    def apply(p, x):
        x = jax.nn.relu(conv(x, p["a"], 1))
        x = jax.nn.relu(conv(x, p["deep"], p["deep"].shape[-1]))
        return conv(x, p["b"], 1).mean((1, 2))

    p = {"a": normal(1, 1, 1, 2, 3), "deep": normal(2, 3, 3, 1, 3)}
    p["b"] = normal(3, 1, 1, 3, 2)
    twice, half = np.array([0, 0, 1, 2]), jnp.array([0.5, 0.5, 1.0, 1.0])
    wide = {n: p[n][..., twice] for n in ("a", "deep")}
    wide["b"] = p["b"][:, :, twice] * half[None, None, :, None]
    x = normal(8, 2, 4, 4, 2)
    _, found = merge(apply, wide, x, threshold=0.0)
    assert found.params["deep"].shape == (3, 3, 1, 3)
    close(apply(found.params, x), apply(wide, x))


def test_bad_input_is_refused_by_name():
    params, x = mlp_params(), normal(9, 6, 3)
    name = rewrite.symmetries(mlp, params, x).groups[0].name
    with pytest.raises(ValueError, match="threshold must be from 0 to 1"):
        merge(mlp, params, x, threshold=2.0)
    with pytest.raises(ValueError, match="sizes names no group: 'other'"):
        merge(mlp, params, x, sizes={"other": 1})
    with pytest.raises(ValueError, match="cannot leave 0"):
        merge(mlp, params, x, sizes={name: 0})
    scores = lambda p, x: ((x @ p["q"]) * (x @ p["k"])).sum(-1)
    pair = {"q": normal(1, 3, 4), "k": normal(2, 3, 4)}
    (only,) = rewrite.symmetries(scores, pair, x).groups
    with pytest.raises(ValueError, match="no weight reads the units"):
        merge(scores, pair, x, sizes={only.name: 2})
    assert merge(scores, pair, x, threshold=1.0)[1].complexity == {only.name: 4}
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    both = {"w": normal(1, 3, 4)}
    (group,) = rewrite.symmetries(tied, both, x).groups
    with pytest.raises(ValueError, match="a weight both reads and makes, or may,"):
        merge(tied, both, x, sizes={group.name: 2})
