"""PLeaS: both ends of its sizes, its least squares, and what it refuses."""

import functools as ft
import itertools as it

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import align, rewrite, tree
from jaxlab.rewrite import Symmetries

KEY = jax.random.key(0)
each = jax.tree.map


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64) / 2


def mlp_params(seed, sizes=(3, 6, 5, 2)):
    return {
        f"layer{i}": {"w": normal(10 * seed + i, n, m), "b": normal(10 * seed - i, m)}
        for i, (n, m) in enumerate(it.pairwise(sizes))
    }


def mlp(params, x):
    for name in params:
        x = x if name == "layer0" else jnp.tanh(x)
        x = x @ params[name]["w"] + params[name]["b"][None]
    return x


def setting(size_b=2):
    """Two models, their groups, matched permutations, and batches."""
    a, b = mlp_params(1), mlp_params(2, (3, 6, 5, size_b))
    x = normal(7, 40, 3)
    groups = rewrite.symmetries(mlp, a, x)
    same_head = {**b, "layer2": a["layer2"]}
    found = align.weight_matching(a, same_head, groups, key=KEY)
    return a, b, groups, found, [x[:20], x[20:]]


def features(params, x):
    """The hidden activations of each layer."""
    names = list(params)
    return [jnp.tanh(mlp({n: params[n] for n in names[: i + 1]}, x)) for i in range(2)]


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fit", [False, True])
def test_at_twice_the_size_every_feature_of_both_is_there(fit):
    a, b, groups, found, batches = setting()
    merged = align.pleas(mlp, a, b, groups, found, batches, size=2.0, fit=fit)
    x, moved = normal(9, 6, 3), rewrite.permute(b, groups, found)
    close(mlp(merged.params, x), (mlp(a, x) + mlp(b, x)) / 2)
    both = zip(*(features(p, x) for p in (merged.params, a, moved)), strict=True)
    for wide, ours, theirs in both:
        close(wide, jnp.concatenate([ours, theirs], -1))


def test_heads_of_different_labels_stand_side_by_side():
    a, b, groups, found, batches = setting(size_b=4)
    merge = ft.partial(align.pleas, mlp, a, b, groups, found, batches)
    x = normal(9, 6, 3)
    want = jnp.concatenate([mlp(a, x), mlp(b, x)], -1)
    heads = tree.glob("layer2/*")
    close(mlp(merge(size=2.0, heads=heads).params, x), want)
    merged = merge(size=1.5, heads=heads, ridge=1e-12)
    m, s = (u[groups.groups[1].name] for u in (merged.merged, merged.apart))
    x, moved = jnp.concatenate(batches), rewrite.permute(b, groups, found)
    za, zb = features(a, x)[1], features(moved, x)[1]
    shared, w = (za + zb)[:, m] / 2, merged.params["layer2"]["w"]
    k = m.size
    for z, labels, rows in (
        (za[:, s], slice(0, 2), slice(k, k + s.size)),
        (zb[:, s], slice(2, 6), slice(k + s.size, None)),
    ):
        own = mlp(a if labels.start == 0 else b, x)
        own -= (a if labels.start == 0 else b)["layer2"]["b"][None]
        want = np.linalg.lstsq(np.concatenate([shared, z], -1), own, rcond=None)[0]
        close(jnp.concatenate([w[:k, labels], w[rows, labels]]), want, 1e-6)


def test_at_the_size_of_one_it_is_the_mean_of_matched_weights_and_a_fit():
    a, b, groups, found, batches = setting()
    moved, x = rewrite.permute(b, groups, found), jnp.concatenate(batches)
    plain = align.pleas(mlp, a, b, groups, found, batches, size=1.0, fit=False)
    mean = each(lambda p, q: (p + q) / 2, a, moved)
    for got, want in zip(*map(jax.tree.leaves, (plain.params, mean)), strict=True):
        close(got, want)
    fitted = align.pleas(mlp, a, b, groups, found, batches, size=1.0, ridge=1e-12)
    ins = [(x, x), *zip(features(a, x), features(moved, x), strict=True)]
    for name, (za, zb) in zip(a, ins, strict=True):
        target = (za @ a[name]["w"] + zb @ moved[name]["w"]) / 2
        want = np.linalg.lstsq((za + zb) / 2, target, rcond=None)[0]
        close(fitted.params[name]["w"], want, 1e-6)
        close(fitted.params[name]["b"], mean[name]["b"])


