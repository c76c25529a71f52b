"""LoRA files of diffusion models: kohya, LyCORIS, diffusers, cloneofsimo, and back."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlab import io
from jaxlab.io import FormatError, _adapter_file as files, _kohya_names as names
from jaxlab.io._adapter_part import make_part, norm

SEED = 0
RNG = np.random.default_rng(SEED)
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def lora(prefix, n, m, rank, alpha=None, kernel=()):
    """kohya's tensors of one module."""
    out = {f"{prefix}.lora_down.weight": normal(rank, n, *kernel)}
    out[f"{prefix}.lora_up.weight"] = normal(m, rank, *(1,) * len(kernel))
    if alpha is not None:
        out[f"{prefix}.alpha"] = np.array(alpha, "f4")
    return out


def update(part):
    """The update that a part stands for, formed whole."""
    t, scale = part.tensors, part.alpha / part.rank
    if part.kind == "LORA":
        a, b = t["lora_A.weight"], t["lora_B.weight"]
        return scale * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    if part.kind == "LOHA":
        one, two = (t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] for i in (1, 2))
        return scale * one * two
    whole = lambda i: t.get(f"lokr_w{i}")
    low = lambda i: t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"]
    one, two = (low(i) if whole(i) is None else whole(i) for i in (1, 2))
    return scale * np.kron(one, two)


