"""mergekit recipes, unchanged: the same tensors, config and tokenizer as mergekit's."""

import json
from pathlib import Path

from corpus import tiny_models
from corpus.mergekit_recipes import RECIPES
from executor import execute
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlab import io, recipe
from jaxlab.io import _layers, _node, _plan, _yaml

GOLDEN = np.load(Path(__file__).parent / "numerics" / "mergekit_folders.npz")
ABOUT = json.loads(str(GOLDEN["about"]))
TOLERANCE = 1e-5  # of the merged delta


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name in tiny_models.MODELS:
        tiny_models.write(path, name)
    return path


def plain(text):
    return _node.plain(_yaml.parse(text))


def plan_of(text, folder):
    own = recipe.convert(plain(text))
    models = {name: io.open(folder / name) for name in _plan.references(own)}
    return models, _plan.build_plan(own, models)


@pytest.mark.parametrize("name", RECIPES)
def test_same_tensors_as_mergekit(name, folder):
    models, plan = plan_of(RECIPES[name], folder)
    got = execute(plan, models)
    want = {k.partition("/")[2]: GOLDEN[k] for k in GOLDEN if k.startswith(f"{name}/")}
    assert got.keys() == want.keys()
    ours, theirs = _vocabularies(name, plan)
    like = models[plan.like].tensors
    for key, array in want.items():
        mine = got[key]
        assert mine.dtype == array.dtype, key
        assert mine.shape == array.shape, key
        a, b = mine.astype(np.float64), array.astype(np.float64)
        if ours and len(a) == len(b) and _is_vocabulary(key):
            a, b = _by_token(a, ours), _by_token(b, theirs)
        base = like[key].read().astype(np.float64) if key in like else np.zeros(1)
        delta = b - base if base.shape == b.shape and not ours else b
        scale = max(np.linalg.norm(delta), 1e-3)
        limit = TOLERANCE if array.dtype == np.float32 else 1e-3
        assert np.linalg.norm(a - b) <= limit * scale, key


def _is_vocabulary(key):
    return "embed_tokens" in key or "lm_head" in key


def _vocabularies(name, plan):
    """(ours, mergekit's) ids by token, where the recipe makes a new vocabulary."""
    theirs = ABOUT["facts"][name].get("vocabulary")
    if theirs is None or "tokenizer" not in RECIPES[name]:
        return None, None
    if "tokenizer.json" in plan.files:
        content = json.loads(plan.files["tokenizer.json"])
        ours = dict(content["model"]["vocab"])
        ours |= {t["content"]: t["id"] for t in content["added_tokens"]}
    else:
        ours = theirs
    assert ours.keys() == theirs.keys()
    return ours, theirs


def _by_token(rows, ids):
    """Rows in the order of the tokens' text, then those of the padding."""
    order = [ids[t] for t in sorted(ids)]
    return np.concatenate([rows[order], rows[len(ids) :]])


@pytest.mark.parametrize("name", RECIPES)
def test_same_config_as_mergekit(name, folder):
    models, plan = plan_of(RECIPES[name], folder)
    config = dict(models[plan.like].config)
    if "config.json" in plan.files:
        config = json.loads(plan.files["config.json"])
    theirs = ABOUT["facts"][name]["config"]
    assert config.pop("torch_dtype", "float32") == (theirs["dtype"] or "float32")
    assert config == {key: theirs.get(key, value) for key, value in config.items()}


@pytest.mark.parametrize("name", [n for n, t in RECIPES.items() if "tokenizer" in t])
def test_same_tokens_as_mergekit(name, folder):
    models, plan = plan_of(RECIPES[name], folder)
    facts = ABOUT["facts"][name]
    if "tokenizer.json" in plan.files:
        content = json.loads(plan.files["tokenizer.json"])
    else:
        path = models[plan.like].path / "tokenizer.json"
        content = json.loads(path.read_text())
    added = {t["content"]: t["special"] for t in content["added_tokens"]}
    assert added == dict(facts["added"].values())
    ids = dict(content["model"]["vocab"])
    ids |= {t["content"]: t["id"] for t in content["added_tokens"]}
    kept = models["vb" if name == "other" else plan.like]
    for token, at in kept_ids(kept).items():
        assert ids[token] == at == facts["vocabulary"][token]
    assert sorted(ids.values()) == list(range(len(ids)))


def kept_ids(model):
    content = json.loads((model.path / "tokenizer.json").read_text())
    return content["model"]["vocab"] | {
        t["content"]: t["id"] for t in content["added_tokens"]
    }


# ---------------------------------------------------------------- what is refused

GOOD = """merge_method: ties
base_model: z
models:
  - {model: a, parameters: {weight: 0.5, density: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
"""
SLICES = """merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
"""


