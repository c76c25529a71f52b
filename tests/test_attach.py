"""Attaching adapters to whole models: which leaves, what is trained, and folding."""

import functools as ft

from adapters import MATRICES, everything, moved
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rewrite_models import MODELS

from jaxlab import lowrank, rewrite

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LORA = lowrank.lora(rank=2, alpha=3)
KEY = jax.random.key(0)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def tuned(adapter=LORA, where=lambda path, _: path in MATRICES, **options):
    """The model with every form of leaf, adapted and off its start."""
    apply, params, inputs = everything()
    adapted, state = lowrank.attach(
        apply, params, adapter, *inputs, where=where, key=KEY, **options
    )
    entries = {p: moved(adapter, s, 5) for p, s in state.leaves.items()}
    return apply, params, inputs, adapted, state.replace(leaves=entries)


@pytest.mark.parametrize("name", MODELS)
def test_on_models_of_every_library(name):
    """Fresh it changes nothing; moved, it is the folded model."""
    apply, params, inputs = MODELS[name]()
    uses = rewrite.uses(apply, params, *inputs)

    def wide(path, leaf):
        use = next((u for u in uses[path] if u.contracted), None)
        return use is not None and min(rewrite.as_matrix(leaf, use).shape[-2:]) > 1

    adapted, state = lowrank.attach(apply, params, LORA, *inputs, where=wide, key=KEY)
    close(jit(adapted)(params, state, *inputs), jit(apply)(params, *inputs), 1e-6)
    state = state.replace(leaves={p: moved(LORA, s) for p, s in state.leaves.items()})
    folded = lowrank.fold(params, state)
    close(jit(adapted)(params, state, *inputs), jit(apply)(folded, *inputs))
    again = lowrank.unfold(folded, lowrank.kept(params, state))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_only_the_state_is_trained_and_it_learns():
    apply, params, inputs, adapted, target = tuned()
    goal = apply(lowrank.fold(params, target), *inputs)
    _, state = lowrank.attach(
        apply, params, LORA, *inputs, where=lambda p, _: p in MATRICES, key=KEY
    )
    optimizer = optax.adam(0.03)
    loss = lambda s: jnp.mean((adapted(params, s, *inputs) - goal) ** 2)

    @jit
    def step(state, moments):
        value, slopes = jax.value_and_grad(loss)(state)
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            updates, moments = optimizer.update(slopes, moments)
        return optax.apply_updates(state, updates), moments, value

    moments, values = optimizer.init(state), []
    for _ in range(60):
        state, moments, value = step(state, moments)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
    numbers = sum(x.size for x in jax.tree.leaves(state))
    assert sum(x.size for x in jax.tree.leaves(moments)) == 2 * numbers + 1
    assert numbers < sum(x.size for x in jax.tree.leaves(params))


def test_ranks_differ_by_path_and_the_first_pattern_wins():
    apply, params, inputs = everything()
    adapters = {"layers/kernel": lowrank.lora(rank=3)}
    adapters |= {"**/kernel": lowrank.lora(rank=1)}
    _, state = lowrank.attach(apply, params, adapters, *inputs, key=KEY)
    ranks = {p: s["a"].shape[-1] for p, s in state.leaves.items()}
    assert ranks == {"dense/kernel": 1, "heads/kernel": 1, "layers/kernel": 3}


def test_a_leaf_draws_by_its_path_alone():
    apply, params, inputs = everything()
    one = lowrank.attach(apply, params, LORA, *inputs, where="out", key=KEY)[1]
    all_ = lowrank.attach(apply, params, LORA, *inputs, where="**/out", key=KEY)[1]
    more = tuned(where=lambda p, _: p in ("out", "embed"))[4]
    for other in (all_, more):
        assert other["out"].keys() == one["out"].keys()
    np.testing.assert_array_equal(one["out"]["a"], all_["out"]["a"])
    fresh = lowrank.attach(
        apply, params, LORA, *inputs, where=lambda p, _: p in MATRICES, key=KEY
    )[1]
    np.testing.assert_array_equal(one["out"]["a"], fresh["out"]["a"])