@pytest.fixture
def kohya(tmp_path):
    """A file with ranks and alphas that differ, a convolution and a text encoder."""
    tensors = lora(f"{KOHYA}_attn1_to_q", 8, 8, 2, 1)
    tensors |= lora(f"{KOHYA}_attn1_to_out_0", 8, 6, 4, 4)
    tensors |= lora("lora_unet_up_blocks_0_resnets_1_conv1", 3, 5, 2, 3, (3, 3))
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors |= lora(text, 4, 4, 2)
    tensors[f"{KOHYA}_attn1_to_q.dora_scale"] = np.abs(normal(8, 1))
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def same(a, b, every=1):
    assert a.components.keys() == b.components.keys()
    for component, parts in a.components.items():
        other = b.components[component]
        assert parts.keys() == other.keys()
        for module, part in list(parts.items())[::every]:
            np.testing.assert_allclose(
                update(part), update(other[module]), rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("module", [
    f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj", "mid_block.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv", "up_blocks.1.attentions.2.proj_in",
    "up_blocks.3.resnets.2.conv_shortcut", "down_blocks.0.resnets.1.time_emb_proj",
    "time_embedding.linear_1", "text_model.encoder.layers.11.mlp.fc2",
    "text_model.encoder.layers.0.self_attn.out_proj",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k", "middle_block.0.in_layers.2",
    "double_blocks.18.img_attn.qkv", "single_blocks.37.modulation.lin",
    "joint_blocks.0.context_block.attn.qkv",
])  # fmt: skip
def test_names_come_back(module):
    """The dots that kohya drops are found again."""
    for component in ("unet", "text_encoder_2"):
        name = names.to_kohya(component, module, several=True)
        assert names.of_kohya(name) == (component, module)


def test_kohya_is_read_and_written(kohya, tmp_path):
    parts = files.read(kohya)
    assert parts.format == "kohya"
    assert parts.components.keys() == {"unet", "text_encoder"}
    q = parts.components["unet"][f"{BLOCK}.attn1.to_q"]
    assert (q.rank, q.alpha) == (2, 1.0)
    assert q.tensors["lora_magnitude_vector"].shape == (8,)
    (text,) = parts.components["text_encoder"].values()
    assert (text.rank, text.alpha) == (2, 2.0)  # without an alpha the scale is 1
    io.convert_adapter(kohya, tmp_path / "out.safetensors", to="kohya")
    old, new = load_file(kohya), load_file(tmp_path / "out.safetensors")
    for name, x in old.items():
        np.testing.assert_array_equal(new[name], x)
    assert all(name.endswith(".alpha") for name in new.keys() - old.keys())


def test_kohya_to_peft_and_back(kohya, tmp_path):
    with pytest.raises(ValueError, match=r"use_dora.* unlike other layers"):
        io.convert_adapter(kohya, tmp_path / "mixed", to="peft")
    tensors = {n: x for n, x in load_file(kohya).items() if "dora" not in n}
    save_file(tensors, kohya)
    io.convert_adapter(kohya, tmp_path / "peft", to="peft")
    config = json.loads(
        (tmp_path / "peft" / "unet" / "adapter_config.json").read_text()
    )
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == {
        rf"^{BLOCK}.attn1.to_out.0$".replace(".", r"\."): 4
    }
    io.convert_adapter(tmp_path / "peft", tmp_path / "again.safetensors", to="kohya")
    old, new = load_file(kohya), load_file(tmp_path / "again.safetensors")
    for name, x in old.items():
        np.testing.assert_array_equal(new[name], x)


def test_diffusers_takes_the_scale_into_its_factors(kohya, tmp_path):
    io.convert_adapter(kohya, tmp_path / "out.safetensors", to="diffusers")
    tensors = load_file(tmp_path / "out.safetensors")
    assert f"unet.{BLOCK}.attn1.to_q.lora_A.weight" in tensors
    assert f"unet.{BLOCK}.attn1.to_q.lora_magnitude_vector.weight" in tensors
    assert not any("alpha" in name for name in tensors)
    again = files.read(tmp_path / "out.safetensors")
    assert again.format == "diffusers"
    same(files.read(kohya), again)


def test_the_older_names_of_diffusers(tmp_path):
    """Attention processors, linear layers of LoRA, text encoders."""
    a, b = normal(2, 8), normal(8, 2)
    head = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    expected = {
        f"{head}.processor.to_q_lora": ("unet", f"{head}.to_q"),
        f"unet.{head}.processor.to_out_lora": ("unet", f"{head}.to_out.0"),
        f"unet.{head}.to_k.lora": ("unet", f"{head}.to_k"),
        f"{text}.q_proj.lora_linear_layer": ("text_encoder", f"{text[13:]}.q_proj"),
        f"{text}.to_v_lora": ("text_encoder", f"{text[13:]}.v_proj"),
    }
    tensors = {f"{n}.down.weight": a for n in expected}
    save_file(
        tensors | {f"{n}.up.weight": b for n in expected}, tmp_path / "x.safetensors"
    )
    parts = files.read(tmp_path / "x.safetensors")
    found = {(c, m) for c, mine in parts.components.items() for m in mine}
    assert found == set(expected.values())


def lycoris(both=False):
    """LoHa, and LoKr with its second factor whole or low."""
    loha, lokr = {}, {}
    for i, (n, m) in enumerate(((8, 6), (4, 12))):
        prefix = f"lora_unet_down_blocks_{i}_attentions_0_proj_in"
        loha |= {f"{prefix}.hada_w{j}_a": normal(m, 2) for j in (1, 2)}
        loha |= {f"{prefix}.hada_w{j}_b": normal(2, n) for j in (1, 2)}
        loha[f"{prefix}.alpha"] = np.array(1, "f4")
        prefix = f"lora_unet_down_blocks_{i}_attentions_0_proj_out"
        lokr |= {
            f"{prefix}.lokr_w1": normal(2, 2),
            f"{prefix}.alpha": np.array(3, "f4"),
        }
        n, m = 16 * n, 16 * m
        if both:
            lokr[f"{prefix}.lokr_w2"] = normal(m // 2, n // 2)
        else:
            lokr[f"{prefix}.lokr_w2_a"] = normal(m // 2, 4)
            lokr[f"{prefix}.lokr_w2_b"] = normal(4, n // 2)
    return loha, lokr


@pytest.mark.parametrize("tensors", [*lycoris(), lycoris(both=True)[1]])
def test_lycoris_to_peft_and_back(tensors, tmp_path):
    source = tmp_path / "in.safetensors"
    save_file(tensors, source)
    io.convert_adapter(source, tmp_path / "peft", to="peft")
    io.convert_adapter(tmp_path / "peft", tmp_path / "out.safetensors", to="kohya")
    same(files.read(source), files.read(tmp_path / "out.safetensors"))
    parts = files.read(source).components["unet"]
    for part in parts.values():
        np.testing.assert_allclose(norm(part), np.linalg.norm(update(part)), rtol=1e-5)
        if {"lokr_w1", "lokr_w2"} <= part.tensors.keys():
            assert part.alpha == part.rank  # LyCORIS scales two whole factors by 1
    # What PEFT makes of the folder: its own adapter, merged.
    weights = {m: jnp.zeros(update(part).shape) for m, part in parts.items()}
    io.save(
        tmp_path / "base.safetensors", {f"{m}.weight": w for m, w in weights.items()}
    )
    io.fold_adapter(
        tmp_path / "base.safetensors", tmp_path / "peft", tmp_path / "folded"
    )
    with io.open(tmp_path / "folded") as folded:
        for module, part in parts.items():
            got = folded.tensors[f"{module}.weight"].read()
            np.testing.assert_allclose(got, update(part), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="which diffusers has not"):
        io.convert_adapter(source, tmp_path / "d.safetensors", to="diffusers")


def test_a_kernel_between_the_factors_is_absorbed(tmp_path):
    """LoCon's CP form: up [m, r, 1, 1], mid [r, r, k, k], down [r, n, 1, 1]."""
    prefix = "lora_unet_mid_block_resnets_0_conv1"
    up, mid, down = normal(5, 2, 1, 1), normal(2, 2, 3, 3), normal(2, 4, 1, 1)
    parts = {"up": up, "mid": mid, "down": down}
    tensors = {f"{prefix}.lora_{n}.weight": x for n, x in parts.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    (part,) = files.read(tmp_path / "x.safetensors").components["unet"].values()
    want = np.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    np.testing.assert_allclose(update(part), want.reshape(5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_conv_in.lora_down.weight": (2, 4)}, "conv_in.* has no lora_B"),
        ({"lora_unet_conv_in.lora_down.weight": (2, 4),
          "lora_unet_conv_in.lora_up.weight": (4, 3)}, "do not fit together"),
        ({"lora_unet_strange_words.lora_down.weight": (2, 4)}, "strange_words.*words"),
        ({"lora_vae_conv_in.lora_down.weight": (2, 4)}, "begins with none of"),
        ({"lora_unet_conv_in.diff": (2, 4)}, "conv_in.diff.* no tensor of a known"),
        ({"model.weight": (2, 4)}, "model.weight.* no tensor of a known adapter"),
        ({"unet:0:down": (1, 4), "unet:0:up": (4, 1)}, "1 numbered modules"),
        ({"lora_unet_conv_in.hada_w1_a": (4, 2), "lora_unet_conv_in.hada_w1_b": (3, 4)},
         "do not fit together|has no hada"),
        ({}, "no adapters"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_are_named(tensors, message, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({n: np.zeros(shape, np.float32) for n, shape in tensors.items()}, file)
    with pytest.raises(FormatError, match=rf"{file}.*({message})"):
        files.read(file)


def test_norms_come_from_the_factors_alone():
    part = make_part(
        "LORA", {"lora_A.weight": normal(3, 40), "lora_B.weight": normal(50, 3)}, 6
    )
    np.testing.assert_allclose(norm(part), np.linalg.norm(update(part)), rtol=1e-5)


def test_the_real_files(data, tmp_path):
    """Two of Stable Diffusion 2 as arrays, one of 1.5 with its text encoder."""
    source = data / "loras" / "lora_disney.safetensors"
    found = io.inspect_adapter(source)
    assert (found.format, found.kinds) == ("cloneofsimo", ("LORA",))
    modules = [row for row in found.rows if row.kind == "LORA"]
    assert len(modules) == 192
    assert {row.rank for row in modules} == {1}
    assert sum(row.kind == "whole" for row in found.rows) == 2  # learnt words
    assert found.parameters == 386_880
    widths = {}
    for row in modules:
        for block, width in (("down_blocks.0", 320), ("mid_block", 1280)):
            if row.module.startswith(block) and row.module.endswith("attn1.to_q"):
                widths[block] = width
                assert row.parameters == 2 * width
    assert len(widths) == 2
    assert all(np.isfinite(row.norm) and row.norm > 0 for row in modules)
    for to, out in (
        ("kohya", "k.safetensors"),
        ("diffusers", "d.safetensors"),
        ("peft", "p"),
    ):
        io.convert_adapter(source, tmp_path / out, to=to)
        same(files.read(source), files.read(tmp_path / out), every=29)


def test_two_real_files_are_added(data, tmp_path):
    paths = [data / "loras" / f"lora_{name}.npz" for name in ("disney", "kiriko")]
    ranks = io.combine_adapters(paths, tmp_path / "sum", weights=[0.7, -0.4], to="peft")
    assert set(ranks.values()) == {8}
    one, two, total = (files.read(p) for p in (*paths, tmp_path / "sum"))
    (added,) = total.components.values()
    module = f"{BLOCK}.attn2.to_k"
    pair = (update(p.components["unet"][module]) for p in (one, two))
    want = sum(w * x for w, x in zip((0.7, -0.4), pair, strict=True))
    np.testing.assert_allclose(update(added[module]), want, rtol=1e-4, atol=1e-6)
