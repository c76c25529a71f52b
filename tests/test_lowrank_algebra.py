"""Adding, merging and compressing adapters in factored form: all of it exact."""

import functools as ft

from adapters import ADAPTERS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank, merge
from jaxlab.rewrite import Use

LOW_RANK = ("lora/rslora", "pissa", "adalora", "kasa", "dora", "lora_gain")
SHAPES = {"dense": (8, 6), "dense_bias": (6,), "layers": (3, 8, 8), "norm": (8,)}
BASE = {
    p: np.random.default_rng(0).normal(size=s, scale=0.5) for p, s in SHAPES.items()
}
BASE = {path: jnp.asarray(x, jnp.float32) for path, x in BASE.items()}
USES = {
    "dense": Use("dense", "dot_general", (), (), (0,), (1,), (8, 6)),
    "layers": Use("layers", "dot_general", (0,), (), (1,), (2,), (3, 8, 8)),
}
MIXED = (
    {"dense": lowrank.lora(rank=2, alpha=7, bias=True)}
    | {"layers": lowrank.dora(rank=2, alpha=3), "norm": lowrank.full()},
    {"dense": lowrank.lora(rank=3, alpha=2, rslora=True)}
    | {"layers": lowrank.lora(rank=4), "norm": lowrank.full()},
)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def close(a, b, tolerance=3e-6):
    scale = float(np.abs(b).max()) + 1e-30
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def made(adapters, seed=1):
    """An adapted model of no function, and a state drawn by numpy, off its start."""
    rng, trained, fixed, places = np.random.default_rng(seed), {}, {}, []
    for path, adapter in adapters.items():
        w, use = BASE[path], USES.get(path)
        bias = f"{path}_bias" if adapter.bias is not None else None
        places.append(lowrank.Place(path, adapter, w.shape, use, bias))
        init = jax.vmap(adapter.init) if w.ndim == 3 else adapter.init
        keys = (
            jax.random.key(0) if w.ndim < 3 else jax.random.split(jax.random.key(0), 3)
        )
        fixes = bool(adapter.fixed)
        s = jit(init)(keys, w) if fixes else jax.eval_shape(init, keys, w)
        drawn = {n: rng.normal(size=v.shape, scale=0.3) for n, v in s.items()}
        own = {n: jnp.asarray(v, jnp.float32) for n, v in drawn.items()}
        fixed[path] = {n: s[n] for n in adapter.fixed}
        trained[path] = {n: v for n, v in own.items() if n not in adapter.fixed}
    spec = lowrank.Spec(tuple(places), "")
    adapted = lowrank.Adapted(fixed, {}, lambda p: p, spec, "merged", 0.0)
    return adapted, lowrank.State(trained, {}, spec)


@ft.cache
def pair():
    """Two states of one base, of other ranks, scales and kinds: factors, updates."""
    adapted, states = zip(*map(made, MIXED, (1, 2)), strict=True)
    updates = jit(lowrank.factors)(states, BASE, adapted)
    return states, updates, [dense(*x) for x in zip(states, adapted, strict=True)]


def dense(state, adapted=None):
    """The update of every leaf, by folding in float32."""
    folded = jit(lowrank.fold)(BASE, state, adapted)
    return {path: np.asarray(folded[path] - x) for path, x in BASE.items()}


def folded(update, states):
    return dense(lowrank.from_factors(update, states, BASE))


def products(update):
    """The low-rank part of each matrix, and nothing else."""
    return {p: f.a @ f.b for p, f in update.items() if f.a is not None}


def same(got, want, tolerance=3e-6):
    jax.tree.map(ft.partial(close, tolerance=tolerance), got, want)


