"""Adapters from two models, in memory and from files."""

from contextlib import contextmanager
import functools as ft
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import io, lowrank, rewrite
from jaxlab.io import peft
from jaxlab.io._extract import _TABLE
from jaxlab.lowrank._randomized import exact_svd, random_matrix, randomized_svd

KEY = jax.random.key(0)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape, scale=1.0):
    return (scale * np.random.default_rng(shape).normal(size=shape)).astype(np.float32)


def low(n, m, rank):
    """A matrix of known rank, and of spectrum 1, 1/2, 1/3..."""
    u, v = (np.linalg.qr(normal(s, rank))[0] for s in (n, m))
    return (u / np.arange(1, rank + 1)) @ v.T


def close(a, b, tolerance=1e-5):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# A dense layer, heads, layers of a scan, biases, a norm: nothing special is known.
BASE = {
    "dense": {"kernel": normal(60, 50), "bias": normal(50)},
    "heads": normal(50, 3, 4),
    "layers": normal(3, 12, 12),
    "scale": np.ones(12, np.float32),
    "steps": np.arange(3),
}


def model(params, x):
    x = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    x = jnp.einsum("bn,nhk->bhk", x, params["heads"]).reshape(len(x), 12)
    x = x * params["scale"][None]
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]


def trained():
    """The base with changes of rank 3, 2 and 2, and of what is no matrix."""
    tuned = jax.tree.map(np.copy, BASE)
    tuned["dense"]["kernel"] += low(60, 50, 3)
    tuned["heads"] += low(50, 12, 2).reshape(50, 3, 4)
    tuned["layers"] += np.stack([low(12, 12, 2), 0 * low(12, 12, 2), low(12, 12, 1)])
    tuned["dense"]["bias"] += 1
    tuned["scale"] *= 2
    return tuned


@pytest.mark.parametrize("exact", [True, False])
def test_a_change_of_known_rank_is_recovered_on_any_leaf(exact):
    tuned, x = trained(), normal(4, 60)
    uses = rewrite.uses(model, BASE, x)
    options = {"energy": 0.999, "oversample": 8, "exact": exact, "key": KEY}
    got = lowrank.extract(BASE, tuned, uses, **options)
    ranks = {p: s["a"].shape[-1] for p, s in got.state.leaves.items() if "a" in s}
    assert ranks == {"dense/kernel": 3, "heads": 2, "layers": 2}
    assert got.energy.keys() == ranks.keys()
    assert got.skipped == ()
    assert min(got.energy.values()) > 0.9999
    jax.tree.map(
        ft.partial(close, tolerance=3e-5), jit(lowrank.fold)(BASE, got.state), tuned
    )
    few = lowrank.extract(BASE, tuned, uses, rank=1, exact=True, rest="skip")
    assert isinstance(few, lowrank.Extracted)
    assert few.skipped == ("dense/bias", "scale")
    close(few.energy["dense/kernel"], 36 / 49)  # 1 of 1 + 1/4 + 1/9


def test_the_adapters_run_in_the_model():
    tuned, x = trained(), normal(4, 60)
    uses = rewrite.uses(model, BASE, x)
    got = lowrank.extract(BASE, tuned, uses, energy=0.9999, exact=True)
    adapters = {p.path: p.adapter for p in got.state.spec.places}
    adapted, _ = lowrank.attach(model, BASE, adapters, x, key=KEY)
    close(jit(adapted)(BASE, got.state, x), jit(model)(tuned, x), 1e-4)


