"""Names, our own recipe form, and conversion to and from mergekit's."""

import functools as ft
from pathlib import Path

from corpus import tiny_models
from corpus.mergekit_recipes import RECIPES
from corpus.yaml_cases import CASES
from executor import execute, run
import jax
import numpy as np
import pytest
import yaml

from jaxlab import io, merge, recipe
from jaxlab.io import FormatError, _form, _plan, _yaml


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    folders = {n: tiny_models.write(path, n) for n in tiny_models.MODELS}
    opened = {n: io.open(folder) for n, folder in folders.items()}
    yield opened
    for checkpoint in opened.values():
        checkpoint.close()


def plan(own, models):
    wanted = {name: models[name] for name in _plan.references(own)}
    return _plan.build_plan(own, wanted)


def read(models, name, tensor):
    return models[name].tensors[tensor].read()


def same(a, b):
    """Are two values of a plan equal, methods by function and options?"""
    if isinstance(a, ft.partial):
        return a.func is b.func and same(a.keywords, b.keywords)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# ---------------------------------------------------------------- names


def test_names_are_the_public_methods():
    public = {f"merge.{n}" for n in vars(merge) if not n.startswith("_")}
    assert set(recipe.names()) == {n for n in public if callable(recipe.lookup(n))}
    assert "merge.ties" in recipe.names()
    assert all(not n.rpartition(".")[2].startswith("_") for n in recipe.names())


def test_resolve_binds_and_nests():
    spec = {"use": "merge.on_base", "method": {"use": "merge.ties", "density": 0.5}}
    outer = recipe.resolve(spec)
    assert outer.func is merge.on_base
    assert outer.keywords["method"].func is merge.ties
    assert recipe.resolve([1, {"a": spec}])[1]["a"].func is merge.on_base


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"use": "merge.tied"}, "no method 'merge.tied'; did you mean 'merge.ties'"),
        ({"use": "merge._ties"}, "no method"),
        ({"use": "os.getenv"}, "no method"),
        ({"use": "merge.ties", "densty": 1}, "no option 'densty'; did you mean 'den"),
        ({"use": 3}, "no method 3"),
    ],
)
def test_resolve_names_what_is_wrong(spec, says):
    with pytest.raises(ValueError, match=says):
        recipe.resolve(spec)


# ---------------------------------------------------------------- our own form


def test_every_merge_method_plans(models):
    options = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.5}, "expo": {"alpha": 0.3}}
    for name, method in recipe.names().items():
        kind = recipe.data(method)
        short = name.removeprefix("merge.")
        if kind is None or name in _form._STEPS or recipe.beyond(method):
            continue
        k = _form._PAIRS.get(name, 3)
        spec = {"use": name, "models": ["a", "b", "c"][:k], **options.get(short, {})}
        spec |= {"base": "z"} if kind == "deltas" else {}
        steps = plan(spec, models).steps
        assert len(steps) == len(models["a"].tensors)
        assert {s.base is not None for s in steps} == {kind == "deltas"}
        assert [s.name for s in steps] == list(models["a"].tensors)


@pytest.mark.parametrize(
    ("use", "needs"),
    [("fisher", "fishers"), ("adamerging", "batches, apply"), ("greedy_soup", "score")],
)
def test_a_method_that_needs_data_is_refused_by_what_it_needs(models, use, needs):
    spec = {"use": f"merge.{use}", "models": ["a", "b"], "base": "z"}
    says = f"merge.{use} needs {needs}, which a recipe cannot give"
    with pytest.raises(FormatError, match=says):
        plan(spec, models)


def test_options_by_model_path_and_depth(models):
    spec = {
        "use": "merge.linear",
        "models": ["a", "b"],
        "normalize": False,
        "weights": {
            "where": {
                "**/mlp/*proj/** | **/norm/*": [{"gradient": [0.0, 1.0]}, 0.25],
                "**/self_attn/**": {"gradient": [1.0, 0.0, 4.0]},
            },
            "else": [{"where": {"lm_head/*": 0.0}, "else": 1}, 0],
        },
    }
    steps = {s.name: s for s in plan(spec, models).steps}
    at = lambda name: steps[name].method.keywords["weights"].tolist()
    assert at("model.layers.0.mlp.up_proj.weight") == [0.0, 0.25]
    assert at("model.layers.1.mlp.up_proj.weight") == [0.5, 0.25]
    assert at("model.layers.2.mlp.up_proj.weight") == [1.0, 0.25]
    assert at("model.norm.weight") == [0.0, 0.25]
    assert at("model.layers.1.self_attn.q_proj.weight") == 0.0
    assert at("model.layers.2.self_attn.q_proj.weight") == 4.0
    assert at("lm_head.weight") == [0.0, 0.0]
    assert at("model.embed_tokens.weight") == [1.0, 0.0]


def test_equal_calls_share_one_function(models):
    steps = plan({"use": "merge.ties", "base": "z", "models": ["a", "b"]}, models).steps
    assert len({id(s.method) for s in steps if len(s.shape) == 2}) == 1