@pytest.mark.parametrize(
    ("text", "old", "new", "says"),
    [
        (GOOD, "ties", "tie", r":1:15: no merge method 'tie'; did you mean 'ties'"),
        (GOOD, "base_model", "base_modle", ":2:1: .*'base_modle'; did you mean 'base_"),
        (GOOD, "base_model: z\n", "", "ties needs a 'base_model'"),
        (GOOD, "weight: 0.5}", "wieght: 0.5}", "'wieght'; did you mean 'weight'"),
        (GOOD, ", parameters: {weight: 0.5}}", "}", "'weight' of 'b' is required"),
        (GOOD, "0.5, density: 0.5", "0.5, density: 0", r"'density' of 'a' .*\(0, 1\]"),
        (
            GOOD,
            "0.5, density: 0.5",
            "0.5, density: -1",
            r"'density' of 'a' has to be in",
        ),
        (GOOD, "density: 0.5", "density: 0.5, gamma: 1", "no key 'gamma'"),
        (GOOD, "weight: 0.5}", "weight: no}", "finite number, got the boolean False"),
        (GOOD, "weight: 0.5}", "weight: nan}", "finite number, got 'nan'"),
        (GOOD, "model: b", "model: a", ":5:5: model 'a' is there twice"),
        (GOOD, "model: b", "model: b+lora", "LoRA adapter .* not supported yet"),
        (GOOD, "model: b", "modle: b", "no key 'modle'; did you mean 'model'"),
        (GOOD, "model: b,", "model: b, layer_range: [0, 1],", "no key 'layer_range'"),
        (GOOD, "model: b", "model: {model: b, lora: c}", "'lora' is not supported"),
        (GOOD, "model: b", "model: b@c@d", "more than one '@'"),
        (GOOD, "base_model", "slices: [1]\nbase_model", "got 'models' and 'slices'"),
        (GOOD, "base_model", "dtype: int8\nbase_model", "'dtype' is no float type"),
        (GOOD, "base_model", "tokenizer: {sauce: a}\nbase_model", "'sauce'; did you"),
        (
            GOOD,
            "base_model",
            "tokenizer: {}\ntokenizer_source: base\nbase_model",
            "exclude each other",
        ),
        (
            GOOD,
            "base_model",
            "parameters: {rescale: true}\nbase_model",
            "True is not supported for this method",
        ),
        (
            GOOD,
            "weight: 0.5}",
            "weight: [{filter: mlp}]}",
            "a case of 'weight' needs a 'value'",
        ),
        (
            GOOD,
            "weight: 0.5}",
            "weight: [{filtre: mlp, value: 1}]}",
            "'filtre'; did you mean 'filter'",
        ),
        (SLICES, "[0, 2]", "[2, 0]", r"layers \[2, 0\] are no range"),
        (SLICES, ", layer_range: [0, 2]", "", "needs a 'layer_range'"),
        (
            SLICES,
            "  - sources",
            "  - residual_weight: 0.5\n    sources",
            ":3:5: 'residual_weight' is not supported",
        ),
        (
            SLICES,
            "2]}]",
            "2]}, {model: b, layer_range: [0, 2]}]",
            "passthrough takes exactly 1 models; got 2",
        ),
        (SLICES, "passthrough", "slerp\nbase_model: z", "'z' is not among the sources"),
        (
            "merge_method: slerp\nbase_model: z\nmodels: [{model: a}, {model: b}]\n",
            "model: b",
            "model: c",
            "slerp takes exactly 2 models, the base among them; got 3",
        ),
        (GOOD, "ties", "model_stock", "no key 'weight'"),
        (
            "merge_method: model_stock\nbase_model: z\nmodels: [{model: a}]\n",
            "a",
            "a",
            "model_stock takes at least 3 models, the base among them; got 2",
        ),
    ],
)
def test_bad_recipes_are_named(text, old, new, says, tmp_path):
    assert old in text
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(io.FormatError, match=says):
        recipe.load(path)


def test_a_setting_for_some_tensors_only_is_missing_for_others(folder):
    text = GOOD.replace("weight: 0.5}", "weight: [{filter: mlp, value: 1}]}")
    with pytest.raises(ValueError, match=r"needs 'weights' of b for tensor 'lm_head"):
        plan_of(text, folder)


def test_only_the_base_is_the_base(folder):
    text = "merge_method: ties\nbase_model: z\nmodels: [{model: z}]\n"
    _, plan = plan_of(text, folder)
    assert {s.method for s in plan.steps} == {None}
    assert {s.models[0].model for s in plan.steps} == {"z"}


def test_mergekit_mask_option_is_taken_everywhere(folder):
    text = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
    _, plan = plan_of(text + "parameters: {int8_mask: true}\n", folder)
    assert len(plan.steps) == 30


def test_a_revision_and_a_model_mapping_are_one_reference():
    text = """merge_method: linear
models:
  - {model: {model: {path: org/a, revision: v1}}, parameters: {weight: 1}}
  - {model: org/b@v2, parameters: {weight: 1}}
"""
    assert _plan.references(plain(text)) == ("org/a@v1", "org/b@v2")


# ---------------------------------------------------------------- models


def _edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def pair(tmp_path):
    for name in ("z", "a", "b"):
        tiny_models.write(tmp_path, name)
    return tmp_path


LINEAR = """merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
"""


