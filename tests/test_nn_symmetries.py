"""The groups of units of every forward of `nn`, and that permuting them is harmless."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_nn import BERT, LLAMA, ROBERTA, VIT, drawn, fast

from jaxlab import io, nn, rewrite

RESNETS = {"A_pretrained_HEAD": nn.resnet8, "resnet20-12fca82f": nn.resnet20}


def tensors(group):
    """The members of a group, each as its name and where in it."""
    return {f"{m.path} {rewrite.describe(m.place)}" for m in group.members}


def test_the_groups_of_a_decoder():
    """Residual stream, key-value groups, queries and values in each, gated units."""
    one = LLAMA | {"num_hidden_layers": 1, "head_dim": 4, "num_attention_heads": 6}
    found = rewrite.symmetries(nn.from_config(one), nn.shapes(one), *nn.inputs(one))
    assert not found.refused
    at = "model.layers.0"
    attn, mlp = f"{at}.self_attn", f"{at}.mlp"
    assert {(g.size, g.counts): tensors(g) for g in found.groups} == {
        (8, ()): {
            "lm_head.weight 1",
            "model.embed_tokens.weight 1",
            "model.norm.weight 0",
            f"{at}.input_layernorm.weight 0",
            f"{at}.post_attention_layernorm.weight 0",
            *(f"{attn}.{x}_proj.weight 1" for x in "qkv"),
            f"{attn}.o_proj.weight 0",
            f"{mlp}.gate_proj.weight 1",
            f"{mlp}.up_proj.weight 1",
            f"{mlp}.down_proj.weight 0",
        },
        (6, ()): {
            f"{mlp}.gate_proj.weight 0",
            f"{mlp}.up_proj.weight 0",
            f"{mlp}.down_proj.weight 1",
        },
        (2, ()): {
            f"{attn}.q_proj.weight 0:[2]x3x4",
            f"{attn}.k_proj.weight 0:[2]x4",
            f"{attn}.v_proj.weight 0:[2]x4",
            f"{attn}.o_proj.weight 1:[2]x3x4",
        },
        (3, (2,)): {
            f"{attn}.q_proj.weight 0:2x[3]x4",
            f"{attn}.o_proj.weight 1:2x[3]x4",
        },
        (4, (2,)): {
            f"{attn}.v_proj.weight 0:2x[4]",
            f"{attn}.o_proj.weight 1:2x3x[4]",
        },
    }


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_the_groups_of_an_encoder(head):
    """A bare model shows its residual stream; one with a head hides it."""
    config = BERT | {"num_hidden_layers": 1, "architectures": [f"Bert{head}"]}
    apply = nn.from_config(config)
    found = rewrite.symmetries(apply, nn.shapes(config), *nn.inputs(config))
    sizes = {(g.size, g.counts) for g in found.groups}
    inside = {(4, ()), (2, (4,)), (6, ())}  # heads, dims of qk and of v, hidden units
    assert sizes == (inside | {(8, ())} if head == "ForMaskedLM" else inside)
    assert len(found.groups) == len(sizes) + 1
    for group in found.groups:
        held = {m.path.split(".")[-2] for m in group.members}
        if group.counts:
            assert held in ({"query", "key"}, {"value", "dense"})
        elif group.size == 8:
            assert {"word_embeddings", "position_embeddings", "LayerNorm"} <= held


def test_the_groups_of_a_vision_transformer():
    found = rewrite.symmetries(nn.from_config(VIT), nn.shapes(VIT), *nn.inputs(VIT))
    sizes = sorted((g.size, g.counts) for g in found.groups)
    assert sizes == [(2, ()), (4, (2,)), (4, (2,)), (6, ()), (8, ())]
    (stream,) = (g for g in found.groups if g.size == 8)
    assert {
        "vit.embeddings.cls_token 2",
        "vit.embeddings.position_embeddings 2",
        "vit.embeddings.patch_embeddings.projection.weight 0",
        "classifier.weight 1",
    } <= tensors(stream)


def test_the_groups_of_the_real_resnets(data):
    """ResNet-8: three stages and the inside of each block. ResNet-20: its shortcuts
    pad, so that channels are new, or come from an earlier stage."""
    sizes = {}
    for name, apply in RESNETS.items():
        params = dict(np.load(data / "weights" / f"{name}.npz"))
        image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        found = rewrite.symmetries(apply, params, image)
        assert not found.refused
        sizes[name] = sorted(g.size for g in found.groups)
    inner = [16] * 3 + [32] * 3 + [64] * 3
    stream = [16, 8, 8, 16, 16]
    assert sizes["resnet20-12fca82f"] == sorted(inner + stream)
    assert sizes["A_pretrained_HEAD"] == [16, 16, 32, 32, 64, 64]


@pytest.mark.parametrize("config", [LLAMA, ROBERTA, VIT], ids=lambda c: c["model_type"])
def test_permuting_changes_nothing(config):
    config = config | {"num_hidden_layers": 1}
    apply, inputs = nn.from_config(config), nn.inputs(config)
    found = rewrite.symmetries(apply, nn.shapes(config), *inputs)
    rng = np.random.default_rng(0)
    real = [
        jnp.asarray(
            rng.integers(2, 9, x.shape)
            if x.dtype == jnp.int32
            else rng.normal(size=x.shape)
        )
        for x in inputs
    ]
    key = jax.random.key(0)
    errors = rewrite.verify(apply, drawn(config), found, *real, key=key, trials=1)
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("name", RESNETS)
def test_permuting_a_real_resnet_changes_nothing(name, data):
    params = dict(np.load(data / "weights" / f"{name}.npz"))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32, 3)))
    found = rewrite.symmetries(RESNETS[name], params, image)
    key = jax.random.key(0)
    errors = rewrite.verify(RESNETS[name], params, found, image, key=key, trials=1)
    assert max(errors.values()) < 1e-12


def test_permuting_the_real_minilm_changes_nothing(minilm):
    apply, params = nn.from_config(minilm), io.load(minilm)
    found = rewrite.symmetries(apply, params, *nn.inputs(minilm))
    # The residual stream is what it shows, and the stored positions are never read.
    assert len(found.groups) == 6 * 4 + 1
    moved = rewrite.random_permutations(found, key=jax.random.key(0))
    other = rewrite.permute(params, found, moved)
    tokens = jnp.asarray([[101, 7592, 2088, 999, 102]])
    with jax.enable_x64(True):
        double = lambda x: x.astype(jnp.float64) if x.ndim and x.dtype == "f4" else x
        want, got = (
            fast(apply)(jax.tree.map(double, p), tokens) for p in (params, other)
        )
    for one, two in zip(want, got, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-11, atol=1e-12)
