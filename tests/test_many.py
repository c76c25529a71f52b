"""Many adapters in one batch, and side by side in training."""

import dataclasses
import functools as ft

from adapters import everything
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from jaxlab import lowrank
from jaxlab.lowrank import _picked

KEY = jax.random.key(0)
LORA = lowrank.lora(rank=2, alpha=3)
INDEX = jnp.array([2, 0, 0, 1, 1])
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def normal(seed, *shape):
    """Drawn by numpy: nothing to compile."""
    x = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def shifted(tree, seed=5):
    """Every array off its start."""
    leaves, structure = jax.tree.flatten(tree)
    moved = [v + 0.2 * normal(seed + i, *v.shape) for i, v in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def three(model, where, adapter=LORA, **options):
    """Three states of a model, off their start: `(params, x, adapted, states)`."""
    apply, params, x = model

    def start(key):
        return lowrank.attach(
            apply, params, adapter, x, where=where, key=key, **options
        )

    adapted, states = jax.vmap(start)(jax.random.split(KEY, 3))
    return params, x, adapted, shifted(states)


def layered():
    """A dense layer, then two in a scan; five examples of three tokens."""

    def apply(p, x):
        layer = lambda x, w: (jnp.tanh(x @ w), None)
        return jax.lax.scan(layer, x @ p["dense"], p["layers"])[0]

    params = {"dense": normal(0, 6, 4)}
    params["layers"] = normal(0, 2, 4, 4)
    return apply, params, normal(0, 5, 3, 6)


def apart(run, states, index, *inputs):
    """`run(state, *inputs)` of each example and its own state, one by one."""
    out = []
    for b, i in enumerate(np.asarray(index)):
        state = jax.tree.map(lambda v, i=i: v[i], states)
        mine = [x[b : b + 1] for x in inputs]
        out.append(run(state, *mine))
    return out


@ft.cache
def lora_layered():
    """All leaves of the layered model, with LoRA."""
    return three(layered(), "*")


def test_each_example_by_its_own_adapter():
    """On every form of leaf but the plainest: looked up, by head, conv, by layer..."""
    apply, params, (tokens,) = everything()
    tokens = jnp.concatenate([tokens, (3 * tokens + 1) % 8, tokens[:1]])
    leaves = ("embed", "out", "conv", "experts", "layers/kernel")
    model, where = (apply, params, tokens), lambda path, _: path in leaves
    _, x, adapted, states = three(model, where)
    y = jit(lowrank.choose(adapted))(params, states, INDEX, x)
    one = jit(lambda s, x: adapted(params, s, x))
    close(y, jnp.concatenate(apart(one, states, INDEX, x)))
    assert np.abs(y[0] - y[4]).max() > 1e-2  # the same tokens, another adapter


def test_slopes_are_those_of_each_example_by_itself():
    """Of states, summed over the examples of each, of weights and of inputs."""
    params, x, adapted, states = lora_layered()

    def loss(run, *args):
        return jnp.sum(jnp.sin(run(*args)))

    slopes = lambda run: jit(jax.grad(ft.partial(loss, run), (0, 1, 2)))
    got = slopes(lambda s, p, x: lowrank.choose(adapted)(p, s, INDEX, x))
    got = got(states, params, x)
    one = slopes(lambda s, p, x: adapted(p, s, x))
    each = apart(lambda s, x: one(s, params, x), states, INDEX, x)
    total = jax.tree.map(np.zeros_like, states)
    for i, (own, _, _) in zip(np.asarray(INDEX), each, strict=True):
        jax.tree.map(lambda t, v, i=i: np.add.at(t, i, v), total, own)
    weights = jax.tree.map(lambda *v: sum(v), *[w for _, w, _ in each])
    want = total, weights, jnp.concatenate([dx for _, _, dx in each])
    jax.tree.map(ft.partial(close, tolerance=1e-4), got, want)
    for leaf in jax.tree.leaves(got[0]):
        assert (np.abs(leaf).reshape(3, -1).max(1) > 0).all()


def test_factors_are_read_in_place():
    """No product gathers the factors of all examples, in a scan neither."""
    params, x, adapted, states = lora_layered()
    mine = lambda s, i, x: adapted(params, jax.tree.map(lambda v: v[i], s), x[None])[0]
    gathered = lambda p, s, i, x: jax.vmap(mine, (None, 0, 0))(s, i, x)
    copies = ("f32[5,6,2]", "f32[5,2,4]", "f32[2,5,4,2]", "f32[5,2,4,2]")
    for run, copied in ((lowrank.choose(adapted), False), (gathered, True)):
        text = jit(run).lower(params, states, INDEX, x).compile().as_text()
        assert any(shape in text for shape in copies) == copied


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        (lowrank.lora(rank=2, frozen_a=True), {}),
        (lowrank.ia3(), {}),
        (LORA, {"form": "merged"}),
    ],
)
def test_any_adapter_any_form(adapter, options):
    """With what each keeps fixed; no factor of a product; factors of one another."""
    params, x, adapted, states = three(layered(), "*", adapter, **options)
    got = jit(lowrank.choose(adapted, each=True))(params, states, INDEX, x)
    fixed = adapted.fixed, adapted.fixed_shared

    @jit
    def one(entries, x):
        state, (own, shared) = entries
        model = dataclasses.replace(adapted, fixed=own, fixed_shared=shared)
        return model(params, state, x)

    close(got, jnp.concatenate(apart(one, (states, fixed), INDEX, x)), 1e-4)


