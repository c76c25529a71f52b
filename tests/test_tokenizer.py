"""Vocabularies: whose tokens, which rows, and the files that say so."""

import json

from corpus import tiny_models
from executor import execute
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from jaxlab import io
from jaxlab.io import _plan
from jaxlab.io._inputs import inputs

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path):
    for name in ("vz", "va", "vb", "vc", "z"):
        tiny_models.write(tmp_path, name)
    return tmp_path


def plan(folder, spec):
    models = {n: io.open(folder / n) for n in _plan.references(spec)}
    return models, _plan.build_plan(spec, models)


def average(*names, **more):
    return {"use": "merge.average", "models": list(names), **more}


def ids(content):
    vocab = content["model"]["vocab"]
    return vocab | {t["content"]: t["id"] for t in content["added_tokens"]}


def own_ids(folder, name):
    return ids(json.loads((folder / name / "tokenizer.json").read_text()))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rows(folder, name, tensor=EMBED):
    return load_file(folder / name / "model.safetensors")[tensor]


def test_union_by_hand(folder):
    models, built = plan(folder, average("vz", "va", "vb", tokenizer="union"))
    got, new = execute(built, models), ids(json.loads(built.files["tokenizer.json"]))
    own = {n: own_ids(folder, n) for n in ("vz", "va", "vb")}
    assert set(new) == set().union(*own.values())
    assert sorted(new.values()) == list(range(len(new)))
    for token, at in new.items():
        holders = [n for n in own if token in own[n]]
        have = {n: rows(folder, n)[own[n][token]] for n in holders}
        rest = np.mean(
            list(have.values()), 0
        )  # no base: the mean of those that have it
        want = np.mean([have.get(n, rest) for n in own], 0)
        np.testing.assert_allclose(got[EMBED][at], want, rtol=1e-6, err_msg=token)
    assert len(got[EMBED]) == len(got[HEAD]) == len(new)


def test_the_base_is_preferred_and_zero_rows_are_zero(folder):
    spec = {
        "use": "merge.task_arithmetic",
        "base": "vz",
        "models": ["va", "vc"],
        "tokenizer": {
            "source": "vb",
            "tokens": {"<new>": {"source": {"kind": "zero"}}},
        },
    }
    models, built = plan(folder, spec)
    got, new = execute(built, models), ids(json.loads(built.files["tokenizer.json"]))
    own = {n: own_ids(folder, n) for n in ("vz", "va", "vc")}
    np.testing.assert_array_equal(got[EMBED][new["<new>"]], 0)
    np.testing.assert_array_equal(got[EMBED][new["only_b"]], 0)  # in none of the inputs
    z, a = (rows(folder, n)[own[n]["w13"]] for n in ("vz", "va"))
    assert "w13" in new
    assert "w13" not in own["vc"]  # which gets the base's row: no delta
    np.testing.assert_allclose(got[EMBED][new["w13"]], a, rtol=2e-5, atol=1e-6)
    assert not np.array_equal(z, a)


def test_added_tokens_follow_the_library(folder):
    """The ids that we give are those that the tokenizers library would."""
    _, built = plan(folder, average("vz", "va", "vb", tokenizer="union"))
    ours = Tokenizer.from_str(built.files["tokenizer.json"].decode())
    theirs = Tokenizer.from_file(str(folder / "vz" / "tokenizer.json"))
    theirs.add_tokens(["only_b", "both"])
    theirs.add_special_tokens(["<a>", "<b>"])
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.encode("w3 only_b w4 <b>").ids == theirs.encode("w3 only_b w4 <b>").ids
    again = Tokenizer.from_str(ours.to_str())
    assert again.get_vocab() == ours.get_vocab()


def test_rows_beyond_the_tokens_are_the_mean(folder):
    spec = average("vz", "vb", tokenizer={"source": "base", "pad_to_multiple_of": 16})
    models, built = plan(folder, spec)
    got = execute(built, models)[EMBED]
    assert got.shape == (32, tiny_models.WIDTH)
    np.testing.assert_allclose(got[20:], [got[:20].mean(0)] * 12, rtol=1e-5)
    assert json.loads(built.files["config.json"])["vocab_size"] == 32
    assert "tokenizer.json" not in built.files  # it stays as it is