def test_dropout_needs_a_key_and_keeps_the_mean():
    _, params, inputs, adapted, state = tuned(where="dense/kernel", dropout=0.4)
    sure = adapted(params, state, *inputs)
    close(sure, tuned(where="dense/kernel")[3](params, state, *inputs), 0)
    h = lambda key: adapted(params, state, *inputs, key=key)
    drawn = jit(jax.vmap(h))(jax.random.split(KEY, 4))
    assert len({float(y.sum()) for y in drawn}) == 4
    one = lambda p, x: x @ p["w"]
    w, x = {"w": jnp.zeros((8, 8))}, jnp.ones((1, 8))
    adapted, state = lowrank.attach(one, w, LORA, x, where="w", key=KEY, dropout=0.4)
    state = state.replace(leaves={"w": moved(LORA, state["w"])})
    many = jax.vmap(lambda k: adapted(w, state, x, key=k))(jax.random.split(KEY, 4000))
    want = adapted(w, state, x)
    close(many.mean(0), want, 0.1 * float(jnp.abs(want).max()))
    assert float(many.std(0).min()) > 0


def test_layers_of_a_scan_drop_differently():
    apply = lambda p, x: jax.lax.scan(lambda x, w: (x, x @ w), x, p["w"])[1]
    params, x = {"w": jnp.zeros((3, 8, 8))}, jnp.ones((1, 8))
    adapted, state = lowrank.attach(
        apply, params, LORA, x, where="w", key=KEY, dropout=0.5
    )
    same = jax.tree.map(lambda v: jnp.ones_like(v), state)
    ys = adapted(params, same, x, key=KEY)[:, 0, 0]
    assert len({float(y) for y in ys}) > 1


def test_a_tied_embedding_is_adapted_in_both_places():
    def apply(p, tokens):
        h = jnp.tanh(p["embed"][tokens])
        return h @ p["embed"].T

    params, tokens = {"embed": jax.random.normal(KEY, (7, 4))}, jnp.arange(5)
    adapted, state = lowrank.attach(apply, params, LORA, tokens, where="embed", key=KEY)
    state = state.replace(leaves={"embed": moved(LORA, state["embed"])})
    folded = lowrank.fold(params, state)
    close(adapted(params, state, tokens), apply(folded, tokens))


def test_a_trained_bias_is_folded_into_the_layers_own():
    adapter = lowrank.lora(rank=2, alpha=5, bias=True)
    apply, params, inputs, adapted, state = tuned(adapter, "**/kernel")
    assert state["layers/kernel"]["bias"].shape == (3, 8)
    folded = lowrank.fold(params, state)
    assert not np.array_equal(folded["heads"]["bias"], params["heads"]["bias"])
    close(adapted(params, state, *inputs), apply(folded, *inputs))
    apply, params, inputs = everything()
    with pytest.raises(ValueError, match=r"'out': .* needs a layer with a bias"):
        lowrank.attach(apply, params, adapter, *inputs, where="out", key=KEY)


def test_leaves_trained_as_they_are():
    apply, params, inputs, adapted, state = tuned(lowrank.full(), "**/bias")
    assert state["heads/bias"]["w"].shape == (3, 4)
    folded = lowrank.fold(params, state)
    close(folded["layers"]["bias"], state["layers/bias"]["w"], 0)
    close(adapted(params, state, *inputs), apply(folded, *inputs))


def test_seeds_train_side_by_side():
    """`attach` itself under vmap: k states on axis 0."""
    apply, params, inputs = everything()

    def start(key):
        return lowrank.attach(apply, params, LORA, *inputs, where="**/kernel", key=key)

    adapted, states = jax.vmap(start)(jax.random.split(KEY, 3))
    assert states["dense/kernel"]["a"].shape == (3, 12, 2)
    ys = jax.vmap(lambda a, s: a(params, s, *inputs))(adapted, states)
    close(ys[1], apply(params, *inputs), 1e-6)


