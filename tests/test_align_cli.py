"""`jaxlab align A B` and `align:` in recipes, on folders as they are on disk."""

import json
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_cli import one_paragraph, run
from test_nn import LLAMA, drawn, fast
import yaml

from jaxlab import io, nn, rewrite
from jaxlab.io import _job

CONFIG = LLAMA | {"num_attention_heads": 4, "head_dim": 4, "torch_dtype": "float32"}
TOKENS = jnp.asarray([[1, 5, 3, 2, 8], [4, 4, 0, 7, 6]])


def write(folder: Path, params, config=CONFIG) -> Path:
    """A model folder, with a tokenizer that goes along."""
    io.save(folder, params)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(f'{{"name": "{folder.name}"}}')
    return folder


def turned(params, config=CONFIG, seed=3):
    """The same function with its units in another order."""
    found = rewrite.symmetries(nn.from_config(config), params, *nn.inputs(config))
    moves = rewrite.random_permutations(found, key=jax.random.key(seed))
    return rewrite.permute(params, found, moves)


def logits(folder: Path):
    return fast(nn.from_config(folder))(io.load(folder), TOKENS)


def same(a, b) -> bool:
    """Equal to the bit, tensor by tensor."""
    with io.open(a) as one, io.open(b) as two:
        names = one.tensors.keys()
        assert names == two.tensors.keys()
        assert {n: t.dtype for n, t in one.tensors.items()} == {
            n: t.dtype for n, t in two.tensors.items()
        }
        read = lambda c, n: c.tensors[n].read().tobytes()
        return all(read(one, n) == read(two, n) for n in names)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model `a`, the same model `b` in another order, and an unrelated one, `c`."""
    root = tmp_path_factory.mktemp("models")
    params = drawn(CONFIG)
    write(root / "a", params)
    write(root / "b", turned(params))
    other = {k: v[::-1] + 0.25 for k, v in params.items()}
    write(root / "c", other)
    return root


@pytest.fixture
def models(made, tmp_path) -> Path:
    for name in "abc":
        shutil.copytree(made / name, tmp_path / name, copy_function=shutil.copy2)
    return tmp_path


def recipe(folder: Path, **spec) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_a_permuted_model_comes_back_to_the_bit(models):
    assert not same(models / "a", models / "b")
    text = run("align", models / "a", models / "b", "--out", models / "out").output
    assert same(models / "a", models / "out")
    assert "distance before" in text
    assert "distance after" in text
    assert "model/layers/1/mlp/down_proj/weight:1" in text
    about = (models / "out" / "tokenizer_config.json").read_text()
    assert json.loads(about) == {"name": "b"}
    assert json.loads((models / "out" / "config.json").read_text()) == CONFIG


def test_an_unrelated_model_keeps_its_function_and_comes_nearer(models):
    done = run("align", models / "a", models / "c", "--out", models / "out", "--json")
    found = json.loads(done.stdout)
    assert 0 < found["after"] < found["before"]
    assert any(0 < share <= 1 for _, _, share in found["moved"].values())
    assert len(found["moved"]) == 1 + 2 * 4
    assert found["refused"] == []
    np.testing.assert_allclose(
        logits(models / "out"), logits(models / "c"), rtol=2e-5, atol=2e-5
    )
    with io.open(models / "out") as out, io.open(models / "c") as old:
        for name, tensor in old.tensors.items():
            values = np.sort(tensor.read().ravel())
            assert np.array_equal(np.sort(out.tensors[name].read().ravel()), values)


def test_the_bits_of_any_dtype_are_moved_as_they_are(tmp_path):
    """B keeps its dtypes, whatever A has: each tensor is one of them, in turn."""
    params = drawn(CONFIG)
    kinds = (np.float16, ml_dtypes.bfloat16, np.float64)

    def cast(tree):
        values = {k: np.asarray(v) for k, v in sorted(tree.items())}
        return {k: v.astype(kinds[i % 3]) for i, (k, v) in enumerate(values.items())}

    for name, tree in (("a", params), ("b", cast(turned(params))), ("c", cast(params))):
        write(tmp_path / name, tree)
    run("align", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert same(tmp_path / "c", tmp_path / "out")


def test_a_dry_run_lists_the_groups_and_writes_nothing(models):
    text = run(
        "align", models / "a", models / "b", "--out", models / "out", "--dry-run"
    ).output
    assert "groups of units" in text
    assert "model/layers/0/self_attn/k_proj/weight:0:[2]x4" in text
    assert not (models / "out").exists()


def test_a_named_forward_aligns_what_has_no_config(tmp_path):
    net = nn.resnet(widths=(4,), blocks=1, classes=3)
    params = fast(net.init)(jax.random.key(0))
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    found = rewrite.symmetries(nn.resnet20, params, image)
    moves = rewrite.random_permutations(found, key=jax.random.key(1))
    io.save(tmp_path / "a.npz", params)
    io.save(tmp_path / "b.npz", rewrite.permute(params, found, moves))
    pair = ("align", tmp_path / "a.npz", tmp_path / "b.npz")
    image = ("--input", "float32[2,8,8,3]")
    run(*pair, "--out", tmp_path / "out", "--forward", "nn.resnet20", *image)
    assert same(tmp_path / "a.npz", tmp_path / "out")
    plan = ("--out", tmp_path / "own", "--dry-run", "--json")
    own = run(*pair, *plan, "--forward", "jaxlab.nn.resnet20", *image).stdout
    groups = {g.name.replace(".", "/"): [g.size, 1, 0.0] for g in found.groups}
    assert json.loads(own)["moved"] == groups


def test_an_interrupted_alignment_goes_on(models, monkeypatch):
    args = ("align", models / "a", models / "c", "--out", models / "out")
    small = ("--shard-size", "1kB")
    real, count = _job._shard, iter(range(100))

    def stop(*given):
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(_job, "_shard", stop)
    result = run(*args, *small, code=130)
    assert "--resume" in result.stderr
    assert not (models / "out").exists()
    assert "--resume" in one_paragraph(run(*args, *small, code=1).stderr)
    monkeypatch.setattr(_job, "_shard", real)
    other = run(*args, *small, "--resume", "--seed", 1, code=1).stderr
    assert "other inputs, recipe, seed" in one_paragraph(other)
    run(*args, *small, "--resume")
    run(*args[:3], "--out", models / "whole", *small)
    assert same(models / "out", models / "whole")
    before = (models / "out" / "jaxlab_job.json").stat().st_mtime_ns
    run(*args, *small, "--resume")
    assert (models / "out" / "jaxlab_job.json").stat().st_mtime_ns == before


def test_a_taken_target_is_refused_before_anything_is_matched(models, monkeypatch):
    monkeypatch.setattr("jaxlab.io._align.match", None)
    monkeypatch.setattr("jaxlab.io._together.match", None)
    write(models / "out", {"w": jnp.ones(1)})
    result = run("align", models / "a", models / "b", "--out", models / "out", code=1)
    assert "not empty" in one_paragraph(result.stderr)
    path = recipe(models, use="merge.average", models=["a", "b"], align=True)
    result = run("merge", path, models / "out", code=1)
    assert "not empty" in one_paragraph(result.stderr)


def broken(models: Path, change) -> tuple[object, ...]:
    return change(models) or ("align", models / "a", models / "b")


def edited(name, **changes):
    """Changes the config of a model."""

    def change(models):
        path = models / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_config(models):
    (models / "a" / "config.json").unlink()


def without_a_tensor(models):
    params = io.load(models / "b")
    del params["model"]["norm"]
    shutil.rmtree(models / "b")
    write(models / "b", params)


def wider(models):
    params = drawn(CONFIG | {"vocab_size": 10})
    shutil.rmtree(models / "b")
    write(models / "b", params)


def not_finite(models):
    params = {k: np.array(v) for k, v in drawn(CONFIG).items()}
    params["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    shutil.rmtree(models / "b")
    write(models / "b", params)


def with_options(*options):
    return lambda models: ("align", models / "a", models / "b", *options)


IMAGE = ("--input", "float32[2,8,8,3]")
BAD = {
    "no config": (without_config, "has no config.json"),
    "unknown kind": (edited("a", model_type="mamba"), "'model_type' must be one of"),
    "unknown field": (edited("a", logit_cap=3), "'logit_cap' is not known"),
    "another size": (edited("a", hidden_size=16), "the config implies"),
    "tensor missing": (without_a_tensor, "'model.norm.weight' is in"),
    "shapes differ": (wider, "has shape (10, 8)"),
    "not finite": (not_finite, "'model.layers.1.mlp.up_proj.weight': holds NaN"),
    "no function": (with_options("--forward", "nn.resnet9", *IMAGE), "no forward"),
    "no module": (with_options("--forward", "nowhere.f", *IMAGE), "no forward"),
    "no inputs": (with_options("--forward", "nn.resnet20"), "needs its inputs"),
    "inputs alone": (with_options(*IMAGE), "name it (--forward)"),
    "no input": (
        with_options("--forward", "nn.resnet20", "--input", "float[2"),
        "is no input",
    ),
    "another model": (
        with_options("--forward", "nn.resnet20", *IMAGE),
        "has no 'conv1.weight'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_and_nothing_is_written(name, models):
    change, why = BAD[name]
    command = broken(models, change)
    result = run(*command, "--out", models / "out", code=1)
    assert why in one_paragraph(result.stderr)
    assert not (models / "out").exists()
    assert not list(models.glob(".out*"))


def test_an_aligned_merge_is_the_model_and_a_plain_one_is_not(models):
    spec = {"use": "merge.linear", "models": ["a", "b"], "weights": [0.5, 0.5]}
    run("merge", recipe(models, **spec), models / "plain")
    text = run("merge", recipe(models, **spec, align=True), models / "aligned").output
    assert same(models / "a", models / "aligned")
    assert "b is aligned onto a" in text
    want = logits(models / "a")
    np.testing.assert_array_equal(logits(models / "aligned"), want)
    assert float(jnp.abs(logits(models / "plain") - want).max()) > 0.1


def test_task_vectors_are_taken_after_the_alignment(models):
    """Onto the base by default: b's task vector is then zero, and only c's is left."""
    spec = {"base": "a", "models": ["b"], "use": "merge.task_arithmetic"}
    run("merge", recipe(models, **spec, align=True), models / "out")
    assert same(models / "a", models / "out")
    spec = {"base": "a", "models": ["c"], "use": "merge.task_arithmetic"}
    onto = {"onto": "base", "method": "weight_matching", "seed": 2}
    run("merge", recipe(models, **spec, align=onto), models / "two")
    run("align", models / "a", models / "c", "--out", models / "c2", "--seed", 2)
    with io.open(models / "two") as got, io.open(models / "c2") as want:
        for name, tensor in want.tensors.items():
            np.testing.assert_allclose(
                got.tensors[name].read(), tensor.read(), rtol=1e-6, atol=1e-6
            )


def test_a_dry_run_of_an_aligned_merge_matches_nothing(models, monkeypatch):
    monkeypatch.setattr("jaxlab.io._together.match", None)
    spec = {"use": "merge.average", "models": ["a", "b"], "align": {"onto": "b"}}
    text = run("merge", recipe(models, **spec), models / "out", "--dry-run").output
    assert "a is aligned onto b first" in text


ALIGN = {
    "unknown key": ({"with": 1}, "no key 'with'"),
    "method": ({"method": "hope"}, "has to be weight_matching"),
    "seed": ({"seed": -1}, "'seed' has to be at least 0"),
    "onto": ({"onto": "d"}, "none of ['a', 'b']"),
    "no base": ({"onto": "base"}, "onto: base is no model"),
    "forward alone": ({"forward": "nn.resnet20"}, "go together"),
    "someone's code": (
        {"forward": "os.system", "inputs": ["float32[1]"]},
        "a forward of nn alone",
    ),
}


@pytest.mark.parametrize("name", ALIGN)
def test_a_recipe_that_aligns_wrongly_is_one_error(name, models):
    align, why = ALIGN[name]
    spec = {"use": "merge.average", "models": ["a", "b"], "align": align}
    result = run("merge", recipe(models, **spec), models / "out", code=1)
    assert why in one_paragraph(result.stderr)
    assert not (models / "out").exists()


def test_align_belongs_to_the_outermost_recipe_and_not_to_mergekit(models):
    inner = {"use": "merge.average", "models": ["a", "b"], "align": True}
    outer = {"use": "merge.average", "models": [inner, "c"]}
    result = run("merge", recipe(models, **outer), models / "out", code=1)
    assert "belongs to the outermost recipe" in one_paragraph(result.stderr)
    path = recipe(models, use="merge.linear", models=["a", "b"], align=True)
    result = run("recipe", "convert", path, code=1)
    assert "mergekit cannot say that models are aligned" in one_paragraph(result.stderr)


def test_an_interrupted_aligned_merge_goes_on(models, monkeypatch):
    spec = {"use": "merge.linear", "models": ["a", "c"], "align": True}
    args = ("merge", recipe(models, **spec), models / "out", "--shard-size", "1kB")
    real, count = _job._shard, iter(range(100))
    stop = lambda *given: real(*given) if next(count) < 3 else 1 / 0
    monkeypatch.setattr(_job, "_shard", stop)
    run(*args, code=1)
    monkeypatch.setattr(_job, "_shard", real)
    run(*args, "--resume")
    run(*args[:2], models / "whole", *args[3:])
    assert same(models / "out", models / "whole")
