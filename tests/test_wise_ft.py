"""WiSE-FT's path, and what BANG and its data set are made of."""

from cases import close, stacked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge
from jaxlab.data import _mixup, _multicolor

KEY = jax.random.key(3)
each = jax.tree.map


def test_wise_ft_is_a_straight_path_between_the_models():
    pair = stacked(2)
    for i in (0, 1):
        close(merge.wise_ft(pair, alpha=i), each(lambda v, i=i: v[i], pair), 0)
    close(merge.wise_ft(pair), merge.average(pair))
    close(merge.wise_ft(pair, alpha=0.3), merge.linear(pair, weights=[0.7, 0.3]))
    path = jax.vmap(lambda a: merge.wise_ft(pair, alpha=a))(jnp.linspace(0, 1, 5))
    bends = each(lambda v: v[2:] - 2 * v[1:-1] + v[:-2], path)
    close(bends, each(jnp.zeros_like, bends), 1e-6)
    with pytest.raises(ValueError, match="holds 3 models, expected 2"):
        merge.wise_ft(stacked(3))


def test_the_path_is_scored_in_one_program():
    loss = lambda p, y: jnp.sum((p["a"] - y) ** 2)
    alphas = jnp.linspace(0, 1, 11)
    got = merge.score(
        stacked(2),
        0.5,
        method=merge.wise_ft,
        loss=loss,
        coefficients={"alpha": alphas},
    )
    a, b = np.asarray(stacked(2)["a"], np.float64)
    want = [np.sum(((1 - t) * a + t * b - 0.5) ** 2) for t in np.asarray(alphas)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- mixup -------------------------------------------------------------------------


def test_mixup_mixes_inputs_and_targets_alike():
    """Inputs that are their own targets stay so, and sums stay, over many keys.

    The share is Beta: of mean 1/2 and variance 1 / (4 (2 alpha + 1)).
    """
    x = jax.random.normal(KEY, (8, 5))
    one = lambda key: _mixup.mixup(x.reshape(8, 5, 1), x, key=key, alpha=0.5)
    a, b = jax.jit(jax.vmap(one))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(a[..., 0], b, rtol=1e-6, atol=1e-6)
    sums = np.broadcast_to(x.sum(0), (4000, 5))
    np.testing.assert_allclose(b.sum(1), sums, rtol=1e-4, atol=1e-4)
    moved = np.asarray(b[:, 0] - x[:1]) / np.asarray(x[1] - x[0])[None]
    with_1 = moved[np.ptp(moved, axis=1) < 1e-4 * (1 + np.abs(moved[:, 0])), 0]
    share = with_1[(with_1 > 1e-6)]  # the permutation took example 1 to 0
    assert 300 < share.size < 700
    np.testing.assert_allclose(share.mean(), 0.5, atol=0.06)
    np.testing.assert_allclose(share.var(), 1 / 8, atol=0.02)
    with pytest.raises(ValueError, match="above 0"):
        _mixup.mixup(x, x, key=KEY, alpha=0.0)


# --- MultiColorMNIST ---------------------------------------------------------------

LABELS = jnp.arange(2000) % 10
IMAGES = jax.random.uniform(KEY, (2000, 28, 28))


def patches_of(images):
    """The colour index of each of the 32 patches, from the pixels, by ring order."""
    corners = np.asarray(images)[:, ::4, ::4]
    ring = [(i, j) for i in range(9) for j in range(9) if i in (0, 8) or j in (0, 8)]
    rgb = np.stack([corners[:, i, j] for i, j in ring], 1)
    distance = np.abs(rgb[:, :, None] - _multicolor.palette()).sum(-1)
    assert (distance.min(-1) == 0).all()
    return distance.argmin(-1)


@pytest.mark.parametrize("correlation", [0, 0.7, 1.0])
def test_a_patch_tells_the_class_as_often_as_asked(correlation):
    """correlation + (1 - correlation) / 10, patch by patch, and independently."""
    out = _multicolor.multicolor(IMAGES, LABELS, key=KEY, correlation=correlation)
    assert out.shape == (2000, 36, 36, 3)
    told = _multicolor.assignment(32)[:, np.asarray(LABELS)].T
    hits = patches_of(out) == told
    p = correlation + (1 - correlation) / 10
    deviation = np.sqrt(p * (1 - p) / 2000)
    np.testing.assert_allclose(hits.mean(0), p, atol=4.5 * deviation + 1e-9)
    together = np.mean(hits[:, 0] & hits[:, 1])
    np.testing.assert_allclose(together, p * p, atol=0.05 * (p < 1))


def test_the_image_is_in_the_middle_and_the_frame_is_whole():
    out = _multicolor.multicolor(IMAGES, LABELS, key=KEY, correlation=0.5)
    for channel in range(3):
        np.testing.assert_array_equal(out[:, 4:32, 4:32, channel], IMAGES)
    tile = out[:, :4, 8:12]
    np.testing.assert_array_equal(tile, jnp.broadcast_to(tile[:, :1, :1], tile.shape))


def test_colours_do_not_depend_on_the_key_but_draws_do():
    """So that a training set and a shifted test set speak of the same colours."""
    make = lambda seed, **more: _multicolor.multicolor(
        IMAGES, LABELS, key=jax.random.key(seed), **more
    )
    close(make(0, correlation=1.0), make(1, correlation=1.0), 0)
    half = make(0, correlation=0.5), make(1, correlation=0.5)
    assert not np.array_equal(*half)
    rows = _multicolor.assignment(40)
    np.testing.assert_array_equal(rows[:32], _multicolor.assignment(32))
    assert (np.sort(rows, axis=1) == np.arange(10)).all()
    assert len({tuple(c) for c in _multicolor.palette()}) == 10


def test_multicolor_takes_other_sizes_and_refuses_bad_ones():
    make = lambda images, **more: _multicolor.multicolor(
        images, LABELS[: len(images)], key=KEY, **({"correlation": 0.5} | more)
    )
    assert jax.eval_shape(lambda: make(IMAGES[:2], patches=33)).shape == (2, 44, 44, 3)
    few = make(IMAGES[:2, :8, :12], patches=3)
    assert few.shape == (2, 16, 20, 3)
    assert few[:, 12:].sum() == 0
    for bad, message in (
        ({"correlation": 1.5}, "correlation must be"),
        ({"patches": 0}, "patches at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make(IMAGES[:2], **bad)
    with pytest.raises(ValueError, match="do not divide"):
        make(IMAGES[:2, :27])