@pytest.mark.parametrize("name", LOW_RANK)
def test_one_adapter_is_its_factors(name):
    """Alone with weight 1 it is itself: its update is that of folding."""
    adapter = ADAPTERS[name].make()
    adapted, state = made({"dense": adapter, "layers": adapter})
    (update,) = jit(lowrank.factors)([state], BASE, [adapted])
    got = products(update)
    for path, f in update.items():
        if f.gain is not None:
            got[path] = got[path] + BASE[path] * f.gain[..., None, :]
    want = dense(state, adapted)
    same(got, {p: want[p] for p in ("dense", "layers")}, 1e-5)


def test_mixed_ranks_scales_biases_gains_and_whole_leaves_add_up():
    states, updates, dense_updates = pair()
    one, two = (folded(lowrank.linear([u]), states) for u in updates)
    same(one, dense_updates[0], 1e-5)
    same(two, dense_updates[1], 1e-5)
    total = jit(lowrank.linear)(updates, weights=jnp.array([0.7, -0.4]))
    state = lowrank.from_factors(total, states, BASE)
    want = jax.tree.map(lambda a, b: 0.7 * a - 0.4 * b, *dense_updates)
    same(dense(state), want, 1e-5)
    assert all(np.abs(want[path]).max() > 0.1 for path in SHAPES)
    assert state["dense"]["a"].shape == (8, 5)
    kinds = [p.adapter.config[0] for p in state.spec.places]
    assert kinds == ["lora", "lora_gain", "full"]
    again = lowrank.factors([state], BASE)[0]
    same(products(again), products(total), 1e-6)
    assert state.spec.places[0].bias == "dense_bias"


def test_sums_by_hand():
    """Every part of the factors, and parts that only some updates have."""
    column = lambda *x: jnp.float32(x)[:, None]
    row = lambda *x: jnp.float32(x)[None]
    one = lowrank.Factors(column(1, 2), row(3, 4, 5), gain=jnp.float32([1, 0, 0]))
    two = lowrank.Factors(column(1, 0), row(0, 1, 0), bias=jnp.float32([0, 6, 0]))
    whole = [lowrank.Factors(None, None, delta=jnp.float32([v, 1])) for v in (2, 3)]
    updates = [{"w": one, "n": whole[0]}, {"w": two, "n": whole[1]}]
    got = lowrank.linear(updates, weights=jnp.array([2.0, -1.0]))
    assert (got["w"].a @ got["w"].b).tolist() == [[6, 7, 10], [12, 16, 20]]
    assert got["w"].gain.tolist() == [2, 0, 0]
    assert got["w"].bias.tolist() == [0, -6, 0]
    assert got["w"].delta is None
    assert got["n"].delta.tolist() == [1, 1]
    assert got["n"].a is None
    total = lowrank.linear(updates)["w"]
    assert (total.a @ total.b).tolist() == [[3, 5, 5], [6, 8, 10]]
    with pytest.raises(ValueError, match="broadcast"):
        lowrank.linear(updates, weights=jnp.ones(3))


def test_a_combination_runs_in_any_model_and_for_many_weights_at_once():
    """The function with its adapters is the folded model; weights may be mapped."""
    states, updates, dense_updates = pair()
    adapted = made(MIXED[0])[0]
    weights = jnp.array([[1.0, 0.0], [0.3, 0.6]])
    many = jit(jax.vmap(lambda w: lowrank.linear(updates, weights=w)))(weights)
    for i, w in enumerate(weights.tolist()):
        one = jax.tree.map(lambda x, i=i: x[i], many)
        want = jax.tree.map(lambda a, b, w=w: w[0] * a + w[1] * b, *dense_updates)
        same(folded(one, states), want, 1e-5)
    state = lowrank.from_factors(lowrank.linear(updates), states, BASE)
    run = lambda p, x: jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), x * p["norm"][None], p["layers"]
    )[0] @ p["dense"] + p["dense_bias"][None]  # fmt: skip
    spec = state.spec
    model = lowrank.Adapted(
        {path: {} for path in SHAPES}, {}, run, spec, adapted.form, adapted.dropout
    )
    x = np.random.default_rng(3).normal(size=(5, 8)).astype(np.float32)
    got = jit(model)(BASE, state, x)
    close(got, jit(lambda s: run(lowrank.fold(BASE, s), x))(state), 1e-5)