def test_a_nested_recipe_is_one_function_of_all_its_models(models):
    inner = {"use": "merge.linear", "models": ["a", "b"], "weights": [3.0, 1.0]}
    spec = {
        "use": "merge.task_arithmetic",
        "base": {"use": "merge.average", "models": ["z", "c"]},
        "models": [inner, "c", {"use": "merge.passthrough", "models": ["a"]}],
        "weights": [0.5, 0.25, 2.0],
    }
    built = plan(spec, models)
    assert built.models == ("z", "c", "a", "b")
    for step in built.steps:
        assert step.base is None
        got = run(step, models)
        a, b, c, z = (read(models, n, step.name).astype(np.float64) for n in "abcz")
        base = (z + c) / 2
        want = (
            base + 0.5 * ((3 * a + b) / 4 - base) + 0.25 * (c - base) + 2 * (a - base)
        )
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_nested_random_methods_draw_apart_and_reproducibly(models):
    dare = {"use": "merge.dare_linear", "base": "z", "models": ["a"], "density": 0.5}
    spec = {"use": "merge.linear", "models": [dare, dare], "normalize": False}
    spec["weights"] = [1.0, -1.0]
    step = plan(spec, models).steps[0]
    assert recipe.takes_key(step.method)
    first, again = run(step, models, 0), run(step, models, 0)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first).max() > 0.01  # the two draws differ
    assert not np.array_equal(first, run(step, models, 1))


def test_a_nested_stack_is_a_model(models):
    stack = {
        "use": "merge.passthrough",
        "slices": [
            {"models": [{"model": "b", "layers": [0, 2]}]},
            {"models": [{"model": "a", "layers": [2, 3]}]},
        ],
    }
    spec = {"use": "merge.linear", "models": [stack, "c"], "weights": [1.0, 0.0]}
    got = execute(plan(spec, models), models)
    name = "model.layers.{}.mlp.up_proj.weight"
    for i, source in enumerate("bba"):
        np.testing.assert_array_equal(
            got[name.format(i)], read(models, source, name.format(i))
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"densty": 0.5}, r"merge.ties has no option 'densty'; did you mean 'density'"),
        ({"density": 0}, r"'density' has to be in \(0, 1\], got 0"),
        ({"density": -0.5}, r"'density' has to be in \(0, 1\]"),
        ({"density": [0.5, 2]}, r"'density' has to be in \(0, 1\], got 2"),
        ({"weights": [1, 2, 3]}, "3 values for 2 models"),
        ({"consensus": "meen"}, "consensus must be"),
        ({"weights": "half"}, "tensor '.*' of a, b, z: .*'half'"),
        ({"weights": False}, "'weights' has to be no boolean, got the boolean False"),
        (
            {"use": "merge.dare_linear", "normalize": 1},
            "has to be true or false, got 1",
        ),
        ({"use": "merge.tie"}, "no method 'merge.tie'; did you mean 'merge.ties'"),
        ({"use": "merge.trim"}, "'merge.trim' is no merge of models by itself"),
        ({"use": "merge.slerp", "base": None}, "merge.slerp needs the option 't'"),
        ({"base": None}, "it needs a 'base'"),
        ({"models": []}, "'models' has to be a list of at least one"),
        ({"models": ["a+lora"]}, "LoRA adapter"),
        ({"models": ["a", "gz"]}, r"tensor '.*' is in a but not in gz"),
        ({"models": None, "slices": None}, "exactly one of models, slices, modules"),
        ({"weights": {"where": {"x/*": 1}}}, "no case matches"),
        ({"weights": {"else": 1}}, "needs 'where' or 'gradient'"),
        ({"weights": {"gradient": [[1]]}}, "a gradient is a list of plain values"),
        ({"dtype": "float33"}, "'dtype' is no float type; did you mean 'float32'"),
        ({"out_dtype": "int8"}, "'out_dtype' is no float type"),
        ({"like": 3}, "'like' has to be text"),
        (
            {"modules": {"text": {}}, "models": None},
            "needs either 'models' or 'slices'",
        ),
    ],
)
def test_bad_recipes_are_named(change, says, models):
    spec = {"use": "merge.ties", "base": "z", "models": ["a", "b"]} | change
    spec = {k: v for k, v in spec.items() if v is not None}
    with pytest.raises(ValueError, match=says):
        plan(spec, models)


def test_zero_weights_name_tensor_and_models(models):
    spec = {"use": "merge.linear", "models": ["a", "b"], "weights": [1.0, -1.0]}
    with pytest.raises(ValueError, match=r"tensor '.*' of a, b: weights sum to 0"):
        plan(spec, models)


def test_unknown_module_says_which_there_are(models):
    part = {"models": ["a", "b"]}
    spec = {"use": "merge.linear", "modules": {"vision": part}}
    with pytest.raises(ValueError, match=r"no module 'vision'.*default.*model\.layers"):
        plan(spec, models)


