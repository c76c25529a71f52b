"""PEFT folders on trees of every kind, and every way in which one may be wrong."""

import functools as ft
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlab import io, lowrank
from jaxlab.io import FormatError, _peft_config as configs

KEY = jax.random.key(0)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LORA = lowrank.lora(rank=2, alpha=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def torch_params():
    """A state dict: a convolution, two blocks, a norm and a head."""
    rng = np.random.default_rng(1)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32) / 2)
    params = {"conv.weight": leaf(8, 3, 3, 2), "conv.bias": leaf(8)}
    for i in (0, 1):
        params |= {f"layers.{i}.q.weight": leaf(8, 8), f"layers.{i}.q.bias": leaf(8)}
    params |= {"norm.weight": leaf(8), "head.weight": leaf(5, 8), "head.bias": leaf(5)}
    return params


def torch_apply(p, x):
    """Convolution in torch's layout, weights [out, in]."""
    layout = ("NCHW", "OIHW", "NCHW")
    y = jax.lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2),
        p["conv.weight"],
        (1, 1),
        "VALID",
        dimension_numbers=layout,
    )
    y = jnp.tanh(y.mean((2, 3)) + p["conv.bias"][None])
    for i in (0, 1):
        w, b = p[f"layers.{i}.q.weight"], p[f"layers.{i}.q.bias"]
        y = jnp.tanh(y @ w.T + b[None])
    return (y * p["norm.weight"][None]) @ p["head.weight"].T + p["head.bias"][None]


def flax_params(p):
    """The same weights: HWIO, [in, out], by head, both blocks in one leaf."""
    q = [p[f"layers.{i}.q.weight"].T.reshape(8, 2, 4) for i in (0, 1)]
    b = [p[f"layers.{i}.q.bias"].reshape(2, 4) for i in (0, 1)]
    conv = {"kernel": p["conv.weight"].transpose(2, 3, 1, 0), "bias": p["conv.bias"]}
    blocks = {"q": {"kernel": jnp.stack(q), "bias": jnp.stack(b)}}
    head = {"kernel": p["head.weight"].T, "bias": p["head.bias"]}
    norm = {"scale": p["norm.weight"]}
    return {"blocks": blocks, "conv": conv, "head": head, "norm": norm}


def flax_apply(p, x):
    layout = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=layout
    )
    y = jnp.tanh(y.mean((1, 2)) + p["conv"]["bias"][None])

    def block(y, q):
        h = jnp.einsum("bd,dhk->bhk", y, q["kernel"]) + q["bias"][None]
        return jnp.tanh(h).reshape(y.shape), None

    y = jax.lax.scan(block, y, p["blocks"]["q"])[0]
    y = y * p["norm"]["scale"][None]
    return y @ p["head"]["kernel"] + p["head"]["bias"][None]


STACKED = {"blocks/q/kernel": "layers.{}.q", "blocks/q/bias": "layers.{}.q"}