def test_the_index_is_traced_mapped_clipped_and_sharded():
    params, x, adapted, states = lora_layered()
    x = jnp.concatenate([x, x[:3] + 1])
    index = jnp.array([0, 2, 1, 1, 0, 2, 2, 0])
    run = lowrank.choose(adapted)
    call = jit(run)
    want = call(params, states, index, x)
    one = jit(lambda s, x: adapted(params, s, x))
    close(want, jnp.concatenate(apart(one, states, index, x)))
    close(call(params, states, jnp.where(index == 2, 9, index), x), want, 0)
    both = jnp.stack([index, index[::-1]])
    got = jit(jax.vmap(run, (None, None, 0, None)))(params, states, both, x)
    close(got[1], call(params, states, both[1], x))
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.device_put((index, x), rows)
    close(call(params, states, *spread), want, 1e-6)
    half = ft.partial(jax.tree.map, lambda v: v.astype(jnp.bfloat16))
    low = call(half(params), states, index, half(x))
    assert low.dtype == jnp.bfloat16
    close(low.astype(jnp.float32), want, 0.05)


def test_off_a_cpu_the_factors_are_gathered():
    """The program for a GPU has one batched product in place of a loop."""
    x, stack = normal(0, 5, 2, 4), normal(0, 3, 4, 6)
    g, outside = normal(0, 5, 2, 6), jnp.where(INDEX == 2, 7, INDEX)

    @jit
    def pairs(index):
        forms = (x, stack, index), (g, stack, index, True)
        slopes = [f(x, g, stack, index) for f in (_picked._scattered, _picked._summed)]
        both = [[f(*a) for a in forms] for f in (_picked._gathered, _picked._looped)]
        return [*zip(*both, strict=True), slopes]

    for index in (INDEX, outside):
        for pair in pairs(index):
            close(*pair)
    traced = jax.jit(jax.vmap(lambda x, i: _picked.picked(x, stack, i))).trace(x, INDEX)
    for platform, loops in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("while" in text) == loops


def test_dropout_by_example():
    params, x, adapted, states = three(layered(), "dense", dropout=0.5)
    same = jnp.concatenate([x[:1]] * 5)
    run = jit(lowrank.choose(adapted))
    sure = run(params, states, jnp.zeros(5, jnp.int32), same)
    close(sure, jnp.broadcast_to(sure[:1], sure.shape))
    drawn = run(params, states, jnp.zeros(5, jnp.int32), same, key=KEY)
    assert len({float(y.sum()) for y in drawn}) == 5


def test_bad_calls_are_named():
    params, x, adapted, states = lora_layered()
    run = lowrank.choose(adapted)
    one = jax.tree.map(lambda v: v[0], states)
    for args, message in (
        ((states, INDEX.astype(jnp.float32), x), r"index must be \[b\] integers, got"),
        ((states, INDEX[0], x), r"got int32\[\]"),
        ((states, INDEX, x[:4]), r"inputs\[0\] has shape \(4, 3, 6\), expected 5"),
        ((one, INDEX, x), "must be stacked"),
    ):
        with pytest.raises(ValueError, match=message):
            run(params, *args)
    total = lambda p, x: {"sum": jnp.sum(x @ p["w"])}
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    adapted, state = lowrank.attach(total, params, LORA, x, where="w", key=KEY)
    with pytest.raises(ValueError, match=r"output\['sum'\] has shape \(\) for a batch"):
        lowrank.choose(adapted)(params, lowrank.stack([state]), jnp.zeros(2, int), x)


