"""PEFT 0.21.2's adapters: its states, outputs and merged weights are ours, to 1e-5.

`peft_adapters.npz` has 32 configurations as PEFT holds them in memory,
`peft_folders.npz` the folders that it writes; their generators are in `make/`.
"""

import functools as ft
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save_file

from jaxlab import io, lowrank
from jaxlab.io import _peft_config as configs
from jaxlab.io._peft_kind import Layer
from jaxlab.io._peft_kinds import KINDS, METHODS

HERE = Path(__file__).parent
STATES = np.load(HERE / "peft_adapters.npz")
FILES = np.load(HERE / "peft_folders.npz")
CONFIGS = json.loads(str(STATES["about"]))["configs"]
CASES = json.loads(str(FILES["about"]))["models"]


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    b = p.get(f"{name}.bias")
    return y if b is None else y + b.reshape((1,) * (y.ndim - 1) + (-1,))


def mlp(p, x):
    return linear(p, "lin1", jax.nn.relu(linear(p, "lin0", x)))


def transformer(p, tokens):
    x = p["embed.weight"][tokens]
    for name in ("layers.0", "layers.1"):
        q, k, v = (linear(p, f"{name}.{n}", x) for n in "qkv")
        scores = jnp.einsum("bsd,btd->bst", q, k) / 8**0.5
        x = x + jax.nn.softmax(scores, -1) @ v
        up = jnp.tanh(linear(p, f"{name}.mlp.up", x))
        x = x + linear(p, f"{name}.mlp.down", up)
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    x = x * p["norm.weight"][None, None] + p["norm.bias"][None, None]
    return linear(p, "head", x)


def convolutional(p, x):
    layout = ("NCHW", "OIHW", "NCHW")
    y = jax.lax.conv_general_dilated(
        x, p["conv.weight"], (1, 1), "VALID", dimension_numbers=layout
    )
    return linear(
        p, "out", jnp.tanh(y + p["conv.bias"][None, :, None, None]).mean((2, 3))
    )


jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MODELS = {"mlp": mlp, "transformer": transformer, "convolutional": convolutional}


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def base(model):
    names = [n for n in FILES.files if n.startswith(f"base/{model}/")]
    params = {n.rpartition("/")[2]: jnp.asarray(FILES[n]) for n in names}
    return MODELS[model], params, jnp.asarray(FILES[f"x/{model}"])


def folder(path, case):
    """A folder as PEFT wrote it."""
    path.mkdir()
    (path / "adapter_config.json").write_bytes(FILES[f"{case}/config"].tobytes())
    (path / "adapter_model.safetensors").write_bytes(FILES[f"{case}/file"].tobytes())
    return path


def without_adapter_name(name):
    """PEFT's name of a parameter in a file."""
    if name.endswith(".default"):
        return name.removesuffix(".default")
    module, _, last = name.rpartition(".")
    return f"{module.removesuffix('.default')}.{last}"


def test_the_golden_values_cover_every_configuration():
    assert len(CONFIGS) == 32
    assert CONFIGS.keys() < CASES.keys()
    types = {json.loads(FILES[f"{c}/config"].tobytes())["peft_type"] for c in CONFIGS}
    assert types <= KINDS.keys()
    assert types - {"LN_TUNING"} <= METHODS.keys() <= KINDS.keys()


def golden(path, name):
    """The folder of a configuration, with the state that PEFT has in memory."""
    state = {
        without_adapter_name(n.removeprefix(f"{name}/state/")): STATES[n]
        for n in STATES.files
        if n.startswith(f"{name}/state/")
    }
    file = folder(path, name) / "adapter_model.safetensors"
    held = load(file.read_bytes())  # which of them a file has
    for tensor in held:
        found = state.get(tensor, state.get(f"{tensor}.weight"))
        assert found is not None or tensor.endswith("shira_indices"), tensor
        held[tensor] = held[tensor] if found is None else np.ascontiguousarray(found)
    save_file(held, file)
    return path