def test_compression_is_the_truncated_svd_of_the_dense_update():
    _, updates, _ = pair()
    total = lowrank.linear(updates)
    whole = products(total)
    run = lambda rank: jit(ft.partial(lowrank.compress, rank=rank))(total)
    same(products(run(6)), whole)
    small = run(2)
    for path, got in products(small).items():
        u, s, vt = np.linalg.svd(whole[path], full_matrices=False)
        want = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
        close(got, want, 1e-5)
        f = small[path]
        close(np.linalg.norm(f.a, axis=-2), np.linalg.norm(f.b, axis=-1), 1e-5)
    for name in ("gain", "bias", "delta"):
        kept, had = (
            {p: getattr(f, name) for p, f in u.items()} for u in (small, total)
        )
        jax.tree.map(np.testing.assert_array_equal, kept, had)


def test_energy_and_tolerance_take_the_rank_they_need():
    a = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 9, 4)))[0]
    sizes = np.array([[4.0, 2.0, 1.0, 0.5], [4.0, 0.1, 0.1, 0.1]])
    b = sizes[..., None] * np.eye(4, 6)[None]
    update = {"w": lowrank.Factors(jnp.float32(a), jnp.float32(b))}
    rank = lambda **limit: lowrank.compress(update, **limit)["w"].a.shape[-1]
    # squares of the first, the harder one: 16, 4, 1, 0.25 of 21.25
    assert [rank(energy=e) for e in (0.75, 0.76, 0.94, 0.95, 0.99)] == [1, 2, 2, 3, 4]
    assert [rank(tolerance=e) for e in (0.5, 0.49, 0.2, 0.1)] == [1, 2, 3, 4]
    none = {"w": update["w"]._replace(b=jnp.zeros((2, 4, 6)))}
    assert lowrank.compress(none, energy=0.9)["w"].a.shape == (2, 9, 1)


@pytest.mark.parametrize("space", ["core", "knots", "dense"])
def test_a_linear_method_gives_the_sum_in_every_space(space):
    _, updates, _ = pair()
    weights = jnp.array([0.7, -0.4])
    method = ft.partial(merge.task_arithmetic, weights=weights)
    got = jit(ft.partial(lowrank.combine, method=method, space=space))(updates)
    want = lowrank.linear(updates, weights=weights)
    same(products(got), products(want), 1e-5)
    rest = lambda update: {p: f[2:] for p, f in update.items()}
    same(rest(got), rest(want))


def test_a_method_meets_the_updates_that_its_space_says():
    """KnOTS of factors = KnOTS of whole matrices; "dense" = the merge itself."""
    _, updates, _ = pair()
    low = [{p: lowrank.Factors(u[p].a, u[p].b) for p in USES} for u in updates]
    stacked = {p: jnp.stack([products(u)[p] for u in low]) for p in USES}
    # Signs of singular vectors are free, and ties is odd in every entry.
    ties = ft.partial(merge.ties, density=1.0)
    run = lambda space: lambda x: products(lowrank.combine(x, method=ties, space=space))
    knots = ft.partial(merge.knots, method=ties)
    want = jit(lambda x: (knots(x), ties(x)))(stacked)
    same(jit(run("knots"))(low), want[0], 2e-5)
    same(jit(run("dense"))(low), want[1], 1e-5)
    assert np.abs(want[0]["dense"] - want[1]["dense"]).max() > 0.1