def ranked(ranks, kind=lowrank.lora, **options):
    """One linear model, and `(adapted, state)` for each rank."""
    apply = lambda p, x: x @ p["w"]
    params, x = {"w": normal(0, 8, 6)}, normal(0, 5, 8)
    start = lambda r: lowrank.attach(
        apply, params, kind(rank=r, **options), x, where="w", key=jax.random.key(r)
    )
    pairs = [start(r) for r in ranks]
    return params, x, [(a, shifted(s, i)) for i, (a, s) in enumerate(pairs)]


@pytest.mark.parametrize("kind", [lowrank.lora, lowrank.dora])
def test_ranks_mix_in_one_batch(kind):
    params, x, pairs = ranked((1, 3, 2), kind)
    states = lowrank.stack([s for _, s in pairs])
    assert states["w"]["a"].shape == (3, 8, 3)
    got = jit(lowrank.choose(pairs[1][0]))(params, states, INDEX, x)
    for i, (adapted, state) in enumerate(pairs):
        mine = np.asarray(INDEX) == i
        close(got[mine], jit(adapted)(params, state, x)[mine])
    again = lowrank.unstack(states, [s for _, s in pairs])
    for one, (_, state) in zip(again, pairs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, state)
    assert [s["w"]["a"].shape for s in lowrank.unstack(states)] == [(8, 3)] * 3


def test_ranks_seeds_and_tasks_train_side_by_side():
    """As each alone; what pads the smaller ranks stays zero, with weight decay too."""
    params, x, pairs = ranked((1, 3, 2))
    adapted, optimizer = pairs[1][0], optax.adamw(0.05, weight_decay=0.1)
    goals = normal(0, 3, 5, 6)

    def train(model, state, goal):
        def step(carry, _):
            loss = lambda s: jnp.mean((model(params, s, x) - goal) ** 2)
            value, slopes = jax.value_and_grad(loss)(carry[0])
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, moments = optimizer.update(slopes, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), moments), value

        start = state, optimizer.init(state)
        (state, _), values = jax.lax.scan(step, start, None, length=8)
        return state, values

    states = lowrank.stack([s for _, s in pairs])
    together, values = jit(jax.vmap(ft.partial(train, adapted)))(states, goals)
    assert (values[:, -1] < values[:, 0]).all()
    for i, rank in enumerate((1, 3, 2)):
        np.testing.assert_array_equal(together["w"]["a"][i, :, rank:], 0)
        np.testing.assert_array_equal(together["w"]["b"][i, rank:], 0)
        alone, _ = jit(ft.partial(train, pairs[i][0]))(pairs[i][1], goals[i])
        close(together["w"]["a"][i, :, :rank], alone["w"]["a"], 1e-4)
        close(together["w"]["b"][i, :rank], alone["w"]["b"], 1e-4)


def test_what_cannot_be_stacked_is_named():
    _, _, pairs = ranked((2, 2))
    other = ranked((2,), alpha=8)[2][0][1]
    with pytest.raises(ValueError, match="adapters of 'w' differ in more than"):
        lowrank.stack([pairs[0][1], other])
    with pytest.raises(ValueError, match="no states"):
        lowrank.stack([])
    states = lowrank.stack([s for _, s in pairs])
    with pytest.raises(ValueError, match="like has 1 states, expected 2"):
        lowrank.unstack(states, [pairs[0][1]])
    scaled = [lowrank.factors([s])[0] for s in (pairs[0][1], other)]
    plain = [lowrank.from_factors(f, [other]) for f in scaled]
    assert lowrank.stack(plain)["w"]["a"].shape == (2, 8, 2)


def test_the_slope_of_a_factor_is_laid_out_by_rank():
    """As `[r, n]` in memory, whichever way XLA writes it: `[n, r]` is slow."""
    apply, params = lambda p, x: jnp.tanh(x @ p["w"]), {"w": jnp.ones((40, 24))}
    x = jnp.ones((56, 40))
    adapted, state = lowrank.attach(apply, params, LORA, x, where="w", key=KEY)
    loss = lambda s, x: jnp.sum(adapted(params, s, x) ** 2)
    program = jit(jax.grad(loss, (0, 1))).lower(state, x).compile().as_text()
    laid_out = "f32[40,2]{0,1} dot(" in program or "f32[2,40]{1,0} dot(" in program
    assert laid_out
    assert "f32[40,2]{1,0} dot(" not in program