def test_ranges_beyond_the_model_are_named(models):
    slices = [{"models": [{"model": "a", "layers": [0, 4]}]}]
    with pytest.raises(ValueError, match=r"layers \[0, 4\] of a: it has 3 layers"):
        plan({"use": "merge.passthrough", "slices": slices}, models)
    two = [{"model": "a", "layers": [0, 2]}, {"model": "b", "layers": [0, 1]}]
    with pytest.raises(ValueError, match=r"as many layers of each model: a \[0, 2\]"):
        plan({"use": "merge.linear", "slices": [{"models": two}]}, models)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", CASES)
def test_yaml_corpus(name, tmp_path):
    good, data = CASES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    if good:
        assert recipe.load(path)["use"].startswith("merge.")
    else:
        with pytest.raises(io.FormatError, match=r"recipe\.yaml:\d+:\d+: "):
            recipe.load(path)


def test_exponents_and_quoted_numbers_are_numbers(tmp_path):
    for name, want in (("ok_exponent", 1e-3), ("ok_quoted_number", 0.5)):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(CASES[name][1])
        assert recipe.load(path)["weights"] == [want]


def test_load_reads_both_forms(tmp_path):
    path = tmp_path / "recipe.yaml"
    spec = {"use": "merge.ties", "base": "z", "models": ["a"], "density": 0.5}
    path.write_text(yaml.safe_dump(spec))
    assert recipe.load(path) == spec
    path.write_text(RECIPES["ties"])
    assert recipe.load(path)["use"] == "merge.ties"


def test_errors_point_at_the_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("use: merge.ties\nbase: z\nmodels: [a]\ndensity:\n  - 1.5\n")
    with pytest.raises(io.FormatError, match=r"recipe\.yaml:5:5: 'density' has to be"):
        recipe.load(path)


# ---------------------------------------------------------------- conversion


@pytest.mark.parametrize("name", RECIPES)
def test_conversion_keeps_the_plan(name, models):
    theirs = _yaml_value(RECIPES[name])
    own = recipe.convert(theirs)
    back = recipe.convert(own, to="mergekit")
    again = recipe.convert(back)
    assert recipe.convert(own) == own
    assert recipe.convert(theirs, to="mergekit") == theirs
    one, two = plan(own, models), plan(again, models)
    assert one.models == two.models or set(one.models) == set(two.models)
    for a, b in zip(one.steps, two.steps, strict=True):
        assert same(a, b), (a, b)
    assert (one.like, one.files, one.notes) == (two.like, two.files, two.notes)
    assert same(one, plan(theirs, models))


def test_our_recipe_becomes_mergekits(models):
    spec = {
        "use": "merge.ties",
        "base": "z",
        "models": ["a", "b"],
        "per": "leaf",
        "density": {"gradient": [0.2, 0.6]},
        "dtype": "float32",
    }
    back = recipe.convert(spec, to="mergekit")
    assert back == {
        "merge_method": "ties",
        "base_model": "z",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {
            "weight": 1.0,
            "density": [0.2, 0.6],
            "normalize": True,
            "lambda": 1.0,
        },
        "dtype": "float32",
    }
    one, two = execute(plan(spec, models), models), execute(plan(back, models), models)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-6, 1e-6), one, two)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "per: tree for ties, there it is always leaf"),
        ({"per": "leaf", "weights": [1, 2]}, "consensus: mean"),
        (
            {"per": "leaf", "models": [{"use": "merge.average", "models": ["a"]}]},
            "nest",
        ),
        (
            {"use": "merge.average", "base": None},
            "merge.average: it has no such method",
        ),
        ({"use": "merge.dare_linear"}, "rescale: density"),
        ({"use": "merge.linear"}, "merge.linear around a base"),
        ({"use": "merge.linear", "base": None, "like": "c"}, "like: c where"),
        (
            {"use": "merge.linear", "base": None, "weights": {"where": {"a/*": 1}}},
            "globs 'a/",
        ),
        (
            {"use": "merge.karcher", "base": None, "weights": [1, 2]},
            r"weights: \[1, 2\] for karcher",
        ),
    ],
)
def test_what_mergekit_cannot_say_is_named(change, says):
    spec = {"use": "merge.ties", "base": "z", "models": ["a", "b"]} | change
    spec = {k: v for k, v in spec.items() if v is not None}
    with pytest.raises(ValueError, match=says):
        recipe.convert(spec, to="mergekit")


def test_convert_refuses_another_form():
    with pytest.raises(ValueError, match="to must be"):
        recipe.convert({"use": "merge.average", "models": ["a"]}, to="peft")


def _yaml_value(text):
    from jaxlab.io import _node

    return _node.plain(_yaml.parse(text))


@pytest.mark.parametrize("name", ["ties", "nested"])
def test_the_examples_are_recipes(name):
    """Those of experiments/recipes, as a newcomer would copy them."""
    path = Path(__file__).parents[1] / "experiments" / "recipes" / f"{name}.yaml"
    spec = recipe.load(path)
    assert _plan.references(spec)[0] == "models/base"
