"""`jaxlab adapter`: what the commands print, write and refuse."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_cli import one_paragraph, run

from jaxlab import io, lowrank
from jaxlab.io import _adapter_file as files

SEED = 0
RNG = np.random.default_rng(SEED)
APPLY = lambda p, x: (
    jnp.tanh(x @ p["up.weight"].T) @ p["down.weight"].T + p["down.bias"][None]
)
X = jnp.ones((2, 6))


def base():
    shapes = {"up.weight": (8, 6), "down.weight": (4, 8), "down.bias": (4,)}
    return {
        n: jnp.asarray(RNG.normal(size=s).astype(np.float32)) for n, s in shapes.items()
    }


@pytest.fixture
def model(tmp_path):
    """A checkpoint folder, two adapters of it, and the first one folded in memory."""
    params = base()
    (tmp_path / "base").mkdir()
    save_file(
        {n: np.asarray(x) for n, x in params.items()},
        tmp_path / "base" / "model.safetensors",
    )
    (tmp_path / "base" / "config.json").write_text('{"torch_dtype": "float32", "a": 1}')
    for i, name in enumerate("ab"):
        adapters = {"up.weight": lowrank.lora(rank=2, alpha=3 + i)}
        adapters |= {"down.weight": lowrank.lora(rank=1 + i)}
        _, state = lowrank.attach(APPLY, params, adapters, X, key=jax.random.key(i))
        moved = {p: s | {"b": s["b"] + 0.01 * (1 + i)} for p, s in state.leaves.items()}
        state = state.replace(leaves=moved)
        adapted = lowrank.attach(APPLY, params, adapters, X, key=jax.random.key(i))[0]
        io.peft.save(tmp_path / name, adapted, state, params)
        if name == "a":
            folded = lowrank.fold(params, state)
    return tmp_path, params, folded


def tensors(path):
    with io.open(path) as checkpoint:
        return {name: t.read() for name, t in checkpoint.tensors.items()}


def test_help_names_every_command():
    text = run("adapter", "--help").output
    assert all(c in text for c in ("fold", "extract", "combine", "convert", "inspect"))


def test_inspect_prints_a_table_and_json(model):
    path, params, folded = model
    table = run("adapter", "inspect", path / "a").output
    assert "down" in table
    assert "made for the base" in table
    found = json.loads(run("adapter", "inspect", path / "a", "--json").stdout)
    rows = {row["module"]: row for row in found["rows"]}
    assert (rows["up"]["rank"], rows["up"]["alpha"], rows["up"]["scale"]) == (2, 3, 1.5)
    assert found["parameters"] == 2 * (8 + 6) + 4 + 8
    change = float(jnp.linalg.norm(folded["up.weight"] - params["up.weight"]))
    np.testing.assert_allclose(rows["up"]["norm"], change, rtol=1e-5)


def test_fold_gives_what_memory_gives_and_refuses_it_twice(model):
    path, _, folded = model
    text = run("adapter", "fold", path / "base", path / "a", path / "out").output
    assert "up.weight" in text
    got = tensors(path / "out")
    for name, x in folded.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-6, atol=1e-6)
    assert (
        path / "out" / "config.json"
    ).read_text() == '{"torch_dtype": "float32", "a": 1}'
    job = json.loads((path / "out" / "jaxlab_job.json").read_text())
    assert len(job["folded"]) == 1
    assert job["adapter"] == str(path / "a")
    again = run("adapter", "fold", path / "out", path / "a", path / "twice", code=1)
    assert "is folded into it already" in one_paragraph(again.stderr)
    save_file({n: x for n, x in got.items()}, path / "plain.safetensors")
    again = run(
        "adapter", "fold", path / "plain.safetensors", path / "a", path / "t", code=1
    )
    assert "made for another base" in one_paragraph(again.stderr)
    assert not (path / "twice").exists()
    assert not (path / "t").exists()


def test_fold_says_what_bfloat16_loses(model):
    path, params, _ = model
    low = {n: np.asarray(x).astype(ml_dtypes.bfloat16) for n, x in params.items()}
    wide = {n: x.astype(np.float32) for n, x in low.items()}
    io.save(path / "low.safetensors", low)
    adapters = {"up.weight": lowrank.lora(rank=2)}
    held = {n: jnp.asarray(x) for n, x in wide.items()}
    adapted, state = lowrank.attach(APPLY, held, adapters, X, key=jax.random.key(0))
    s = state["up.weight"]
    state = state.replace(leaves={"up.weight": s | {"b": s["b"] + 0.001}})
    io.peft.save(path / "small", adapted, state, held)
    out = run(
        "adapter", "fold", path / "low.safetensors", path / "small", path / "o"
    ).output
    assert "--dtype float32 keeps it" in out
    arguments = (path / "low.safetensors", path / "small", path / "o2", "--json")
    found = json.loads(run("adapter", "fold", *arguments).stdout)
    cast = {n: jnp.asarray(x) for n, x in low.items()}
    want = lowrank.fold_error(cast, state)["up.weight"]
    np.testing.assert_allclose(found["errors"]["up.weight"], float(want), rtol=1e-3)
    assert want > 0.02
    arguments = (path / "low.safetensors", path / "small", path / "o3")
    out = run("adapter", "fold", *arguments, "--dtype", "float32").output
    assert "keeps it" not in out
    got = tensors(path / "o3")
    assert {x.dtype for x in got.values()} == {np.dtype("float32")}
    want = lowrank.fold(held, state)["up.weight"]
    np.testing.assert_allclose(got["up.weight"], want, rtol=1e-6, atol=1e-7)


def test_an_interrupted_fold_goes_on(model, monkeypatch):
    path, _, folded = model

    def stop(*_):
        raise KeyboardInterrupt

    arguments = ("fold", path / "base", path / "a", path / "out", "--shard-size", "200")
    with monkeypatch.context() as patch:
        patch.setattr("jaxlab.io._job.index_bytes", stop)  # after the shards
        failed = run("adapter", *arguments, code=130)
    assert "--resume goes on" in one_paragraph(failed.stderr)
    assert not (path / "out").exists()
    again = run("adapter", *arguments, code=1)
    assert "unfinished run: resume it" in one_paragraph(again.stderr)
    run("adapter", *arguments, "--resume", "--quiet")
    for name, x in tensors(path / "out").items():
        np.testing.assert_allclose(x, folded[name], rtol=1e-6, atol=1e-6)


def test_fold_of_kohya_files_names_the_component(model):
    path, params, _ = model
    name = "mid_block.proj_in"
    io.save(path / "unet.safetensors", {f"{name}.weight": params["up.weight"]})
    a, b = RNG.normal(size=(2, 6)), RNG.normal(size=(8, 2))
    made = {}
    for prefix in ("lora_unet", "lora_te"):
        module = f"{prefix}_mid_block_proj_in"
        made[f"{module}.lora_down.weight"] = a.astype(np.float32)
        made[f"{module}.lora_up.weight"] = b.astype(np.float32)
        made[f"{module}.alpha"] = np.array(1, np.float32)
    save_file(made, path / "k.safetensors")
    arguments = (path / "unet.safetensors", path / "k.safetensors", path / "out")
    failed = run("adapter", "fold", *arguments, code=1)
    assert "text_encoder" in one_paragraph(failed.stderr)
    run("adapter", "fold", *arguments, "--component", "unet")
    got = tensors(path / "out")[f"{name}.weight"]
    np.testing.assert_allclose(
        got, params["up.weight"] + 0.5 * (b @ a), rtol=1e-5, atol=1e-5
    )


def test_extract_recovers_what_was_folded(model):
    path, _, folded = model
    run("adapter", "fold", path / "base", path / "a", path / "out", "--quiet")
    arguments = (path / "base", path / "out", path / "back", "--rank", 2)
    assert "energy" in run("adapter", "extract", *arguments, "--exact").output
    run("adapter", "fold", path / "base", path / "back", path / "again", "--quiet")
    got = tensors(path / "again")
    for name, x in folded.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-4, atol=1e-5)
    taken = run("adapter", "extract", *arguments, code=1)
    assert "not empty" in one_paragraph(taken.stderr)


def updates(path):
    """The update of every module, formed whole."""
    out = {}
    for module, part in files.read(path).components[""].items():
        a, b = (part.tensors[f"lora_{x}.weight"] for x in "AB")
        out[module] = part.alpha / part.rank * b @ a
    return out


def test_combine_is_exact_and_compresses(model):
    path, _, _ = model
    options = ("--weights", "0.5,-2")
    text = run(
        "adapter", "combine", path / "a", path / "b", path / "c", *options
    ).output
    assert "2 modules of rank 3 to 4" in text
    one, two, total = (updates(path / name) for name in "abc")
    for module in one:
        want = 0.5 * one[module] - 2 * two[module]
        np.testing.assert_allclose(total[module], want, rtol=1e-5, atol=1e-6)
    arguments = (path / "a", path / "b", path / "t.safetensors", "--to", "kohya")
    failed = run("adapter", "combine", *arguments, "--rank", 1, code=1)
    assert "cannot be told from its name" in one_paragraph(failed.stderr)
    assert not (path / "t.safetensors").exists()


@pytest.mark.parametrize("mode", ["ties", "magnitude_prune_svd"])
def test_combine_by_a_merge(model, mode):
    path, _, _ = model
    options = ("--mode", mode, "--rank", 2, "--quiet")
    run("adapter", "combine", path / "a", path / "b", path / "m", *options)
    found = json.loads(run("adapter", "inspect", path / "m", "--json").stdout)
    assert {row["rank"] for row in found["rows"]} == {2}
    assert all(np.isfinite(row["norm"]) for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "base"), 1, "is no tensor of a known adapter"),
        (("inspect", "nowhere"), 1, "nowhere does not exist"),
        (("convert", "a", "x.bin", "--to", "kohya"), 1, "ends in .safetensors"),
        (("convert", "a", "k.safetensors"), 2, "Missing option '--to'"),
        (("fold", "base", "a", "b"), 1, "b: the output folder is not empty"),
        (("fold", "base", "a", "o", "--component", "unet"), 0, ""),
        (("combine", "a", "b", "o", "--weights", "1"), 1, "1 weights for 2 adapters"),
        (("combine", "a", "b", "o", "--weights", "x"), 2, "no list of numbers"),
        (
            ("combine", "a", "b", "o", "--mode", "median"),
            1,
            "there is no mode 'median'",
        ),
        (
            ("combine", "a", "b", "o", "--density", "0.5"),
            1,
            "mode linear has no density",
        ),
        (("combine", "a"), 2, "give adapters and an output"),
        (("extract", "base", "base", "o", "--rank", "2"), 1, "nothing to extract"),
    ],
)
def test_wrong_usage_is_one_paragraph(model, arguments, code, message):
    path, _, _ = model
    places = {"base", "a", "b", "o", "nowhere", "x.bin", "k.safetensors"}
    found = [path / w if w in places else w for w in arguments]
    before = {p.name for p in path.iterdir()}
    result = run("adapter", *found, code=code)
    if code:
        said = " ".join(result.stderr.replace("│", " ").split())
        assert message in (one_paragraph(result.stderr) if code == 1 else said)
        assert {p.name for p in path.iterdir()} == before


def test_convert_says_what_it_did(model):
    path, _, _ = model
    made = {"unet.mid_block.proj_in.lora_A.weight": np.ones((1, 4), np.float32)}
    made |= {"unet.mid_block.proj_in.lora_B.weight": np.ones((4, 1), np.float32)}
    save_file(made, path / "d.safetensors")
    arguments = (path / "d.safetensors", path / "k.safetensors", "--to", "kohya")
    text = run("adapter", "convert", *arguments).output
    assert "1 modules, diffusers to kohya" in text
    assert "lora_unet_mid_block_proj_in.alpha" in tensors(path / "k.safetensors")
    again = run("adapter", "convert", *arguments, code=1)
    assert "k.safetensors exists" in one_paragraph(again.stderr)