def test_what_two_trainings_changed_adds_up():
    """Extracted, added and folded, whole leaves too: task arithmetic of the models."""
    base = {"w": normal(9, 7), "norm": normal(7), "steps": np.arange(3)}
    first = base | {"w": base["w"] + low(9, 7, 2), "norm": base["norm"] + 1}
    second = base | {"w": base["w"] - low(9, 7, 1), "norm": base["norm"] * 2}
    run = ft.partial(lowrank.extract, base, energy=0.9999, exact=True)
    states = [run(tuned).state for tuned in (first, second)]
    total = lowrank.linear(lowrank.factors(states, base), weights=jnp.array([1, 0.5]))
    folded = lowrank.fold(base, lowrank.from_factors(total, states, base))
    for path in ("w", "norm"):
        step = (first[path] - base[path]) + 0.5 * (second[path] - base[path])
        close(folded[path], base[path] + step, 2e-6)
    np.testing.assert_array_equal(folded["steps"], base["steps"])
    other = jax.tree.map(lambda x: x + 1, base)
    with pytest.raises(ValueError, match="other bases"):
        lowrank.factors(
            [states[0], lowrank.extract(other, base, rank=1, key=KEY).state]
        )


def test_each_matrix_of_a_leaf_is_decomposed_by_itself():
    """Experts of other ranks share the largest; the energy is that of all of them."""
    use = rewrite.Use("e", "dot_general", (), (0,), (1,), (2,), (2, 9, 8))
    d = np.stack([low(9, 8, 3), 10 * low(9, 8, 1)])
    base, tuned = {"e": np.zeros((2, 9, 8), np.float32)}, {"e": d}
    run = ft.partial(lowrank.extract, base, tuned, {"e": (use,)}, exact=True)
    got = run(energy=0.9)
    assert got.state["e"]["a"].shape == (2, 9, 2)  # 1 + 1/4 of 49/36 is 92 %
    close(got.energy["e"], (1 + 1 / 4 + 100) / (49 / 36 + 100))
    close(run(rank=1).energy["e"], 101 / (49 / 36 + 100))
    close(jit(lowrank.fold)(base, run(rank=3).state)["e"], d)
    turned = use._replace(contracted=(2,), free=(1,))
    back = lowrank.extract(base, tuned, {"e": (turned,)}, rank=3, exact=True)
    assert back.state["e"]["a"].shape == (2, 8, 3)
    close(jit(lowrank.fold)(base, back.state)["e"], d)


def test_state_dicts_are_matrices_as_they_are_and_bfloat16_is_subtracted_wide():
    base = {"a.weight": normal(20, 30).astype(jnp.bfloat16), "a.bias": normal(20)}
    step = 2.0**-9 * np.sign(low(20, 30, 1)).astype(np.float32)
    fine = base["a.weight"].astype(np.float32) + step
    tuned = base | {"a.weight": fine}
    got = lowrank.extract(base, tuned, rank=1, exact=True)
    close(got.state["a.weight"]["a"] @ got.state["a.weight"]["b"], step, 1e-4)
    assert got.state["a.weight"]["a"].dtype == jnp.float32
    rounded = {"a.weight": fine.astype(jnp.bfloat16)} | {"a.bias": base["a.bias"]}
    again = lowrank.extract(base, rounded, rank=20, exact=True)
    folded = lowrank.fold(base, again.state)
    np.testing.assert_array_equal(folded["a.weight"], rounded["a.weight"])


def test_the_sketch_is_near_the_optimum_and_power_helps():
    """Against the exact truncation, on spectra that fall and that are flat."""
    u, v = (np.linalg.qr(normal(s, 150))[0] for s in (200, 150))
    k = np.arange(1, 151.0)
    for spectrum, limits in ((k**-0.75, (1.05, 1.001)), (1 - k / 200, (1.01, 1.005))):
        d = ((u * spectrum) @ v.T).astype(np.float32)
        s = np.linalg.svd(d, compute_uv=False)
        best = np.sqrt(np.sum(s[8:] ** 2))
        omega = random_matrix(KEY, 150, 24)
        errors = []
        for power in (0, 1, 3):
            found = jit(randomized_svd, static_argnums=2)(d, omega, power)
            left, sigma, right = map(np.asarray, found)
            close(left.T @ left, np.eye(24), 1e-5)
            low_rank = (left[:, :8] * sigma[:8]) @ right[:8]
            errors.append(float(np.linalg.norm(d - low_rank) / best))
        assert errors[0] > errors[1] > errors[2] > 1 - 1e-5
        assert errors[0] > limits[0]
        assert errors[2] < limits[1]
    close(exact_svd(d)[1], s)


