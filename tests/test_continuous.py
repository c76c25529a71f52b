"""rewrite.continuous, transform and verify: what may be scaled, flipped or mixed."""

import functools as ft
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from symmetry_models import MODELS
from symmetry_traps import TRAPS, weights

from jaxlab import rewrite
from jaxlab.rewrite import Continuous, Group, Member, Place

KEY = jax.random.key(2)
SEED = 4
RNG = np.random.default_rng(SEED)


@pytest.fixture(autouse=True)
def as_users_write():
    """The models broadcast and promote as numpy does; the library does not."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def normal(*shape):
    return RNG.normal(size=shape)


def line(s):
    """A symmetry as `kind: place^exponent ... | leaves that must be ones`."""
    places = [
        f"{m.path}:{rewrite.describe(m.place)}^{e}"
        for m, e in zip(s.group.members, s.exponents, strict=True)
    ]
    return f"{s.kind}: {' '.join(places)}" + (f" | {' '.join(s.ones)}" * bool(s.ones))


def found(apply, params, *inputs):
    return {line(s) for s in rewrite.continuous(apply, params, *inputs)}


@ft.cache
def of_model(name):
    apply, params, inputs, _ = MODELS[name]()
    return apply, params, inputs, rewrite.continuous(apply, params, *inputs)


def hidden(activation):
    return lambda p, x: activation(x @ p["a"] + p["b"]) @ p["c"]


UNITS = "{}: a:1^1 b:0^1 c:0^-1", "{}: a:1^1 b:0^1 c:0^1"
LEAKY = ft.partial(jax.nn.leaky_relu, negative_slope=0.3)


@pytest.mark.parametrize(
    ("activation", "want"),
    [
        (jax.nn.relu, {UNITS[0].format("scale")}),
        (LEAKY, {UNITS[0].format("scale")}),
        (jnp.abs, {UNITS[0].format("scale"), "sign: a:1^1 b:0^1"}),
        (jnp.cos, {"sign: a:1^1 b:0^1"}),
        (jnp.tanh, {UNITS[1].format("sign")}),
        (jnp.sin, {UNITS[1].format("sign")}),
        (lambda x: x, {UNITS[0].format("general linear")}),
        (jnp.square, {"scale and sign: a:1^1 b:0^1 c:0^-2"}),
        (lambda x: jax.nn.relu(x) ** 2, {"scale: a:1^1 b:0^1 c:0^-2"}),
        (jnp.cbrt, {"scale: a:1^3 b:0^3 c:0^-1"}),
        (jax.nn.gelu, set()),
        (jax.nn.silu, set()),
        (jax.nn.relu6, set()),
        (lambda x: jax.lax.sort(x), set()),
        (lambda x: jnp.fft.fft(x).real, set()),
    ],
)
def test_what_an_activation_leaves_free(activation, want):
    p = {"a": normal(5, 8), "b": normal(8), "c": normal(8, 3)}
    assert found(hidden(activation), p, normal(6, 5)) == want


WIDE = (
    "embed:1^1 head:0^1 l/down:1^1 l/gate:0^1 l/k:0^1 l/o:1^1 l/q:0^1 l/up:0^1 l/v:0^1"
)
DECODER = {
    f"rotation: {WIDE} | l/n1 l/n2 last",
    "sign: embed:1^1 head:0^1 l/down:1^1 l/n1:0^1 l/n2:0^1 l/o:1^1",
    "scale and sign: head:0^1 last:0^-1",
    "scale and sign: l/gate:0^1 l/n2:0^-1 l/up:0^1",
    "scale and sign: l/k:0^1 l/n1:0^-1 l/q:0^1 l/v:0^1",
    "scale and sign: l/down:0^1 l/up:1^-1",
    "general linear: l/o:0:2x2x[6]^1 l/v:1:2x[6]^-1",
}


def test_a_decoder_with_and_without_rotary_embeddings():
    want = {"grouped_query_decoder": "scale and sign: l/k:1:[2]x6^1 l/q:1:[2]x2x6^-1",
            "decoder_without_rope": "general linear: l/k:1:2x[6]^1 l/q:1:2x2x[6]^-1",
            }  # fmt: skip
    for name, keys in want.items():
        assert {line(s) for s in of_model(name)[-1]} == DECODER | {keys}


def test_scanned_layers_have_values_of_their_own():
    plain, scanned = (
        of_model(n)[-1] for n in ("grouped_query_decoder", "scanned_decoder_with_remat")
    )
    assert [s.kind for s in scanned] == [s.kind for s in plain]
    for a, b in zip(plain, scanned, strict=True):
        inside = a.group.name.startswith("l/")
        assert b.group.counts == ((3,) if inside else ()) + a.group.counts


def test_fused_queries_keys_and_values():
    lines = {line(s) for s in of_model("vit_with_fused_qkv")[-1]}
    first, second, third = "@0+14:2x[7]", "@14+14:2x[7]", "@28+14:2x[7]"
    assert lines >= {
        f"general linear: qkv/bias:0:{first}^1 qkv/bias:0:{second}^-1 "
        f"qkv/kernel:1:{first}^1 qkv/kernel:1:{second}^-1",
        f"general linear: out/kernel:0:2x[7]^1 qkv/bias:0:{third}^-1 "
        f"qkv/kernel:1:{third}^-1",
    }


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * p["g"] + p["b"]


def test_a_stream_with_layer_norm_flips_as_a_whole():
    def apply(p):
        x = p["e"] + jnp.tanh(layer_norm(p["e"], p["n"]) @ p["w"]) @ p["d"]
        return layer_norm(x, p["m"]) @ p["h"]

    norm = lambda: {"g": normal(8), "b": normal(8)}
    p = {"e": normal(5, 8), "n": norm(), "w": normal(8, 6), "d": normal(6, 8),
         "m": norm(), "h": normal(8, 3)}  # fmt: skip
    whole = {"e": 5, "h": 8, "m/b": 8, "n/b": 8}  # the others of the stream: even
    text = " ".join(f"{n}:0:[1]x{k}^1" for n, k in sorted(whole.items()))
    assert found(apply, p) == {
        f"sign: {text}", "sign: d:0^1 w:1^1",
        "scale and sign: n/b:0^1 n/g:0^1 w:0^-1",
        "scale and sign: h:0^1 m/b:0^-1 m/g:0^-1",
    }  # fmt: skip
    change = rewrite.verify(apply, p, rewrite.continuous(apply, p), key=KEY)
    assert max(change.values()) < 1e-14


def test_whole_leaves_of_a_pinned_axis():
    """A cosine classifier does not see how long its rows are, all together or alone."""
    unit = lambda x: x / jnp.sqrt((x * x).sum(-1, keepdims=True))
    p, x = {"a": normal(5, 4), "w": normal(3, 4)}, normal(6, 5)
    apply = lambda p, x: unit(x @ p["a"]) @ unit(p["w"]).T
    assert found(apply, p, x) == {
        "rotation: a:1^1 w:1^1", "scale: a:0:[1]x5^1", "scale: w:0:[1]x3^1",
    }  # fmt: skip


def test_integers_and_constants_stay():
    p = {"w": normal(3, 4), "steps": np.arange(4), "v": normal(4, 2)}
    apply = lambda p, x: (x @ p["w"] * p["steps"]) @ p["v"]
    assert found(apply, p, normal(2, 3)) == {"scale and sign: v:0^1 w:1^-1"}
    apply = lambda p, x: (x @ p["w"] + p["steps"]) @ p["v"]
    assert found(apply, p, normal(2, 3)) == set()
    book = {"w": normal(4, 4), "steps": np.array([2, 0, 1, 3]), "v": normal(4, 2)}
    apply = lambda p, x: jnp.tanh(x @ p["w"])[:, p["steps"]] @ p["v"]
    assert found(apply, book, normal(2, 4)) == {
        "sign: v:0:[1]x4^1 w:0:[1]x4^1"
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["resnet_with_batch_norm", "linen_transformer", "scanned_decoder_with_remat",
     "decoder_without_rope", "vit_with_fused_qkv", "convnext", "gru_with_fused_gates"],
)  # fmt: skip
def test_they_change_nothing(name):
    apply, params, inputs, got = of_model(name)
    change = rewrite.verify(apply, params, got, *inputs, key=KEY, trials=2)
    assert set(change) == {s.name for s in got} | {"all"}
    assert max(change.values()) < 1e-12


def test_what_must_be_folded_first():
    apply, params, inputs, got = of_model("grouped_query_decoder")
    (turn,) = (s for s in got if s.kind == "rotation")
    unfolded = [turn._replace(ones=())]
    change = rewrite.verify(apply, params, unfolded, *inputs, key=KEY, trials=1)
    assert change[turn.name] > 1e-2
    folded = params = jax.tree.map(jnp.float32, params)
    for s in got:  # a gain becomes one by the scale that it shares with its readers
        gains = [m.path for m in s.group.members if m.path in turn.ones]
        if s.kind == "scale and sign" and gains:
            (gain,) = gains
            name = gain.split("/")[-1]
            g = params["l"][name] if gain.startswith("l/") else params[name]
            folded = rewrite.transform(folded, s, jnp.asarray(g))
    for gain in (folded["l"]["n1"], folded["l"]["n2"], folded["last"]):
        np.testing.assert_allclose(gain, 1, rtol=1e-6)
    want, got = apply(params, *inputs), apply(folded, *inputs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_shapes_are_enough():
    apply, params, inputs, got = of_model("grouped_query_decoder")
    spec = lambda t: jax.eval_shape(lambda: jax.tree.map(jnp.asarray, t))
    assert rewrite.continuous(apply, spec(params), *spec(inputs)) == got


@pytest.mark.parametrize(
    "name",
    ["rotary on one half", "two experts of four, gathered", "a while loop",
     "query and key norms share a gain", "rolled by two, and added",
     "a constant mask", "shortcut padded with zeros", "h beside -h"],
)  # fmt: skip
def test_what_misleads(name):
    apply, shapes, inputs, _ = TRAPS[name]
    params = weights(shapes)
    got = rewrite.continuous(apply, params, *inputs)
    assert got
    change = rewrite.verify(apply, params, got, *inputs, key=KEY)
    assert max(change.values()) < 1e-13


def one(kind, *exponents, shape=(3,)):
    """A symmetry of axis 0 of some leaves, with one value per index of axis 1."""
    places = [Member(n, Place(0), (Place(1),)) for n in "ab"[: len(exponents)]]
    return Continuous("a", kind, Group("a", *shape, tuple(places), ("b:1",), (2,)),
                      exponents)  # fmt: skip


def test_transform_is_what_it_says():
    p = {"a": normal(3, 2, 4), "b": normal(3, 2), "c": normal(2)}
    s, m = np.exp(normal(2, 3)), normal(2, 3, 3)
    with jax.enable_x64(True):
        got = rewrite.transform(p, one("scale", 2, -1), s)
        np.testing.assert_allclose(got["a"], p["a"] * (s.T**2)[..., None], rtol=1e-14)
        np.testing.assert_allclose(got["b"], p["b"] / s.T, rtol=1e-14)
        np.testing.assert_array_equal(got["c"], p["c"])
        got = rewrite.transform(p, one("general linear", 1, -1), m)
        want = np.einsum("pfg,gpr->fpr", m, p["a"])
        np.testing.assert_allclose(got["a"], want, rtol=1e-12)
        want = np.einsum("pgf,gp->fp", np.linalg.inv(m), p["b"])
        np.testing.assert_allclose(got["b"], want, rtol=1e-10)


def test_transform_differentiates_maps_and_rounds_once():
    p = {"a": normal(3, 2, 4).astype("f4"), "b": normal(3, 2).astype("f4")}
    symmetry, s = one("scale", 1, -1), np.exp(normal(5, 2, 3)).astype("f4")
    move = jax.jit(jax.vmap(ft.partial(rewrite.transform, p, symmetry)))
    for i, each in enumerate(jax.vmap(lambda t: t)(s)):
        alone = rewrite.transform(p, symmetry, each)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y),
                     move(s), alone)  # fmt: skip
    loss = lambda s: rewrite.transform(p, symmetry, s)["b"].sum()
    want = -(p["b"] / s[0].T ** 2).T
    np.testing.assert_allclose(jax.grad(loss)(s[0]), want, rtol=1e-5)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), p)
    got = rewrite.transform(half, symmetry, s[0])
    exact = half["b"].astype("f4") / s[0].T
    assert got["b"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got["b"], exact.astype(jnp.bfloat16))


def test_bad_values_are_named():
    p = {"a": normal(3, 2)}
    with pytest.raises(ValueError, match=r"shape \(3,\), expected \(2, 3\)"):
        rewrite.transform(p, one("sign", 1), np.ones(3))
    with pytest.raises(ValueError, match=r"expected \(2, 3, 3\)"):
        rewrite.transform(p, one("rotation", 1), np.ones((2, 3)))
    with pytest.raises(ValueError, match="changes 'b', which is no leaf"):
        rewrite.transform(p, one("sign", 1, 1), np.ones((2, 3)))
    with pytest.raises(ValueError, match="trials must be at least 1"):
        rewrite.verify(lambda p: p["a"], p, [one("sign", 1)], key=KEY, trials=0)


def test_verify_measures_a_false_symmetry():
    p = {"a": np.ones((3, 2))}
    change = rewrite.verify(lambda p: p["a"], p, [one("sign", 1)], key=KEY, trials=4)
    assert change == {"a": 2.0, "all": 2.0}
    assert math.isclose(
        rewrite.verify(lambda p: p["a"].sum(), p, [], key=KEY)["all"], 0
    )