@pytest.mark.parametrize("case", CASES)
def test_state_output_merged_weights_and_back(case, tmp_path):
    """PEFT's state gives its output and merged weights, and is written as it was."""
    apply, params, x = base(CASES[case])
    theirs = (golden if case in CONFIGS else folder)(tmp_path / "theirs", case)
    adapted, state = io.peft.load(theirs, apply, params, x)

    @jit
    def run(adapted, params, state):
        folded = lowrank.fold(params, state, adapted)
        return adapted(params, state, x), apply(folded, x), folded

    *outputs, folded = run(adapted, params, state)
    for y in outputs:
        close(y, FILES[f"{case}/y"])
    if case in CONFIGS:
        close(FILES[f"{case}/y"], STATES[f"{case}/y"])
        for leaf, w in folded.items():
            close(w, STATES[f"{case}/merged/{leaf}"])
    ours = tmp_path / "ours"
    io.peft.save(ours, adapted, state, params, x, base="some/model")
    old, new = (load_file(p / "adapter_model.safetensors") for p in (theirs, ours))
    for name in old.keys() & new.keys():
        np.testing.assert_allclose(old[name], new[name], atol=1e-6)
    implied = ("randlora_A", "randlora_B")  # the model's own, again
    assert all(n.endswith(implied) for n in old.keys() - new.keys())
    texts = ((p / "adapter_config.json").read_text() for p in (theirs, ours))
    theirs, ours = map(json.loads, texts)
    assert ours["base_model_name_or_path"] == "some/model"
    assert ours.keys() == theirs.keys() - {"runtime_config"}


@pytest.mark.parametrize(
    "case", ["conv_dora", "embedding", "to_save", "bias_all", "osf"]
)
def test_checkpoints_fold_as_models_do(case, tmp_path):
    """A tensor at a time, by torch's names and layouts alone."""
    apply, params, x = base(CASES[case])
    io.save(tmp_path / "base.safetensors", params)
    theirs = folder(tmp_path / "theirs", case)
    found = io.fold_adapter(tmp_path / "base.safetensors", theirs, tmp_path / "out")
    assert set(found.errors.values()) == {0.0}
    with io.open(tmp_path / "out") as folded:
        held = {n: jnp.asarray(t.read()) for n, t in folded.tensors.items()}
    close(jit(apply)(held, x), FILES[f"{case}/y"])


def test_layers_whose_order_is_unknown_are_not_folded(tmp_path):
    """Uni-LoRA numbers its layers as the model has them, which no file says."""
    _, params, _ = base("mlp")
    io.save(tmp_path / "base.safetensors", params)
    theirs = folder(tmp_path / "theirs", "unilora")
    with pytest.raises(io.FormatError, match="the order of the layers is not known"):
        io.fold_adapter(tmp_path / "base.safetensors", theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspection_of_a_type_that_depends_on_its_base(tmp_path):
    found = io.inspect_adapter(folder(tmp_path / "theirs", "vera"))
    assert found.kinds == ("VERA",)
    rows = {row.module: row for row in found.rows}
    assert rows["lin0"].parameters == 40
    assert rows["lin0"].norm is None
    assert rows["vera_A"].kind == "whole"
    assert found.fields[""]["r"] == 8


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_is_said_by_the_adapter(name, tmp_path):
    """The fields that our adapter gives make that adapter again."""
    config, kind = configs.read(folder(tmp_path / name, name))
    peers = (("lin0", 16, 32), ("lin1", 32, 8))
    for path, n, m in peers:
        layer = Layer(path, n, m, peers)
        adapter = kind.adapter(configs.for_layer(config, path), layer)
        if adapter.matrix:
            fields = kind.fields(adapter)
            assert kind.adapter(configs.fill(kind.name, fields), layer) == adapter
            assert fields.keys() <= configs.fill(kind.name, {}).keys()