def test_cores_are_those_of_the_authors():
    """U_B^T B A V_A, with the bases of the stacked factors, for all layers."""
    _, updates, _ = pair()
    low = [{p: lowrank.Factors(u[p].a, u[p].b) for p in USES} for u in updates]

    @jit
    def cores(updates):
        seen = []
        method = lambda tree: (seen.append(tree), merge.average(tree))[1]
        return lowrank.combine(updates, method=method, rank=2), seen[0]["update"]

    small, seen = cores(low)
    assert small["layers"].a.shape == (3, 8, 2)
    for path, found in seen.items():
        a, b = ([getattr(u[path], n) for u in low] for n in "ab")
        u = np.linalg.svd(np.concatenate(a, -1), full_matrices=False)[0]
        vt = np.linalg.svd(np.concatenate(b, -2), full_matrices=False)[2]
        v = np.swapaxes(vt, -1, -2)
        want = [np.swapaxes(u, -1, -2) @ x @ y @ v for x, y in zip(a, b, strict=True)]
        close(np.abs(found), np.abs(np.stack(want)), 2e-5)  # up to signs of vectors


def test_what_has_no_matrix_is_merged_beside_the_cores():
    """Zeros where a state has no such part; ties of all leaves share one threshold."""
    _, updates, _ = pair()
    ties = ft.partial(merge.ties, density=0.5)

    @jit
    def run(updates):
        seen = []
        method = lambda tree: (seen.append(tree), ties(tree))[1]
        got = lowrank.combine(updates, method=method)
        return got, seen[0], ties(seen[0]), merge.trim(seen[0], density=0.5)

    got, seen, want, trimmed = run(updates)
    shapes = jax.tree.map(jnp.shape, seen)
    assert shapes["bias"] == {"dense": (2, 6)}
    assert shapes["gain"] == {"layers": (2, 3, 8)}
    assert shapes["delta"] == {"norm": (2, 8)}
    assert shapes["update"] == {"dense": (2, 5, 5), "layers": (2, 3, 6, 6)}
    assert not seen["bias"]["dense"][1].any()
    assert not seen["gain"]["layers"][1].any()
    for name in ("bias", "gain", "delta"):
        for path, v in want[name].items():
            np.testing.assert_array_equal(getattr(got[path], name), v)
    kept = [np.count_nonzero(v) for v in jax.tree.leaves(trimmed)]
    assert sum(kept) == 2 * (sum(v[0].size for v in jax.tree.leaves(seen)) // 2)


def test_bad_input():
    states, updates, _ = pair()
    with pytest.raises(ValueError, match=r"keeps .*squares.* fixed at 'layers'"):
        lowrank.factors(states[:1], BASE)
    with pytest.raises(ValueError, match="'norm': the update depends on the base"):
        lowrank.factors(states[1:])
    _, other = made({"dense": lowrank.bone(block=2)})
    with pytest.raises(ValueError, match="'dense': bone is no plain LoRA"):
        lowrank.factors([other])
    _, one = made({"dense": lowrank.lora(rank=1)})
    named = [one.replace(spec=one.spec._replace(fingerprint=x)) for x in "ab"]
    with pytest.raises(ValueError, match=r"of other bases .*a and b"):
        lowrank.factors(named)
    with pytest.raises(ValueError, match="a state has 'layers', unlike the first"):
        lowrank.factors([one, states[0]])
    with pytest.raises(ValueError, match="no states"):
        lowrank.factors([])
    (alone,) = lowrank.factors([one])
    with pytest.raises(ValueError, match="an update lacks 'layers'"):
        lowrank.linear([updates[0], alone])
    with pytest.raises(ValueError, match=r"'dense': rank 7 is not from 1 to .* 6"):
        lowrank.compress(alone, rank=7)
    for limits in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(ValueError, match="one of rank"):
            lowrank.compress(alone, **limits)
    for limit in ({"energy": 1.0}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            lowrank.compress(alone, **limit)
    with pytest.raises(ValueError, match="space must be one of"):
        lowrank.combine([alone], method=merge.average, space="full")
    with pytest.raises(ValueError, match=r"no state says .*'dense'"):
        lowrank.from_factors(updates[0], states[1:], BASE)
