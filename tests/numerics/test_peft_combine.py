"""PEFT 0.21.2's eleven combinations of adapters: equal, and right where it errs."""

import functools as ft
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank, merge
from jaxlab.io import combine_states as combine
from jaxlab.io._combine import MODES
from jaxlab.merge import _drop

GOLDEN = np.load(Path(__file__).with_name("peft_adapters.npz"))
ABOUT = json.loads(str(GOLDEN["about"]))
LAYERS = ("lin0", "lin1")
WEIGHTS = (0.7, 0.4)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model(params, x):
    """PEFT's perceptron, its weights `[out, in]`."""
    dense = lambda x, p: x @ p["weight"].T + p["bias"][None]
    return dense(jax.nn.relu(dense(x, params["lin0"])), params["lin1"])


def golden(folder, name, adapter):
    """The base, the adapted model and the state of one adapter in the file."""
    at = lambda layer, rest: GOLDEN[f"{folder}/state/base_model.model.{layer}.{rest}"]
    params, trained = {}, {}
    for layer in LAYERS:
        base = {n: at(layer, f"base_layer.{n}") for n in ("weight", "bias")}
        params[layer] = {n: jnp.asarray(v) for n, v in base.items()}
        s = {"a": at(layer, f"lora_A.{name}.weight").T}
        s["b"] = at(layer, f"lora_B.{name}.weight").T
        if "bias" in dict(adapter.config[1:]) and adapter.bias is not None:
            s["bias"] = at(layer, f"lora_B.{name}.bias")
        if adapter.config[0] == "dora":
            s["magnitude"] = at(layer, f"lora_magnitude_vector.{name}.weight")
        trained[f"{layer}/weight"] = {n: jnp.asarray(v) for n, v in s.items()}
    adapters = dict.fromkeys(trained, adapter)
    adapted, state = lowrank.attach(
        model, params, adapters, GOLDEN["x"], key=jax.random.key(0)
    )
    return params, adapted, state.replace(leaves=trained)


@ft.cache
def pair():
    """The two adapters that the file combines, of one rank and two scales."""
    adapters = lowrank.lora(rank=4, alpha=6), lowrank.lora(rank=4, alpha=3)
    found = [golden("combine", n, a) for n, a in zip("ab", adapters, strict=True)]
    return [state for _, _, state in found]


def products(update):
    return {path.split("/")[0]: (f.a @ f.b).T for path, f in update.items()}


@pytest.mark.parametrize("mode", ABOUT["modes"])
def test_agrees(mode, monkeypatch):
    """To 1e-5, with the uniforms behind PEFT's masks."""
    assert set(ABOUT["modes"]) == set(MODES)
    svd = mode.endswith("svd")

    def stored(path, key, shape):
        del key
        first = 4 * path.count("lin1") + 2 * path.startswith("b/")
        first = first // 2 if svd else first
        return jnp.stack([GOLDEN[f"combine/{mode}/u{first + j}"].T for j in range(2)])

    monkeypatch.setattr(_drop, "_uniform", stored)
    run = ft.partial(combine, mode=mode, semantics="peft", key=jax.random.key(0))
    got = products(jit(lambda s: run(s, weights=jnp.array(WEIGHTS)))(pair()))
    for layer in LAYERS:
        want = GOLDEN[f"combine/{mode}/{layer}"]
        np.testing.assert_allclose(got[layer], want, rtol=0, atol=1e-5)
        assert np.abs(want).max() > 0.05


def test_peft_adds_products_of_different_adapters_and_we_do_not():
    """Its "linear" is far from the sum of the two updates, which "cat" and ours are."""
    sums = products(combine(pair(), weights=jnp.array(WEIGHTS), mode="linear"))
    for layer in LAYERS:
        want, theirs = (GOLDEN[f"combine/{m}/{layer}"] for m in ("cat", "linear"))
        np.testing.assert_allclose(sums[layer], want, rtol=0, atol=1e-6)
        assert np.linalg.norm(theirs - want) > 0.5 * np.linalg.norm(want)


KINDS = {
    "plain": (lowrank.lora(rank=4, alpha=6), 0.0),
    "rslora": (lowrank.lora(rank=4, alpha=6, rslora=True), 0.94),
    "dora": (lowrank.dora(rank=4, alpha=6), 0.25),
    "bias": (lowrank.lora(rank=4, alpha=6, bias=True), 0.25),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_alone_with_weight_1_is_itself(kind):
    """For PEFT's "linear" it is not, by so much of its effect on the output."""
    adapter, wrong = KINDS[kind]
    params, adapted, state = golden(f"identity/{kind}", "a", adapter)
    x, y = jnp.asarray(GOLDEN["x"]), GOLDEN[f"identity/{kind}/y"]

    @jit
    def outputs(params, state):
        update = combine([state], params, [adapted], mode="linear")
        alone = lowrank.from_factors(update, [state])
        return adapted(params, state, x), model(lowrank.fold(params, alone), x)

    for got in outputs(params, state):
        np.testing.assert_allclose(got, y, rtol=0, atol=1e-5)
    theirs = GOLDEN[f"identity/{kind}/combined"]
    error = np.linalg.norm(theirs - y) / np.linalg.norm(y)
    np.testing.assert_allclose(error, wrong, atol=0.005)


def test_exact_modes_take_any_kinds_and_ranks():
    first, second = golden("identity/rslora", "a", KINDS["rslora"][0])[2], pair()[1]

    @jit
    def combined(states):
        run = ft.partial(combine, density=0.5, rank=3, key=jax.random.key(0))
        return run(states, mode="ties"), run(states, mode="dare_linear_svd")

    for update in combined([first, second]):
        assert update["lin0/weight"].a.shape == (16, 3)
    other = golden("combine", "a", lowrank.lora(rank=4))[2]
    leaves = {p: {"a": v["a"][:, :2], "b": v["b"][:2]} for p, v in other.leaves.items()}
    with pytest.raises(ValueError, match="'lin0/weight' has adapters of several ranks"):
        lowrank.separate(
            [second, other.replace(leaves=leaves)],
            weights=1.0,
            method=merge.task_arithmetic,
        )
    with pytest.raises(ValueError, match="mode 'sum' is unknown"):
        combine([first], mode="sum")
    with pytest.raises(ValueError, match="dare_ties is random"):
        combine([first], mode="dare_ties")
    dora = golden("identity/dora", "a", KINDS["dora"][0])[2]
    with pytest.raises(ValueError, match="'lin0/weight' has dora, not plain LoRA"):
        combine([dora], semantics="peft")