def test_bad_input():
    base = {"w": normal(6, 5), "b": normal(5)}
    tuned = jax.tree.map(lambda x: x + 1, base)
    run = ft.partial(lowrank.extract, base, tuned)
    for limits in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(ValueError, match="one of rank and energy"):
            run(**limits, key=KEY)
    with pytest.raises(ValueError, match="'w': rank 6 is not from 1 to"):
        run(rank=6, exact=True)
    with pytest.raises(ValueError, match="energy must be in"):
        run(energy=1.5, exact=True)
    with pytest.raises(ValueError, match="'w': a random sketch needs key="):
        run(rank=1, oversample=0)
    with pytest.raises(ValueError, match="no leaf differs"):
        lowrank.extract({"w": base["w"] * 0}, {"w": base["w"] * -0.0}, rank=1, key=KEY)
    with pytest.raises(ValueError, match="tuned lacks 'b'"):
        lowrank.extract(base, {"w": base["w"]}, rank=1, key=KEY)
    with pytest.raises(ValueError, match=r"'w': shape \(5, 5\) in tuned"):
        lowrank.extract(base, tuned | {"w": normal(5, 5)}, rank=1, key=KEY)
    with pytest.raises(ValueError, match="'w': a model holds NaN or infinity"):
        lowrank.extract(base, tuned | {"w": tuned["w"] * np.nan}, rank=1, key=KEY)


def torch_model(params, x):
    x = params["embed_tokens"]["weight"][x]
    for layer in ("0", "1"):
        w = params["layers"][layer]
        x = jnp.tanh(x @ w["up"]["weight"].T + w["up"]["bias"][None])
        x = x @ w["down"]["weight"].T * params["norm"]["weight"][None]
    return x @ params["lm_head"]["weight"].T


def checkpoints(folder):
    """Two folders, bfloat16: changes of rank 2, a bias, a norm, an embedding row."""
    base = {"embed_tokens": {"weight": normal(11, 8)}, "norm": {"weight": normal(8)}}
    base["layers"] = {
        str(i): {
            "up": {"weight": normal(10, 8, scale=1 + i), "bias": normal(10)},
            "down": {"weight": normal(8, 10, scale=1 + i)},
        }
        for i in range(2)
    }
    base["lm_head"] = {"weight": normal(11, 8)}
    tuned = jax.tree.map(np.copy, base)
    for i, layer in enumerate(tuned["layers"].values()):
        layer["up"]["weight"] += low(10, 8, 2 + i)
        layer["down"]["weight"] += low(8, 10, 1)
    tuned["layers"]["1"]["up"]["bias"] += 1
    tuned["norm"]["weight"] *= 2
    tuned["embed_tokens"]["weight"][3] += 1
    paths = folder / "base", folder / "tuned"
    for path, tree in zip(paths, (base, tuned), strict=True):
        path.mkdir()
        io.save(path / "model.safetensors", tree)
    return *paths, base, tuned