def test_a_small_update_is_lost_in_bfloat16_and_kept_in_float32():
    w = {"w": jax.random.normal(KEY, (32, 32), jnp.bfloat16)}
    x = jnp.ones((1, 32), jnp.bfloat16)
    apply = lambda p, x: x @ p["w"].astype(x.dtype)
    state = lowrank.attach(apply, w, LORA, x, where="w", key=KEY)[1]
    assert float(lowrank.fold_error(w, state)["w"]) == 0
    state = state.replace(leaves={"w": moved(LORA, state["w"], scale=1e-2)})
    lost = float(lowrank.fold_error(w, state)["w"])
    assert lost > 0.3
    folded = lowrank.fold(w, state, dtype="float32")["w"]
    s = state["w"]
    update = 1.5 * np.asarray(s["a"], np.float64) @ np.asarray(s["b"], np.float64)
    kept = np.asarray(folded, np.float64) - np.asarray(w["w"], np.float64)
    assert np.linalg.norm(kept - update) < 1e-3 * np.linalg.norm(update)
    rounded = np.asarray(lowrank.fold(w, state)["w"], np.float64)
    error = rounded - np.asarray(w["w"], np.float64) - update
    close(np.linalg.norm(error) / np.linalg.norm(update), lost, 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "nothing"}, "chooses no leaf"),
        ({"where": None}, "needs where="),
        ({"where": "dense/bias"}, r"'dense/bias' is in no matrix product \(used by:"),
        ({"where": "out", "adapter": lowrank.lora(rank=9)}, r"'out': rank 9 is above"),
        ({"where": None, "adapter": {"x/*": LORA}}, "chooses no leaf"),
        ({"where": None, "adapter": {"out": LORA, "x/*": LORA}}, r"pattern 'x/\*'"),
        (
            {"where": "out", "adapter": lowrank.corda(rank=1), "statistics": {"x": 1}},
            "'out': corda needs statistics=",
        ),
    ],
)
def test_bad_choices_are_named(options, message):
    apply, params, inputs = everything()
    adapter = options.pop("adapter", LORA)
    with pytest.raises(ValueError, match=message):
        lowrank.attach(apply, params, adapter, *inputs, key=KEY, **options)


def test_another_base_and_folding_twice_are_refused():
    apply, params, inputs, adapted, state = tuned()
    folded = lowrank.fold(params, state)
    with pytest.raises(ValueError, match="another base, or one it was folded into"):
        lowrank.fold(folded, state)
    with pytest.raises(ValueError, match="another base, or one it was folded into"):
        jit(lambda s: lowrank.fold(folded, s))(state)
    other = params | {"out": jnp.zeros((4, 3, 8))}
    with pytest.raises(ValueError, match=r"'out' has shape \(4, 3, 8\)"):
        lowrank.fold(other, state)
    swapped = params | {"out": params["out"][::-1]}
    with pytest.raises(ValueError, match="another base"):
        lowrank.fold(swapped, state)
    fewer = tuned(where="out")[4]
    with pytest.raises(ValueError, match="other leaves or adapters"):
        adapted(params, fewer, *inputs)
    upcast = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    small = lowrank.attach(apply, upcast, LORA, *inputs, where="out", key=KEY)[1]
    again = jax.tree.map(lambda w: w.astype(jnp.float32), upcast)
    lowrank.fold(again, small)  # the same values in a wider dtype are the same base


def test_fixed_entries_are_missed_by_name():
    frozen = lowrank.lora(rank=2, frozen_a=True)
    _, params, _, adapted, state = tuned(frozen)
    assert all(set(s) == {"b"} for s in state.leaves.values())
    lowrank.fold(params, state, adapted)
    with pytest.raises(ValueError, match=r"keeps \['a'\] fixed at"):
        lowrank.fold(params, state)


def test_rows_and_dense_are_the_layers_own_matrices():
    """Inside a model, of a convolution too."""
    seen = {}

    def apply(x, w, s):
        seen[len(seen)] = lowrank.rows(x).shape, lowrank.dense(w).shape
        close(lowrank.rows(x) @ lowrank.dense(w), x @ w)
        return x @ w

    adapter = lowrank.Adapter(lambda key, w: {}, apply, lambda w, s: w)
    model, params, inputs = everything()
    adapted, state = lowrank.attach(
        model,
        params,
        adapter,
        *inputs,
        where=lambda p, _: p in ("conv", "out"),
        key=KEY,
    )
    close(adapted(params, state, *inputs), model(params, *inputs), 1e-6)
    assert sorted(seen.values()) == [((8, 8), (8, 12)), ((8, 12), (12, 8))]
    assert isinstance(adapted, lowrank.Adapted)
    assert isinstance(state, lowrank.State)
    assert isinstance(state.spec, lowrank.Spec)
    assert isinstance(state.spec.places[0], lowrank.Place)
