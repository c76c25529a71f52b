"""The forwards: what they must not see, what their configs may say, what fits them."""

import functools as ft
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import nn
from jaxlab.nn import _llama, _rope

TEXT = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 9,
}
LLAMA = TEXT | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
}
BERT = TEXT | {"model_type": "bert", "architectures": ["BertModel"]}
ROBERTA = BERT | {
    "model_type": "roberta",
    "architectures": ["RobertaForMaskedLM"],
    "pad_token_id": 1,
}
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CONFIGS = {"llama": LLAMA, "bert": BERT, "roberta": ROBERTA, "vit": VIT}
TOKENS = jnp.array([[3, 5, 2, 8, 4, 7], [2, 2, 6, 0, 3, 5]])


fast = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def drawn(config, dtype="float32"):
    """Random params of the shapes that a config implies."""
    draw = lambda name: np.random.default_rng(zlib.crc32(name.encode())).normal
    return {
        name: jnp.asarray(0.5 * draw(name)(size=leaf.shape), dtype)
        for name, leaf in nn.shapes(config).items()
    }


def call(config, *inputs, dtype="float32", **changes):
    config = config | changes
    return compiled(json.dumps(config))(drawn(config, dtype), *inputs)


@ft.cache
def compiled(config):
    return fast(nn.from_config(json.loads(config)))


def sample(config):
    """Inputs like those that `nn.inputs` describes."""
    (like,) = nn.inputs(config)
    rng = np.random.default_rng(1)
    if like.dtype == jnp.int32:
        return jnp.asarray(rng.integers(2, 9, like.shape))
    return jnp.asarray(rng.normal(size=like.shape), like.dtype)


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_nesting_and_gradients(name, dtype):
    config = CONFIGS[name] | {"num_hidden_layers": 1}
    x = sample(config)
    params = drawn(config, dtype)
    nested: dict = {}
    for key, leaf in params.items():
        *folders, last = key.split(".")
        ft.reduce(lambda n, k: n.setdefault(k, {}), folders, nested)[last] = leaf
    apply = nn.from_config(config)
    total = lambda p: sum(
        jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(apply(p, x))
    )
    out = jax.eval_shape(apply, params, x)
    assert all(y.dtype == dtype for y in jax.tree.leaves(out))
    grads = fast(jax.grad(total))(nested)
    assert jax.tree.structure(grads) == jax.tree.structure(nested)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_a_decoder_sees_the_past_alone():
    apply = ft.partial(fast(nn.from_config(LLAMA)), drawn(LLAMA))
    out = apply(TOKENS)
    for t in range(1, 6):
        later = apply(jnp.where(jnp.arange(6)[None] < t, TOKENS, 1))
        close(later[:, :t], out[:, :t])
        assert not np.allclose(later[:, t], out[:, t])


@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_padding_is_not_seen(name):
    mask = jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    first = lambda tokens: jax.tree.leaves(call(CONFIGS[name], tokens, mask))[0]
    other = jnp.where(mask == 1, TOKENS, (TOKENS + 1) % 9)
    if name == "roberta":  # it counts all tokens but those of padding
        other = jnp.where(mask == 1, TOKENS, 1)
    real = mask == 1
    close(first(TOKENS)[real], first(other)[real])
    alone = jax.tree.leaves(call(CONFIGS[name], TOKENS[:1, :4]))[0]
    close(first(TOKENS)[:1, :4], alone)


def test_a_wide_window_is_no_window():
    mistral = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    see = lambda width: call(mistral, TOKENS, sliding_window=width)
    close(see(6), see(None))
    close(see(6), call(LLAMA, TOKENS))
    close(see(3)[:, :3], see(None)[:, :3])
    assert not np.allclose(see(3)[:, 3], see(None)[:, 3])


def test_equal_key_value_heads_are_one_shared_head():
    """Multi-head attention with repeated keys and values is grouped attention."""
    params = drawn(LLAMA)
    want = call(LLAMA, TOKENS)
    for name in [n for n in params if "k_proj" in n or "v_proj" in n]:
        heads = params[name].reshape(2, 2, 8).repeat(2, 0)
        params[name] = heads.reshape(8, 8)
    apply = nn.from_config(LLAMA | {"num_key_value_heads": 4})
    close(fast(apply)(params, TOKENS), want)


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 6))
    angles = _rope.frequencies(LLAMA, _llama.fields(LLAMA), 6)
    cos, sin = _rope.tables(angles, 9)
    repeat = lambda x: jnp.broadcast_to(x, (1, 9, 6))
    scores = jnp.einsum(
        "bqd,bkd->qk", *(_rope.rotate(repeat(x), cos, sin) for x in (q, k))
    )
    for gap in range(-8, 9):
        close(jnp.diagonal(scores, gap), scores[max(0, -gap), max(0, gap)], 1e-5)
    close(scores[0, 0], jnp.sum(q * k), 1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ],
    ids=lambda s: next(iter(s.values())),
)
def test_older_and_newer_configs_say_the_same_rotation(scaling):
    old = {"rope_theta": 500.0, "rope_scaling": scaling}
    kind = scaling.get("rope_type", scaling.get("type"))
    rest = {k: v for k, v in scaling.items() if "type" not in k}
    new = {"rope_parameters": {"rope_theta": 500.0, "rope_type": kind, **rest}}
    close(call(LLAMA, TOKENS, **old), call(LLAMA, TOKENS, **new), 0)
    plain = call(LLAMA, TOKENS, rope_theta=500.0)
    assert not np.allclose(call(LLAMA, TOKENS, **old), plain)