def test_files_give_what_memory_gives_and_peft_reads_it(tmp_path):
    old, new, base, tuned = checkpoints(tmp_path)
    done = io.extract(old, new, tmp_path / "out", energy=0.9999)
    assert done.ranks == {
        "layers.0.down.weight": 1, "layers.0.up.weight": 2,
        "layers.1.down.weight": 1, "layers.1.up.weight": 3,
    }  # fmt: skip
    kept = ("embed_tokens.weight", "layers.1.up.bias", "norm.weight")
    assert tuple(sorted(done.whole)) == kept
    assert done.skipped == ()
    names = {"energy": 0.9999, "rest": "skip", "key": jax.random.key(0)}
    want = lowrank.extract(base, tuned, **names)
    with io.open(tmp_path / "out") as held:
        read = {name: t.read() for name, t in held.tensors.items()}
    for name, rank in done.ranks.items():
        module = "base_model.model." + name.removesuffix(".weight")
        s = want.state[name.replace(".", "/")]
        np.testing.assert_array_equal(read[f"{module}.lora_B.weight"], s["a"])
        np.testing.assert_array_equal(read[f"{module}.lora_A.weight"], s["b"])
        assert s["a"].shape[1] == rank
    x = np.arange(5)
    loaded = peft.load(tmp_path / "out", torch_model, base, x)
    close(jit(loaded[0])(base, loaded[1], x), torch_model(tuned, x), 1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "lora_only"
    assert config["modules_to_save"] == ["embed_tokens", "norm"]


@pytest.mark.parametrize(
    ("module", "table"),
    [
        ("model.embed_tokens", True),
        ("transformer.wte", True),
        ("encoder.embeddings.word_embeddings", True),
        ("shared", True),
        ("model.layers.0.mlp.shared_expert.up_proj", False),
        ("lm_head", False),
        ("model.layers.0.self_attn.q_proj", False),
        ("vision.patch_embed.proj", True),
    ],
)
def test_tables_are_no_linear_layers(module, table):
    assert bool(_TABLE.search(module)) == table


def test_a_predicate_and_a_bar(tmp_path):
    old, new, *_ = checkpoints(tmp_path)
    seen = []

    @contextmanager
    def bar(what, total):
        yield lambda n: seen.append((what, total, n))

    chosen = lambda path, tensor: path.startswith("layers/0") and tensor.ndim == 2
    options = {"rank": 1, "exact": True, "where": chosen, "progress": bar}
    done = io.extract(old, new, tmp_path / "few", **options)
    assert set(done.ranks) == {"layers.0.up.weight", "layers.0.down.weight"}
    assert "norm.weight" in done.skipped
    assert done.whole == ()
    assert 0.5 < done.energy["layers.0.up.weight"] < 0.9  # 1 of 1 + 1/4
    assert sum(n for *_, n in seen) == seen[0][1]
    assert seen[0][0] == "extracting few"


def test_files_choose_skip_and_refuse(tmp_path):
    old, new, _, tuned = checkpoints(tmp_path)
    run = ft.partial(io.extract, old, new)
    done = run(tmp_path / "up", rank=2, where="**/up/*", rest="skip", exact=True)
    assert list(done.ranks.values()) == [2, 2]
    assert set(done.skipped) >= {"layers.0.down.weight", "layers.1.up.bias"}
    config = json.loads((tmp_path / "up" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.0.up", "layers.1.up"]
    with pytest.raises(ValueError, match=r"'layers.0.*': rank 9 is not from 1 to"):
        run(tmp_path / "out", rank=9)
    with pytest.raises(ValueError, match="nothing to extract"):
        io.extract(old, old, tmp_path / "out", rank=1)
    for leaf, match in (
        (normal(10, 7), r"'layers.0.up.weight' has shape \(10, 7\)"),
        (normal(10, 8) * np.nan, r"'layers.0.up.weight': .*NaN or infinity"),
    ):
        tuned["layers"]["0"]["up"]["weight"] = leaf
        io.save(tmp_path / "bad.safetensors", tuned)
        with pytest.raises(ValueError, match=match):
            io.extract(old, tmp_path / "bad.safetensors", tmp_path / "out", rank=1)
    del tuned["norm"]
    io.save(tmp_path / "bad.safetensors", tuned)
    with pytest.raises(ValueError, match=r"has no tensor 'norm.weight'"):
        io.extract(old, tmp_path / "bad.safetensors", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OSError, match="not empty"):
        run(tmp_path / "up", rank=1)