def test_a_remapped_tensor_reads_from_any_byte(folder):
    spec = average("vz", "va", "vb", tokenizer={"pad_to_multiple_of": 16})
    models, built = plan(folder, spec)
    step = next(s for s in built.steps if s.name == EMBED)
    for tensor in inputs(step, models)[0]:
        whole = tensor.read().view(np.uint8).reshape(-1)
        assert tensor.nbytes == whole.size
        for first, size in ((0, 1), (3, 50), (whole.size - 7, 7), (101, 400)):
            part = np.empty(size, np.uint8)
            tensor.read_into(part, first)
            np.testing.assert_array_equal(part, whole[first : first + size])


def test_inputs_are_cast_before_and_rounded_once(folder):
    spec = average("vz", "va", tokenizer="union", dtype="bfloat16", out_dtype="float32")
    models, built = plan(folder, spec)
    step = next(s for s in built.steps if s.name == HEAD)
    assert {t.dtype for t in inputs(step, models)[0]} == {np.dtype(ml_dtypes.bfloat16)}
    assert step.out_dtype == np.float32
    config = json.loads(built.files["config.json"])
    assert config["torch_dtype"] == "float32"


def test_unused_tokens_do_not_count(folder):
    def shrink(config):
        config["vocab_size"] = 18

    edit(folder / "vb" / "config.json", shrink)
    tensors = load_file(folder / "vb" / "model.safetensors")
    for name in (EMBED, HEAD):
        tensors[name] = tensors[name][:18]
    save_file(tensors, folder / "vb" / "model.safetensors")
    _, built = plan(folder, average("vz", "vb", tokenizer="union"))
    # "only_b" and "both" have ids 18 and 19, "<b>" 20: the model has no rows for them
    assert built.steps[0].shape[0] == 20
    assert "tokenizer.json" not in built.files


def test_a_bpe_base_is_cut_to_the_rows_of_its_model(folder):
    def bpe(content):
        vocab = {
            t: i for i, t in enumerate(["a", "b", "c", "ab", "abc", "x", "y", "z"])
        }
        merges = [["a", "b"], ["ab", "c"]]
        content["model"] = {"type": "BPE", "vocab": vocab, "merges": merges}
        flags = content["added_tokens"][0]
        content["added_tokens"] = [{**flags, "id": 8, "content": "<e>"}]

    for name in ("vz", "va"):
        edit(folder / name / "tokenizer.json", bpe)
        (folder / name / "tokenizer_config.json").unlink()
    edit(folder / "vz" / "config.json", lambda c: c.update(vocab_size=4))
    tensors = load_file(folder / "vz" / "model.safetensors")
    for name in (EMBED, HEAD):
        tensors[name] = tensors[name][:4]
    save_file(tensors, folder / "vz" / "model.safetensors")
    _, built = plan(folder, average("vz", "va", tokenizer="base"))
    content = json.loads(built.files["tokenizer.json"])
    assert content["model"]["merges"] == [["a", "b"]]
    assert ids(content) == {"a": 0, "b": 1, "c": 2, "ab": 3}


def test_tokens_declared_only_in_the_config_count(folder):
    def more(config):
        config["pad_token"] = {"content": "<pad>"}
        config["added_tokens_decoder"] = {"20": {"content": "<x>", "special": True}}

    edit(folder / "vb" / "tokenizer_config.json", more)
    _, built = plan(folder, average("vz", "vb", tokenizer="union"))
    new = ids(json.loads(built.files["tokenizer.json"]))
    assert {"<x>", "<pad>", "<b>"} <= set(new)


def test_the_added_token_files_follow(folder):
    def decoder(config):
        config["added_tokens_decoder"] = {}

    edit(folder / "vz" / "tokenizer_config.json", decoder)
    (folder / "vz" / "added_tokens.json").write_text('{"<old>": 20}')
    (folder / "vz" / "tokenizer.model").write_bytes(b"sentences")
    _, built = plan(folder, average("vz", "va", tokenizer="union"))
    config = json.loads(built.files["tokenizer_config.json"])
    entry = config["added_tokens_decoder"]["20"]
    assert (entry["content"], entry["special"]) == ("<a>", True)
    assert json.loads(built.files["added_tokens.json"]) == {"<a>": 20}
    assert built.left_out == {"tokenizer.model"}
    assert any("tokenizer.model" in note for note in built.notes)