def test_llama3_keeps_fast_planes_and_slows_slow_ones():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LLAMA | {"rope_theta": 500000.0, "rope_scaling": scaling}
    scaled = _rope.frequencies(config, _llama.fields(config), 128)
    plain = LLAMA | {"rope_theta": 500000.0}
    ratio = scaled / _rope.frequencies(plain, _llama.fields(plain), 128)
    assert (ratio[:29] == 1).all()
    np.testing.assert_allclose(ratio[36:], 1 / 8)
    assert (np.diff(ratio) <= 0).all()


def test_patches_and_their_positions_may_change_places():
    """A vision transformer knows where a patch is from its position alone."""
    params = drawn(VIT)
    images = sample(VIT)
    want = call(VIT, images)
    swapped = jnp.concatenate([images[:, :, 4:], images[:, :, :4]], 2)
    name = "vit.embeddings.position_embeddings"
    order = jnp.array([0, 3, 4, 1, 2])
    params[name] = params[name][:, order]
    close(fast(nn.from_config(VIT))(params, swapped), want)


def test_an_untied_head_that_equals_the_embedding_is_a_tied_one():
    params = drawn(LLAMA)
    params["lm_head.weight"] = params["model.embed_tokens.weight"]
    want = fast(nn.from_config(LLAMA))(params, TOKENS)
    del params["lm_head.weight"]
    tied = nn.from_config(LLAMA | {"tie_word_embeddings": True})
    close(fast(tied)(params, TOKENS), want, 0)


BAD = {
    "unknown field": (LLAMA, {"logit_cap": 30.0}, "'logit_cap' is not known"),
    "unknown rotation": (LLAMA, {"rope_scaling": {"type": "yarn"}}, "'rope_scaling'"),
    "rotation lacks": (LLAMA, {"rope_scaling": {"type": "linear"}}, "'rope_scaling'"),
    "rotation has more": (
        LLAMA,
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}},
        "'rope_scaling'",
    ),
    "partial rotation": (LLAMA, {"partial_rotary_factor": 0.5}, "'partial_rotary"),
    "quantised": (LLAMA, {"quantization_config": {"bits": 4}}, "'quantization_config'"),
    "activation": (LLAMA, {"hidden_act": "mish"}, "'hidden_act' = 'mish'"),
    "heads": (LLAMA, {"num_key_value_heads": 3}, "'num_key_value_heads' = 3"),
    "no size": (LLAMA, {"hidden_size": None}, "'hidden_size' must be a size"),
    "head": (LLAMA, {"architectures": ["LlamaForTwo"]}, "'architectures' must be"),
    "no head": (BERT, {"architectures": None}, "'architectures' must be"),
    "positions": (BERT, {"position_embedding_type": "relative_key"}, "'position_emb"),
    "decoder": (BERT, {"is_decoder": True}, "'is_decoder' = True"),
    "untied": (ROBERTA, {"tie_word_embeddings": False}, "'tie_word_embeddings'"),
    "odd head": (VIT, {"num_attention_heads": 3}, "does not divide 'hidden_size'"),
    "kind": (VIT, {"model_type": "swin"}, "'model_type' must be one of"),
    "layers": (
        LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2Model"]},
        {"layer_types": ["full_attention", "linear_attention"]},
        "'layer_types'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_config_that_is_not_understood_is_refused(name):
    config, change, why = BAD[name]
    with pytest.raises(ValueError, match=why):
        call(config | change, TOKENS)


def test_tensors_that_the_config_does_not_imply_are_refused():
    params, apply = drawn(LLAMA), nn.from_config(LLAMA)
    name = "model.layers.1.mlp.up_proj.weight"
    without = {k: v for k, v in params.items() if k != name}
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        apply(without, TOKENS)
    with pytest.raises(ValueError, match=r"'q.bias', which the config does not imply"):
        apply(params | {"q.bias": jnp.ones(1)}, TOKENS)
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(2,\)"):
        apply(params | {name: jnp.ones(2)}, TOKENS)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": jnp.ones(1)}
    close(fast(apply)(params | buffer, TOKENS), call(LLAMA, TOKENS), 0)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="images must be"):
        nn.vit(drawn(VIT), jnp.ones((1, 3, 12, 8)), config=VIT)