def test_between_the_sizes_every_output_is_fitted_to_what_it_may_read():
    a, b, groups, found, batches = setting()
    shares = {groups.groups[0].name: 0.5, groups.groups[1].name: 0.4}
    merged = align.pleas(mlp, a, b, groups, found, batches, size=shares, ridge=1e-12)
    assert merged.params["layer1"]["w"].shape == (9, 7)
    moved, x = rewrite.permute(b, groups, found), jnp.concatenate(batches)
    (m, s), (p, q) = (
        (merged.merged[g.name], merged.apart[g.name]) for g in groups.groups
    )
    za, zb = features(a, x)[0], features(moved, x)[0]
    shared, ours, theirs = (za + zb)[:, m] / 2, za[:, s], zb[:, s]
    ya, yb = za @ a["layer1"]["w"], zb @ moved["layer1"]["w"]
    fit = lambda z, y: np.linalg.lstsq(np.concatenate(z, -1), y, rcond=None)[0]
    w = np.asarray(merged.params["layer1"]["w"])
    close(w[:, :3], fit([shared, ours, theirs], (ya + yb)[:, p] / 2), 1e-6)
    close(w[:6, 3:5], fit([shared, ours], ya[:, q]), 1e-6)
    close(w[[0, 1, 2, 6, 7, 8], 5:], fit([shared, theirs], yb[:, q]), 1e-6)
    assert not w[6:, 3:5].any()
    assert not w[3:6, 5:].any()


def test_the_closest_units_are_merged():
    a, _, groups, _, batches = setting()
    unlike = np.array([1, 4])
    b = {**a, "layer0": each(lambda v: v.at[..., unlike].add(1.0), a["layer0"])}
    share = {groups.groups[0].name: 1 / 3}
    merged = align.pleas(mlp, a, b, groups, {}, batches, size=share)
    name = groups.groups[0].name
    np.testing.assert_array_equal(merged.apart[name], unlike)
    np.testing.assert_array_equal(merged.merged[name], [0, 2, 3, 5])
    x = batches[0]
    hidden, kept = features(merged.params, x)[0], [0, 2, 3, 5]
    close(hidden[:, :4], features(a, x)[0][:, kept])
    close(hidden[:, 4:6], features(a, x)[0][:, unlike])
    close(hidden[:, 6:], features(b, x)[0][:, unlike])


def test_size_counts_weights():
    """Hidden to hidden: (1 + r)^2 blocks less the two that are zero."""
    sizes = (3, 100, 100, 2)
    a, b = mlp_params(1, sizes), mlp_params(2, sizes)
    x = normal(1, 4, 3)
    groups = rewrite.symmetries(mlp, a, x)
    wide = align.pleas(mlp, a, b, groups, {}, [x], size=1.5, fit=False).params
    share = np.count_nonzero(wide["layer1"]["w"]) / 1e4
    np.testing.assert_allclose(share, 1.5, atol=0.01)


def convolutional(p, x):
    conv = ft.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    row = lambda v: v[None, None, None]
    x = jax.nn.relu(conv(x, p["a"]) * row(p["scale"]) + row(p["bias"]))
    x = x + jax.nn.relu(conv(x, p["b"]))
    return x.mean((1, 2)) @ p["head"]


def test_a_residual_convolutional_net_doubles():
    shapes = {"a": (3, 3, 2, 4), "b": (3, 3, 4, 4), "head": (4, 3)}
    shapes |= {"scale": (4,), "bias": (4,)}
    a, b = (
        {n: normal(10 * s + i, *v) for i, (n, v) in enumerate(shapes.items())}
        for s in (1, 2)
    )
    x = normal(5, 2, 5, 5, 2)
    groups = rewrite.symmetries(convolutional, a, x)
    merged = align.pleas(convolutional, a, b, groups, {}, [x], size=2.0).params
    want = (convolutional(a, x) + convolutional(b, x)) / 2
    close(convolutional(merged, x), want)