def test_another_models_tokenizer_replaces_the_files(folder):
    (folder / "vz" / "special_tokens_map.json").write_text("{}")
    _, built = plan(folder, average("vz", "va", tokenizer="vb"))
    want = (folder / "vb" / "tokenizer.json").read_bytes()
    assert built.files["tokenizer.json"] == want
    assert built.left_out == {"special_tokens_map.json"}
    assert built.like == "vz"


def test_a_model_without_a_tokenizer_has_the_bases(folder):
    _, built = plan(folder, average("vz", "z", tokenizer="union"))
    assert any("z has no tokenizer" in note for note in built.notes)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"w1": {"source": "vc", "force": True}}, "'vc' is not among the inputs"),
        ({"only_b": {}}, "token 'only_b' is not in every model: it needs a 'source'"),
        ({"x": {"source": "va"}}, "va has no token 'x'"),
        ({"x": {"source": {"kind": "model_token", "model": "va"}}}, "one of 'token'"),
        ({"x": {"source": {"kind": "mean"}}}, "has to be zero or model_token"),
        ({"x": {"sauce": "va"}}, "no key 'sauce'; did you mean 'source'"),
        ({"x": {"force": True}}, "is forced, so it needs a 'source'"),
        (
            {"x": {"source": {"kind": "model_token", "model": "va", "token_id": 99}}},
            "va has no token 99",
        ),
    ],
)
def test_bad_token_sources_are_named(tokens, says, folder):
    spec = average("va", "vb", tokenizer={"source": "union", "tokens": tokens})
    with pytest.raises(ValueError, match=says):
        plan(folder, spec)


def test_a_tokenizer_that_cannot_be_edited_is_named(folder):
    (folder / "va" / "tokenizer.json").unlink()
    (folder / "va" / "tokenizer.model").write_bytes(b"sentences")
    with pytest.raises(io.FormatError, match=r"va: .*tokenizer\.model; vocabularies"):
        plan(folder, average("vz", "va", tokenizer="union"))


def test_a_malformed_tokenizer_is_named(folder):
    edit(folder / "va" / "tokenizer.json", lambda c: c["model"].update(vocab={"a": -1}))
    with pytest.raises(io.FormatError, match=r"tokenizer\.json: its vocabulary"):
        plan(folder, average("vz", "va", tokenizer="union"))


def test_other_vocabularies_without_a_tokenizer_say_what_to_do(folder):
    tensors = load_file(folder / "vb" / "model.safetensors")
    tensors[EMBED] = tensors[EMBED][:20]
    save_file(tensors, folder / "vb" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"has shape .* in vz .* in vb: .*tokenizer: u"
    ):
        plan(folder, average("vz", "vb"))


# ---------------------------------------------------------------- chat templates


@pytest.mark.parametrize("name", ["alpaca", "chatml", "exaone", "llama3", "mistral"])
def test_known_templates_go_into_the_config(name, folder):
    _, built = plan(folder, average("vz", "va", chat_template=name))
    config = json.loads(built.files["tokenizer_config.json"])
    assert "messages" in config["chat_template"]
    assert config["eos_token"] == "</s>"


def test_auto_takes_what_most_inputs_have(folder):
    spec = average("vz", "vb", "vc", chat_template="auto")
    _, built = plan(folder, spec)
    config = json.loads(built.files["tokenizer_config.json"])
    assert config["chat_template"] == "{{ 'two' }}"


def test_a_template_goes_where_the_donor_has_its_own(folder):
    (folder / "vz" / "chat_template.jinja").write_text("{{ 'old' }}")
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    _, built = plan(folder, average("vz", "va", chat_template=text))
    assert built.files == {"chat_template.jinja": text.encode()}


def test_bad_templates_are_named(folder):
    with pytest.raises(
        ValueError, match=r"chat_template 'chatlm' is no Jinja template"
    ):
        plan(folder, average("vz", "va", chat_template="chatlm"))
    with pytest.raises(ValueError, match=r"needs a tokenizer_config\.json"):
        plan(folder, average("z", chat_template="chatml"))
    _, built = plan(folder, average("z", chat_template="auto"))
    assert any("no input has a chat template" in n for n in built.notes)