def tuned(params, apply, adapters, **options):
    """Adapters off their start."""
    adapted, state = lowrank.attach(apply, params, adapters, X, key=KEY, **options)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    draw = lambda x, k: np.asarray(jax.random.normal(k, x.shape, x.dtype))
    moved = [jnp.asarray(np.asarray(x) + 0.3 * draw(x, k)) for x, k in pairs]
    return adapted, jax.tree.unflatten(tree, moved)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder written from the state dict; never changed."""
    path, params = tmp_path_factory.mktemp("peft") / "adapter", torch_params()
    adapters = {n: LORA for n in ("conv.weight", "layers.0.q.weight")}
    adapters |= {"layers.1.q.weight": lowrank.lora(rank=2, alpha=3)}
    adapters |= {"head.weight": lowrank.full(), "norm.weight": lowrank.full()}
    adapted, state = tuned(params, torch_apply, adapters, dropout=0.25)
    io.peft.save(path, adapted, state, params, X)
    return path, jit(adapted)(params, state, X)


@pytest.fixture
def broken(written, tmp_path):
    """A copy to be broken: `(path, tensors, config)`."""
    path = tmp_path / "adapter"
    shutil.copytree(written[0], path)
    config = json.loads((path / CONFIG).read_text())
    return path, load_file(path / WEIGHTS), config


def reload(path, params=None):
    return io.peft.load(path, torch_apply, params or torch_params(), X)


def test_one_folder_on_two_trees_of_the_same_weights(written, tmp_path):
    """Other layouts, layers stacked in a scan, projections by head: one function."""
    path, y = written
    params = flax_params(torch_params())
    adapted, state = io.peft.load(path, flax_apply, params, X, names=STACKED)
    assert state["blocks/q/kernel"]["a"].shape == (2, 8, 2)
    assert adapted.dropout == 0.25
    got = jit(adapted)(params, state, X)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)
    io.peft.save(tmp_path / "again", adapted, state, params, X, names=STACKED)
    old, new = load_file(path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert old.keys() == new.keys()
    for name in old:
        np.testing.assert_array_equal(old[name], new[name])
    assert (path / CONFIG).read_text() == (tmp_path / "again" / CONFIG).read_text()
    by_function = lambda leaf: STACKED.get(leaf)
    _, again = io.peft.load(path, flax_apply, params, X, names=by_function)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_what_is_written_is_what_peft_has(written):
    tensors = load_file(written[0] / WEIGHTS)
    shapes = {n.removeprefix("base_model.model."): x.shape for n, x in tensors.items()}
    assert shapes["conv.lora_A.weight"] == (2, 3, 3, 2)
    assert shapes["conv.lora_B.weight"] == (8, 2, 1, 1)
    assert shapes["layers.1.q.lora_A.weight"] == (2, 8)
    assert shapes["head.weight"] == (5, 8)
    assert shapes["head.bias"] == (5,)  # PEFT stores modules whole
    config = json.loads((written[0] / CONFIG).read_text())
    assert config["modules_to_save"] == ["head", "norm"]
    assert config["target_modules"] == ["conv", "layers.0.q", "layers.1.q"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.25)


def test_options_by_layer_become_patterns(tmp_path):
    params = torch_params() | {"other.layers.0.q.weight": jnp.eye(8)}
    apply = lambda p, x: torch_apply(p, x) @ p["other.layers.0.q.weight"][:5]
    adapters = {"layers.0.q.weight": lowrank.lora(rank=3, alpha=5)}
    adapters |= {n: LORA for n in ("layers.1.q.weight", "head.weight")}
    adapted, state = tuned(params, apply, adapters)
    io.peft.save(tmp_path / "out", adapted, state, params)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == 2
    assert config["rank_pattern"] == {r"^layers\.0\.q$": 3}
    assert config["alpha_pattern"] == {r"^layers\.0\.q$": 5}
    # A list would choose other.layers.0.q, too: it ends in layers.0.q.
    chosen = [n for n in ("layers.0.q", "other.layers.0.q", "head", "conv")
              if configs.targeted(config, n)]  # fmt: skip
    assert chosen == ["layers.0.q", "head"]
    again, read = io.peft.load(tmp_path / "out", apply, params, X)
    pair = (jit(f)(params, s, X) for f, s in ((adapted, state), (again, read)))
    np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-5)


def test_which_modules_a_config_chooses():
    """As PEFT does: ends of names, a full regex, exclusions, layers by number."""
    names = ["layers.0.q", "layers.1.q", "layers.11.q", "layers.1.k", "norm.q", "bq"]

    def chosen(head="", **fields):
        config = configs.fill("LORA", fields)
        return [n for n in names if configs.targeted(config, head + n)]

    assert chosen(target_modules=["q"]) == [n for n in names if n.endswith(".q")]
    assert chosen(target_modules=r".*\.1\.q") == ["layers.1.q"]
    assert chosen(target_modules=["layers.1.q"]) == ["layers.1.q"]
    assert chosen(target_modules=["q"], layers_to_transform=1) == []
    first = {"target_modules": ["q"], "layers_to_transform": 1}
    assert chosen("model.", **first) == ["layers.1.q"]
    numbered = {"layers_to_transform": [0, 11], "layers_pattern": ["blocks", "layers"]}
    assert chosen(target_modules=["q"], **numbered) == ["layers.0.q", "layers.11.q"]
    less = {"exclude_modules": ["1.q"], "modules_to_save": ["norm"]}
    assert chosen(target_modules=["q"], **less) == ["layers.0.q", "layers.11.q"]
    patterns = {"rank_pattern": {"k": 3, r"layers\.\d+\.q": 5}}
    layer = lambda n: configs.for_layer(configs.fill("LORA", patterns), n)["r"]
    assert [layer(n) for n in names] == [5, 5, 5, 3, 8, 8]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "NEW", "peft_type 'NEW' is none of .*LORA"),
        ("use_qalora", True, "field 'use_qalora': True is not implemented"),
        ("layer_replication", [[0, 2]], "field 'layer_replication'"),
        ("from_the_future", 3, "no such field of LORA"),
        ("init_lora_weights", "loftq", "conv.*init_lora_weights='loftq'"),
        ("target_modules", ["q"], "lora_A.weight.*does not choose 'conv'"),
        ("target_modules", ["q", "conv", "head"], None),
        ("target_modules", ".*(q|conv)", None),
        ("modules_to_save", ["head"], "norm.weight.*'modules_to_save'"),
        ("rank_pattern", {"conv": 1}, "conv.*shape .18, 2., expected .18, 1."),
        ("from_the_past", None, None),
    ],
)
def test_fields(broken, field, value, message):
    """What is not implemented is named; what changes nothing is read."""
    path, _, config = broken
    (path / CONFIG).write_text(json.dumps(config | {field: value}))
    if message is None:
        reload(path)
        return
    with pytest.raises(FormatError, match=rf"(?s){path}.*{message}"):
        reload(path)


LAYER, QUERY = "base_model.model.layers.0.q.", "layers.0.q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}lora_B.weight"), "layers.0.q.*lora_B"),
        (lambda t: [t.pop(f"{LAYER}lora_{n}.weight") for n in "AB"], "no tensors for"),
        (lambda t: t.update({f"{LAYER}lora_C": np.ones(2, "f4")}), "lora_C"),
        (lambda t: t.update({"lm.weight": np.ones(2, "f4")}), "'lm.weight': is none"),
        (lambda t: t.update({"base_model.model.z.lora_A.weight": np.ones(2, "f4")}),
         "z.lora_A.* no such module.*names="),
        (lambda t: t.update({f"{LAYER}lora_A.weight": np.ones((2, 9), "f4")}),
         r"layers.0.q.*\(9, 2\).*\[8, 8\]"),
        (lambda t: t.update({"base_model.model.head.weight": np.ones((5, 9), "f4")}),
         r"head.weight.*\(5, 9\), expected \(5, 8\)"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(broken, change, message):
    path, tensors, _ = broken
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    with pytest.raises(FormatError, match=rf"(?s){path}.*{message}"):
        reload(path)


def test_files_that_are_missing_or_damaged(broken):
    path, tensors, _ = broken
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:-9])
    with pytest.raises(FormatError, match=WEIGHTS):
        reload(path)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model.bin is refused: unpickling"):
        reload(path)
    save_file({}, path / WEIGHTS)
    with pytest.raises(FormatError, match="no tensors for"):
        reload(path)
    (path / CONFIG).write_text("{")
    with pytest.raises(FormatError, match=rf"{CONFIG}.*not JSON"):
        reload(path)
    (path / CONFIG).unlink()
    with pytest.raises(FormatError, match=rf"{CONFIG}.*is missing"):
        reload(path)
    assert tensors


def test_another_base_is_refused(written, tmp_path):
    path, _ = written
    params = torch_params()
    other = params | {"layers.0.q.weight": params["layers.0.q.weight"] + 1e-3}
    with pytest.raises(ValueError, match=r"made for another base.*fingerprint"):
        reload(path, other)
    adapted, state = reload(path)
    folded = lowrank.fold(params, state)
    with pytest.raises(ValueError, match="folded into this one already"):
        reload(path, folded)
    with pytest.raises(ValueError, match="not those the adapter was made for"):
        io.peft.save(tmp_path / "new", adapted, state, other, X)
    untold = params | {"layers.0.q.bias": params["layers.0.q.bias"] + 1}
    reload(path, untold)  # no leaf that is adapted


def test_leaves_that_cannot_be_told_apart(written):
    path, _ = written
    params = flax_params(torch_params())
    with pytest.raises(FormatError, match=r"layers.0.q.*no such module.*names="):
        io.peft.load(path, flax_apply, params, X)
    twice = {"conv/kernel": "head", **STACKED}
    with pytest.raises(ValueError, match=r"both are the weight of 'head'"):
        io.peft.load(path, flax_apply, params, X, names=twice)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"head.weight": LORA, "conv.weight": lowrank.hira(rank=1)},
         "'conv.weight' is of PEFT's type HIRA, 'head.weight' of LORA"),
        ({"head.weight": lowrank.sara(density=0.5)}, "sara, which is no type"),
        ({"head.weight": lowrank.hira(rank=1), QUERY: lowrank.hira(rank=2)}, None),
        ({"head.weight": lowrank.miss(rank=1), QUERY: lowrank.miss(rank=2)},
         "has r=., unlike other layers, and PEFT's MISS has one for all"),
        ({"conv.weight": lowrank.hira(rank=1)}, "HIRA of a convolution"),
        ({QUERY: LORA, "head.weight": lowrank.full()}, "needs the inputs"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_named(tmp_path, adapters, message):
    params = torch_params()
    adapted, state = tuned(params, torch_apply, adapters)
    if message is None:
        io.peft.save(tmp_path / "out", adapted, state, params)
        return
    with pytest.raises(ValueError, match=message):
        io.peft.save(tmp_path / "out", adapted, state, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_whole_or_not_there(written, tmp_path):
    _, y = written
    adapted, state = reload(written[0])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("keep")
    with pytest.raises(OSError, match="not empty"):
        io.peft.save(tmp_path / "taken", adapted, state, torch_params(), X)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine"]
    assert np.isfinite(y).all()