def attention(p, x):
    q, k, v = (jnp.einsum("str,rhd->sthd", x, p[n]) for n in "qkv")
    a = jax.nn.softmax(jnp.einsum("sthd,suhd->shtu", q, k))
    return jnp.einsum("shtu,suhd,hdr->str", a, v, p["o"])


def test_whole_heads_are_kept_apart():
    shapes = {"q": (4, 2, 3), "k": (4, 2, 3), "v": (4, 2, 3), "o": (2, 3, 4)}
    a, b = (
        {n: normal(10 * s + i, *v) for i, (n, v) in enumerate(shapes.items())}
        for s in (1, 2)
    )
    x = normal(5, 2, 5, 4)
    groups = rewrite.symmetries(attention, a, x)
    found = align.weight_matching(a, b, groups, key=KEY)
    merged = align.pleas(attention, a, b, groups, found, [x], size=2.0)
    assert merged.params["q"].shape == (4, 4, 3)
    want = (attention(a, x) + attention(b, x)) / 2
    close(attention(merged.params, x), want)


def test_singular_inputs_leave_what_they_do_not_say():
    a, b, groups, found, _ = setting()
    x = normal(1, 2, 3)  # two rows
    for ridge in (0.0, 1e-6):
        fitted = align.pleas(mlp, a, b, groups, found, [x], ridge=ridge).params
        moved = rewrite.permute(b, groups, found)
        za, zb = features(a, x)[0], features(moved, x)[0]
        target = (za @ a["layer1"]["w"] + zb @ moved["layer1"]["w"]) / 2
        close((za + zb) / 2 @ fitted["layer1"]["w"], target, 1e-4)
    zero = align.pleas(mlp, a, b, groups, found, [jnp.zeros((4, 3))]).params
    close(zero["layer0"]["w"], (a["layer0"]["w"] + moved["layer0"]["w"]) / 2)


def test_bad_input_is_refused_by_name():
    a, b, groups, found, batches = setting()
    merge = ft.partial(align.pleas, mlp, a, b, groups, found)
    with pytest.raises(ValueError, match="size must be from 1 to 2"):
        merge(batches, size=2.5)
    with pytest.raises(ValueError, match="names no group: 'other'"):
        merge(batches, size={"other": 0.5})
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        merge(batches, size={groups.groups[0].name: 2.0})
    with pytest.raises(ValueError, match="batches is empty"):
        merge([])
    with pytest.raises(ValueError, match="needs one axis of labels"):
        merge(batches, heads=tree.glob("layer1/*"))
    with pytest.raises(ValueError, match="selects no leaf"):
        merge(batches, heads=tree.glob("nothing"))
    more = {**b, "layer3": b["layer2"]}
    with pytest.raises(ValueError, match="extra leaf 'layer3/b'"):
        align.pleas(mlp, a, more, groups, found, batches)


def test_a_program_of_one_width_is_refused_by_group():
    fixed = lambda p, x: mlp(p, x) + (x @ p["layer0"]["w"]).reshape(-1, 6)[:, :2]
    a, b, _, _, batches = setting()
    groups = rewrite.symmetries(mlp, a, *batches[:1])
    name = groups.groups[0].name
    with pytest.raises(ValueError, match=f"another width of group '{name}'"):
        align.pleas(fixed, a, b, groups, {}, batches, size=1.5)


def test_a_weight_that_reads_and_makes_a_group_cannot_be_kept_apart():
    tied = lambda p, x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["w"].T
    a, b = ({"w": normal(s, 3, 4), "v": normal(s + 9, 4, 4)} for s in (1, 2))
    x = normal(5, 6, 3)
    found = rewrite.symmetries(tied, a, x)
    groups = Symmetries(found.groups)
    with pytest.raises(ValueError, match="'w' both reads and makes"):
        align.pleas(tied, a, b, groups, {}, [x], size=1.5)
    one = align.pleas(tied, a, b, groups, {}, [x], fit=False).params
    close(one["w"], (a["w"] + b["w"]) / 2)