def test_integers_are_copied_where_they_agree(pair):
    ids = np.arange(4)
    for name in "ab":
        _edit(pair / name, lambda t: t.update({"model.ids": ids}))
    models, plan = plan_of(LINEAR + "dtype: bfloat16\n", pair)
    step = next(s for s in plan.steps if s.name == "model.ids")
    assert step.method is None
    assert (step.dtype, step.out_dtype) == (None, np.int64)
    np.testing.assert_array_equal(execute(plan, models)["model.ids"], ids)
    _edit(pair / "b", lambda t: t.update({"model.ids": ids.astype(np.int32)}))
    with pytest.raises(ValueError, match=r"'model.ids' is int64 in a and int32 in b"):
        plan_of(LINEAR, pair)


def test_missing_and_extra_tensors_name_both_models(pair):
    _edit(pair / "b", lambda t: t.update(extra=np.ones(2, np.float32)))
    with pytest.raises(ValueError, match="tensor 'extra' is in b but not in a"):
        plan_of(LINEAR, pair)
    _edit(pair / "a", lambda t: t.update(extra=np.ones(3, np.float32)))
    with pytest.raises(
        ValueError, match=r"'extra' has shape \(3,\) in a and \(2,\) in b"
    ):
        plan_of(LINEAR, pair)


def test_recomputed_buffers_may_be_missing(pair):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit(pair / "b", lambda t: t.update({name: np.ones(3, np.float32)}))
    _, plan = plan_of(LINEAR, pair)
    assert name not in {s.name for s in plan.steps}
    assert any("1 buffers are not in all models" in note for note in plan.notes)


def test_a_missing_layer_is_named(pair):
    def cut(tensors):
        for key in [k for k in tensors if ".layers.2." in k]:
            del tensors[key]

    _edit(pair / "b", cut)
    with pytest.raises(ValueError, match=r"b has 2 layers .* num_hidden_layers: 3"):
        plan_of(LINEAR, pair)
    _edit(pair / "b", lambda t: t.update({"model.layers.4.x.weight": t[EMBED]}))
    with pytest.raises(ValueError, match=r"layer 2 of 'model.layers' is missing"):
        plan_of(LINEAR, pair)


def test_lists_by_layer_follow_the_layers(pair):
    path = pair / "a" / "config.json"
    config = json.loads(path.read_text()) | {"layer_types": ["full", "sliding", "full"]}
    path.write_text(json.dumps(config))
    text = SLICES + "  - sources: [{model: a, layer_range: [1, 3]}]\n"
    _, plan = plan_of(text, pair)
    config = json.loads(plan.files["config.json"])
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["full", "sliding", "sliding", "full"]
    assert [s.name for s in plan.steps][1] == "model.embed_tokens.weight"


def test_mixed_dtypes_are_merged_in_the_wider(pair):
    def narrow(tensors):
        for key, value in tensors.items():
            tensors[key] = value.astype(np.float16)

    _edit(pair / "b", narrow)
    _, plan = plan_of(LINEAR, pair)
    wide = np.dtype("float32")
    assert {(s.dtype, s.out_dtype) for s in plan.steps} == {(wide, wide)}


EMBED = "model.embed_tokens.weight"
VISION = [
    EMBED,
    "model.norm.weight",
    "lm_head.weight",
    "visual.patch_embed.proj.weight",
    "visual.merger.mlp.0.weight",
    "visual.merger.mlp.2.weight",
    *(f"visual.blocks.{i}.norm1.weight" for i in range(2)),
    *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)),
]


@pytest.mark.parametrize(
    ("module", "want"),
    [
        ("text_decoder", [n for n in VISION if "visual" not in n]),
        (
            "vision_tower",
            [n for n in VISION if n.startswith(("visual.patch", "visual.bl"))],
        ),
        ("multi_modal_projector", [n for n in VISION if "merger" in n]),
        ("model.layers", [n for n in VISION if "layers" in n]),
        ("default", [n for n in VISION if "layers" not in n and "blocks" not in n]),
    ],
)
def test_modules_by_name(module, want):
    assert _layers.members(module, VISION) == want
    assert _layers.stacks(VISION) == {"visual.blocks": 2, "model.layers": 3}


def test_before_and_after_the_layers():
    before = ["model.embed_tokens.weight", "transformer.wpe.weight", "shared.weight"]
    after = ["model.norm.weight", "lm_head.weight", "embed_out.weight", "score.weight"]
    assert all(map(_layers.is_before, before))
    assert not any(map(_layers.is_before, after))


# ---------------------------------------------------------------- streamed


@pytest.mark.parametrize(
    "name", ["precedence", "stack", "tokens", "slices_slerp", "half"]
)
def test_streamed_as_in_memory(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    models, plan = plan_of(RECIPES[name], folder)
    want = execute(plan, models)
    report = io.merge(plain(RECIPES[name]), tmp_path / "out")
    assert report.notes == plan.notes
    with io.open(tmp_path / "out") as merged:
        assert merged.tensors.keys() == want.keys()
        for key, array in want.items():
            got = merged.tensors[key].read()
            assert got.dtype == array.dtype
            np.testing.assert_allclose(got, array, rtol=2e-6, atol=1e-6, err_msg=key)
        assert merged.config["num_hidden_layers"] == sum(
            k.endswith("input_layernorm.weight") for k in want
        )