def test_a_config_is_read_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        assert nn.from_config(path).keywords == {"config": LLAMA}
    for text, why in (("{", "not JSON"), ("[]", "a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=why):
            nn.from_config(tmp_path)


IMAGES = jax.random.normal(jax.random.key(3), (4, 8, 8, 3))


def test_a_resnet_reads_depth_and_width_from_its_params():
    for widths, blocks in (((4, 6), 1), ((3, 3, 5), 2)):
        net = nn.resnet(widths=widths, blocks=blocks, classes=7)
        params = jax.eval_shape(net.init, jax.random.key(0))
        assert sum("conv" in n for n in params) == 1 + 2 * blocks * len(widths)
        assert net.apply is nn.resnet20
        assert jax.eval_shape(net.apply, params, IMAGES).shape == (4, 7)
    with pytest.raises(ValueError, match="must not shrink"):
        nn.resnet(widths=(6, 4))


def test_a_resnet_draws_each_leaf_from_its_own_name():
    small, large = (
        fast(nn.resnet(widths=(4, 6), blocks=b).init)(jax.random.key(0)) for b in (1, 2)
    )
    assert all((large[name] == leaf).all() for name, leaf in small.items())
    kernel = fast(nn.resnet(widths=(64,), blocks=1).init)(jax.random.key(0))
    std = float(jnp.std(kernel["layer1.0.conv1.weight"]))
    assert abs(std / (2 / (9 * 64)) ** 0.5 - 1) < 0.01


def test_a_batch_norm_that_trains_does_not_see_the_scale_of_its_kernel():
    net = nn.resnet(widths=(4,), blocks=1)
    params = fast(net.init)(jax.random.key(0))
    scaled = params | {"conv1.weight": 3 * params["conv1.weight"]}
    train = fast(ft.partial(net.apply, images=IMAGES, train=True))
    close(train(scaled), train(params), 2e-4)
    known = fast(ft.partial(net.apply, images=IMAGES))
    assert not np.allclose(known(scaled), known(params))


def test_a_batch_norm_by_the_stored_statistics_of_a_batch_is_that_of_training():
    net = nn.resnet(widths=(4,), blocks=0)
    params = fast(net.init)(jax.random.key(0))
    x = jax.lax.conv_general_dilated(
        IMAGES,
        params["conv1.weight"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
    )
    stored = {
        "bn1.running_mean": x.mean((0, 1, 2)),
        "bn1.running_var": x.var((0, 1, 2)),
    }
    train = fast(ft.partial(net.apply, images=IMAGES, train=True))
    close(fast(net.apply)(params | stored, IMAGES), train(params))


def test_a_small_transformer_attends_over_its_patches():
    """Equal to the formula with its layers unrolled; tokens are patches in order."""
    net = nn.small_vit(size=4, patch=2, width=6, heads=2, depth=2, outputs=3)
    p, x = net.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (2, 4, 4))
    h = jnp.stack([x[:, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2)], 1)
    h = h.reshape(2, 4, 4) @ p["embed"]["kernel"] + p["position"][None]
    normed = lambda v: (
        (v - v.mean(-1, keepdims=True)) / jnp.sqrt(v.var(-1, keepdims=True) + 1e-6)
    )
    for i in range(2):
        w = jax.tree.map(lambda v, i=i: v[i], p["layers"])
        y, heads = normed(h), []
        for head in range(2):
            q, k, v = (
                y @ w["attention"][n]["kernel"][:, head]
                for n in ("query", "key", "value")
            )
            mixed = jax.nn.softmax(q @ k.mT / jnp.sqrt(3.0)) @ v
            heads.append(mixed @ w["attention"]["out"]["kernel"][head])
        h = h + heads[0] + heads[1]
        h = h + jax.nn.gelu(normed(h) @ w["up"]["kernel"]) @ w["down"]["kernel"]
    np.testing.assert_allclose(nn.small_vit_features(p, x), normed(h), 1e-4, 1e-5)
    want = normed(h).mean(1) @ p["head"]["kernel"]
    np.testing.assert_allclose(net.apply(p, x), want, 1e-4, 1e-5)
    assert nn.small_vit_apply is net.apply
    with pytest.raises(ValueError, match="patch 3 of 4"):
        nn.small_vit(size=4, patch=3)


def test_small_networks_are_what_they_say():
    net = nn.mlp((2, 3, 1))
    params = {
        "layer_0": {
            "kernel": jnp.array([[1.0, -1, 2], [0, 1, 1]]),
            "bias": jnp.ones(3),
        },
        "layer_1": {
            "kernel": jnp.array([[1.0], [10], [100]]),
            "bias": jnp.array([5.0]),
        },
    }
    shapes = lambda p: jax.tree.map(jnp.shape, p)
    assert shapes(jax.eval_shape(net.init, jax.random.key(0))) == shapes(params)
    close(
        fast(net.apply)(params, jnp.array([[1.0, 2], [-3, 1]])),
        [[2 + 20 + 500 + 5], [55.0]],
    )
    wide, narrow = nn.cnn((4, 6), size=8), nn.cnn((2, 3), size=8)
    for one in (wide, narrow):  # either apply takes the params of both
        params = fast(one.init)(jax.random.key(0))
        images = jnp.ones((2, 8, 8, 1))
        close(*(fast(n.apply)(params, images) for n in (wide, narrow)), 0)
