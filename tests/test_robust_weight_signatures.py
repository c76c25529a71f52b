"""Signatures: what they hold, and that they come off to the bit."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge, tree

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHALLOW = tree.glob("conv_0/*", "conv_1/*")


def model(seed, dtype="float32", classes=10):
    keys = iter(jax.random.split(jax.random.key(seed), 5))
    leaf = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)
    return {
        "conv_0": {"kernel": leaf(3, 3, 2, 4), "bias": leaf(4)},
        "conv_1": {"kernel": leaf(3, 3, 4, 5), "bias": leaf(5)},
        "head": leaf(5, classes),
    }


def signed(k=2, where=SHALLOW):
    """k signatures, and the standard task vector they were made with."""
    deltas = tree.stack([model(i) for i in range(1, k + 1)])
    return jit(ft.partial(merge.rws, where=where))(deltas, model(0)), model(0)


def bits(params):
    words = lambda x: np.asarray(x).view(f"u{x.dtype.itemsize}")
    return jax.tree.map(words, params)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, bits(a), bits(b))


def test_a_signature_is_what_is_orthogonal_to_the_standard_model():
    found, standard = signed()
    assert found["head"] is None
    for part in ("conv_0", "conv_1"):
        for name, base in standard[part].items():
            for i, r in enumerate(found[part][name]):
                delta = model(i + 1)[part][name]
                assert abs(float(jnp.sum(r * base))) < 1e-4
                rest = np.asarray(delta - r)  # is a multiple of the standard one
                ratio = np.asarray(rest / base)
                np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3, atol=1e-5)
                assert jnp.linalg.norm(r) <= jnp.linalg.norm(delta) * (1 + 1e-6)


def test_degenerate_signatures():
    deltas, zero = tree.stack([model(1)]), jax.tree.map(jnp.zeros_like, model(0))
    same(merge.rws(deltas, zero), deltas)
    found = merge.rws(tree.stack([model(0)]), model(0))
    assert all(np.abs(x).max() < 1e-6 for x in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="selects no leaf"):
        merge.rws(deltas, zero, where=tree.glob("nowhere"))
    with pytest.raises(ValueError, match="standard differs at 'head'"):
        merge.rws(deltas, model(0, classes=3))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_patch_comes_off_to_the_bit(dtype, compiled):
    """At any strength, also where the sum has lost every bit of the model."""
    clean, (signatures, _) = model(7, dtype), signed(3)
    wrap = jit if compiled else lambda f: f
    patch, unpatch = wrap(merge.rws_patch), wrap(merge.rws_unpatch)
    for scale in (0.0, 0.7, 1e4, np.array([1e-3, -2.0, 1e4])):
        patched = patch(clean, signatures, scale=jnp.asarray(scale, jnp.float32))
        same(unpatch(patched), clean)
        same(patched.params["head"], clean["head"])
        assert patched.undo["head"] is None
    lost = patched.params["conv_0"]["kernel"] - clean["conv_0"]["kernel"]
    assert jnp.abs(lost).max() > 1000
    naive = patched.params["conv_0"]["kernel"] - lost
    assert (naive != clean["conv_0"]["kernel"]).any()


def test_special_values_come_back():
    odd = {"w": jnp.array([np.nan, np.inf, -0.0, 1e-45, 3.4e38])}
    patched = merge.rws_patch(odd, {"w": jnp.full((1, 5), 3e38)})
    same(merge.rws_unpatch(patched), odd)


def test_several_at_once_and_one_after_another_come_off_in_any_order():
    clean, (signatures, _) = model(7), signed(2)
    one, two = (jax.tree.map(lambda x, i=i: x[i : i + 1], signatures) for i in range(2))
    at_once = merge.rws_patch(clean, signatures)
    first = merge.rws_patch(clean, one)
    second = merge.rws_patch(first.params, two)
    close = ft.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, second.params, at_once.params)
    for undos in ((first.undo, second.undo), (second.undo, first.undo)):
        params = second.params
        for undo in undos:
            params = merge.rws_unpatch(
                merge.rws_patch(params, one)._replace(params=params, undo=undo)
            )
        same(params, clean)


def test_a_patch_is_the_weighted_sum_and_can_be_rescaled():
    clean, (signatures, _) = model(7), signed(2)
    patched = merge.rws_patch(clean, signatures, scale=[0.5, -2.0])
    r, w = signatures["conv_1"]["kernel"], clean["conv_1"]["kernel"]
    got = patched.params["conv_1"]["kernel"]
    np.testing.assert_allclose(got, w + 0.5 * r[0] - 2 * r[1], rtol=1e-5, atol=1e-5)
    again = merge.rws_patch(merge.rws_unpatch(patched), signatures, scale=0.1)
    same(again.params, merge.rws_patch(clean, signatures, scale=0.1).params)


def test_signatures_patch_a_model_of_another_data_set():
    """Whose head has other classes: only the signed leaves have to fit."""
    other, (signatures, _) = model(9, classes=3), signed(1)
    patched = merge.rws_patch(other, signatures)
    same(merge.rws_unpatch(patched), other)
    assert (patched.params["conv_0"]["bias"] != other["conv_0"]["bias"]).all()
    with pytest.raises(ValueError, match="params differs at 'head'"):
        merge.rws_patch(other, signed(1, where=None)[0])


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_quantised_signatures_are_within_half_a_step(width):
    signatures, standard = signed(2)
    small = jit(ft.partial(merge.rws_quantize, bits=width))(signatures)
    back = jit(merge.rws_dequantize)(small, standard)
    assert back["head"] is None
    for part in ("conv_0", "conv_1"):
        for name, x in signatures[part].items():
            for i in range(2):
                got, step = back[part][name][i], float(small.step[part][name][i])
                spread = float(x[i].max() - x[i].min())
                np.testing.assert_allclose(step, spread / (2**width - 1), rtol=1e-5)
                assert np.abs(got - x[i]).max() <= step * 0.5001
                assert len(np.unique(got)) <= 2**width
                np.testing.assert_allclose(got.min(), x[i].min(), rtol=1e-6)
    patched = merge.rws_patch(standard, back)
    same(merge.rws_unpatch(patched), standard)


def test_what_a_quantised_signature_takes():
    """Four bits an entry, rounded up to words, for the signed leaves alone."""
    signatures, standard = signed(1)
    small = merge.rws_quantize(signatures, bits=4)
    entries = [x.size for x in jax.tree.leaves(signatures)]
    words = sum(4 * -(-n // 32) for n in entries)
    assert sum(x.nbytes for x in jax.tree.leaves(small)) == 4 * words + 8 * len(entries)
    alone = merge.rws_quantize(jax.tree.map(lambda x: x[:1], signed(2)[0]), bits=4)
    same(alone, small)  # another signature changes nothing
    with pytest.raises(ValueError, match="bits must be from 1 to 16"):
        merge.rws_quantize(signatures, bits=0)
    with pytest.raises(ValueError, match="words of codes"):
        merge.rws_dequantize(small, jax.tree.map(lambda x: jnp.zeros(999), standard))
