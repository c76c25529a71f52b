"""What defines each of PEFT's smaller methods, in closed form."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from jaxlab import lowrank
from jaxlab.io._peft_defaults import DEFAULTS
from jaxlab.io._peft_kind import Layer
from jaxlab.io._peft_others import KINDS

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
prepend = lowrank.prepend


def normal(seed, *shape):
    """Drawn by numpy, which compiles nothing."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def moved(adapter, s, seed=1, scale=0.2):
    """Its trained entries off their start."""
    rng = np.random.default_rng(seed)
    drawn = lambda v: scale * rng.standard_normal(v.shape, np.float32)
    shifted = lambda n, v: v if n in adapter.fixed else np.asarray(v) + drawn(v)
    return {n: shifted(n, v) for n, v in s.items()}


def started(adapter, w, seed=1, scale=0.2):
    """A state off its start."""

    def init(w):
        s = adapter.init(KEY, w)
        return s | (adapter.shared(KEY, (w.shape,)) if adapter.shared else {})

    return moved(adapter, jax.tree.map(np.asarray, jit(init)(w)), seed, scale)


def merged(adapter, w, s):
    return np.asarray(jit(adapter.merge)(w, s))


def applied(adapter, x, w, s):
    return np.asarray(jit(adapter.apply)(x, w, s))


def update(adapter, w, s):
    return merged(adapter, w, s) - w


def attached(apply, params, adapter, *inputs, where="**", key=KEY):
    attach = ft.partial(lowrank.attach, apply, where=where, key=key)
    return jit(lambda params: attach(params, adapter, *inputs))(params)


def test_c3a_is_the_product_with_circulant_blocks():
    adapter, w, x = lowrank.c3a(block=4), normal(0, 8, 12), normal(1, 5, 8)
    kernel = normal(2, 3, 2, 4)
    blocks = [[scipy.linalg.circulant(kernel[i, j]) for i in range(3)] for j in (0, 1)]
    want = np.block(blocks) / 8
    close(update(adapter, w, {"kernel": kernel}), want)
    close(applied(adapter, x, w, {"kernel": kernel}), x @ (w + want))
    turned = np.roll(x.reshape(5, 2, 4), 1, -1).reshape(5, 8)
    both = [applied(adapter, v, 0 * w, {"kernel": kernel}) for v in (x, turned)]
    close(both[1], np.roll(both[0].reshape(5, 3, 4), 1, -1).reshape(5, 12))


@pytest.mark.parametrize("start", ["gaussian", "xavier_uniform", "kaiming_uniform"])
def test_c3a_starts_as_spread_as_its_name_says(start):
    w = jnp.zeros((200, 100))
    kernel = jit(lowrank.c3a(block=10, start=start).init)(KEY, w)["kernel"]
    ends = {"xavier_uniform": (6 / 300) ** 0.5, "kaiming_uniform": (1 / 200) ** 0.5}
    std = ends[start] / 3**0.5 if start in ends else 1
    close(kernel.std(), std, 0.05 * std)


def test_road_rotates_and_scales_pairs():
    """As complex numbers: i and i + g/2 are the parts of one."""
    adapter, w, x = lowrank.road(group=4), normal(0, 6, 8), normal(1, 3, 6)
    s = {"theta": normal(2, 4), "alpha": normal(3, 4)}

    def pairs(y):
        y = y.reshape(-1, 2, 2, 2)
        return (y[:, :, 0] + 1j * y[:, :, 1]).reshape(-1, 4)

    turn = s["alpha"] * np.exp(1j * s["theta"])
    close(pairs(applied(adapter, x, w, s)), pairs(x @ w) * turn[None])
    b = normal(4, 8)
    close(pairs(np.asarray(adapter.bias(b, s))), pairs(b) * turn[None])
    again = {"theta": -s["theta"], "alpha": 1 / s["alpha"]}
    close(merged(adapter, merged(adapter, w, s), again), w)


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_roads_variants_are_the_matrices_of_its_table(variant):
    w = normal(0, 3, 4)
    adapter = lowrank.road(variant=variant, group=4)
    size = 2 * variant
    theta, alpha = normal(1, size), normal(2, size)
    got = merged(adapter, w, {"theta": theta, "alpha": alpha})
    if variant == 1:
        theta, alpha = (np.tile(v, 2) for v in (theta, alpha))
    if variant < 4:
        theta, alpha = (np.tile(v, 2) for v in (theta, alpha))
    cos, sin = (alpha * np.cos(theta))[:4], (alpha * np.sin(theta))[4:]
    matrix = np.diag(cos)
    for i in (0, 1):
        matrix[i, i + 2], matrix[i + 2, i] = -sin[i], sin[i + 2]
    close(got, w @ matrix.T)


def test_miss_repeats_its_shard():
    w, x = normal(0, 7, 6), normal(1, 4, 7)
    d = normal(2, 3, 6)
    close(update(lowrank.miss(rank=3), w, {"d": d}), np.tile(d, (3, 1))[:7])
    folded = np.pad(x, ((0, 0), (0, 2))).reshape(4, 3, 3).sum(1)
    close(applied(lowrank.miss(rank=3), x, w, {"d": d}), x @ w + folded @ d)
    mini = lowrank.miss(rank=3, mode="mini", width=2)
    close(update(mini, w, {"d": d[:, :2]}), np.tile(d[:, :2], (3, 3))[:7])
    close(applied(mini, x, w, {"d": d[:, :2]}), x @ w + folded @ np.tile(d[:, :2], 3))


def test_miss_by_bat_multiplies_each_block():
    adapter, w, d = (
        lowrank.miss(rank=2, mode="bat"),
        normal(0, 6, 4),
        normal(1, 2, 2, 2),
    )
    got = update(adapter, w, {"d": d})
    for i in range(3):
        for o in range(2):
            at = np.s_[2 * i : 2 * i + 2, 2 * o : 2 * o + 2]
            close(got[at], d[o].T @ w[at] + d[o].T)


def test_shira_trains_its_places_and_no_others():
    w = normal(0, 6, 5)
    for adapter in (lowrank.shira(rank=1), lowrank.shira(rank=1, mask="magnitude")):
        s = started(adapter, w)
        changed = update(adapter, w, s) != 0
        assert changed.sum() == 11 == len(s["values"])
        assert changed[s["rows"], s["columns"]].all()
        order = np.asarray(s["columns"]) * 6 + np.asarray(s["rows"])
        assert (np.diff(order) > 0).all()
    least = np.abs(w)[s["rows"], s["columns"]].min()
    assert (np.abs(w)[~changed] <= least).all()
    score = normal(3, 6, 5)
    own = lowrank.shira(rank=1, mask="statistic").init(KEY, w, score)
    close(np.sort(score[own["rows"], own["columns"]]), np.sort(score.ravel())[-11:], 0)


def test_shira_draws_as_torch_does():
    """`torch.randperm(30, generator=torch.Generator().manual_seed(5))[:11]`, sorted."""
    adapter = lowrank.shira(rank=1, seed=5)
    s = adapter.init(KEY, jnp.zeros((6, 5)))
    again = adapter.init(jax.random.key(9), jnp.ones((6, 5)))
    jax.tree.map(np.testing.assert_array_equal, s["rows"], again["rows"])
    flat = np.asarray(s["columns"]) * 6 + np.asarray(s["rows"])
    assert flat.tolist() == [2, 6, 11, 13, 15, 18, 20, 22, 25, 28, 29]


def test_deloras_update_has_the_norm_that_is_its_bound():
    w, x = normal(0, 8, 6), normal(1, 3, 8)
    norms = np.linalg.norm(w, axis=1)
    one = lowrank.delora(rank=1, bound=2)
    s = started(one, w) | {"bound": np.float32(2.5)}
    relative = update(one, w, s) / norms[:, None]
    close(np.linalg.norm(relative), 2.5)
    longer = s | {"a": 7 * s["a"], "b": 0.1 * s["b"]}
    close(merged(one, w, longer), merged(one, w, s))
    three = lowrank.delora(rank=3)
    s = started(three, w)
    size = np.linalg.norm(update(three, w, s) / norms[:, None])
    assert size <= s["bound"]
    q = np.linalg.qr(s["a"])[0]
    size = np.linalg.norm(update(three, w, s | {"a": q}) / norms[:, None])
    close(size, s["bound"] / 3**0.5, 1e-4)
    close(applied(three, x, w, s), x @ merged(three, w, s), 1e-4)


def test_gralora_of_one_block_is_lora_and_of_more_has_more_rank():
    w = normal(0, 8, 12)
    s = {"a": normal(1, 1, 8, 4), "b": normal(2, 1, 4, 12)}
    flat = {name: v[0] for name, v in s.items()}
    lora = lowrank.lora(rank=4, alpha=6)
    one = lowrank.gralora(rank=4, blocks=1, alpha=6)
    close(merged(one, w, s), merged(lora, w, flat))
    two = lowrank.gralora(rank=4, blocks=2)
    s = started(two, w, scale=1)
    assert sum(v.size for v in s.values()) == 4 * (8 + 12)
    change = update(two, w, s)
    assert np.linalg.matrix_rank(change, tol=1e-4) == 8
    for i in (0, 1):
        for o in (0, 1):
            block = change[4 * i : 4 * i + 4, 6 * o : 6 * o + 6]
            close(block, s["a"][i][:, 2 * o : 2 * o + 2] @ s["b"][o][2 * i : 2 * i + 2])


def test_hira_has_high_rank():
    adapter, w = lowrank.hira(rank=1), normal(0, 8, 8)
    change = update(adapter, w, started(adapter, w, scale=1))
    assert np.linalg.matrix_rank(change, tol=1e-4) == 8


def test_ia3_scales_what_comes_out_or_goes_in():
    w, x, b = normal(0, 6, 4), normal(1, 3, 6), normal(2, 4)
    out, into = normal(3, 4), normal(4, 6)
    after, before = lowrank.ia3(), lowrank.ia3(feedforward=True)
    got = applied(after, x, w, {"scale": out}) + after.bias(b, {"scale": out})[None]
    close(got, out[None] * (x @ w + b[None]))
    close(applied(before, x, w, {"scale": into}), (into[None] * x) @ w)
    assert before.bias is None
    assert after.bias(None, {}) is None
    close(merged(before, w, {"scale": into}), into[:, None] * w)


def test_psoft_keeps_the_geometry_of_the_principal_subspace():
    w = normal(0, 8, 6)
    adapter = lowrank.psoft(rank=3, scale_in=False, scale_out=False)
    s = started(adapter, w, scale=1)
    principal = s["a"] @ s["b"]
    u, d, v = np.linalg.svd(w)
    close(principal, (u[:, :3] * d[:3]) @ v[:3])
    turned = principal + update(adapter, w, s)
    assert np.abs(turned - principal).max() > 0.1
    close(turned.T @ turned, principal.T @ principal, 1e-4)
    split = lowrank.psoft(rank=3, split=True)
    close(split.init(KEY, w)["a"] @ split.init(KEY, w)["b"], principal)
    scaled = lowrank.psoft(rank=3)
    ones = {"alpha": np.ones(3, np.float32), "beta": np.ones(3, np.float32)}
    close(merged(scaled, w, s | ones), merged(adapter, w, s))


def test_psofts_series_ends_at_its_inverse():
    w, s = normal(0, 8, 6), None
    exact = lowrank.psoft(rank=3)
    s = started(exact, w, scale=0.05)
    errors = []
    for terms in (1, 2, 3, 4, 5, 9):
        series = lowrank.psoft(rank=3, terms=terms)
        errors.append(np.abs(merged(series, w, s) - merged(exact, w, s)).max())
    assert errors[2] == errors[3]
    assert errors[0] > 3 * errors[1] > 9 * errors[3] > 27 * errors[4]
    assert errors[-1] < 1e-6
    bounded = lowrank.psoft(rank=3, terms=9, bound=0.1)
    large = s | {"q": 5 * np.ones(3, np.float32)}
    limit = s | {"q": 0.1 / 6**0.5 * np.ones(3, np.float32)}
    close(merged(bounded, w, large), merged(exact, w, limit))


def preserved(shape, chain, steps=3):
    """How far training moves what `osf` preserves, in a few steps of an optimiser."""
    apply = lambda p, x: jax.lax.scan(lambda y, w: (y, x @ w), 0.0, p["w"])[1]
    params, x = {"w": normal(0, 2, *shape)}, normal(1, 5, shape[0])
    goal = normal(2, 2, 5, shape[1])
    adapter = lowrank.osf(keep=3)
    adapted, state = attached(apply, params, adapter, x)
    optimizer = chain(adapted)
    loss = lambda s: jnp.mean((adapted(params, s, x) - goal) ** 2)

    @jit
    def step(state, moments):
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(jax.grad(loss)(state), moments, state)
        return optax.apply_updates(state, updates), moments

    moments = jit(optimizer.init)(state)
    for _ in range(steps):
        state, moments = step(state, moments)
    folded = jit(lambda s: lowrank.fold(params, s, adapted))(state)["w"]
    worst = 0.0
    for w, now in zip(params["w"], folded, strict=True):
        u, _, v = np.linalg.svd(w)
        moved = np.asarray(now - w)
        assert np.abs(moved).max() > 1e-3
        worst = max(worst, np.abs(u[:, :3].T @ moved).max())
        worst = max(worst, np.abs(moved @ v[:3].T).max())
    return worst


ADAM = optax.adamw(0.02, weight_decay=0.1)


def test_osf_never_leaves_what_it_preserves_by_sgd():
    assert preserved((7, 5), lambda _: optax.sgd(0.05)) < 1e-5
    assert preserved((7, 5), lambda _: ADAM) > 1e-3


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)])
def test_with_preserve_osf_never_does(shape):
    both = lambda adapted: optax.chain(ADAM, lowrank.preserve(adapted))
    assert preserved(shape, both) < 1e-5


def test_osf_keeps_a_number_or_a_fraction():
    w = normal(0, 8, 6)
    for keep, low in ((None, 3), (2, 4), (0.9, 1)):
        assert lowrank.osf(keep=keep).init(KEY, w)["d"].shape == (low,)


def test_tinylora_trains_the_sum_of_fixed_directions():
    w = normal(0, 8, 6)
    adapter = lowrank.tinylora(rank=2, size=3)
    s = started(adapter, w, scale=1)
    u, d, v = np.linalg.svd(w)
    close(s["a"] @ s["b"], (u[:, :2] * d[:2]) @ v[:2])
    core = sum(s["v"][i] * s["p"][i] for i in range(3))
    close(update(adapter, w, s), s["a"] @ core.T @ s["b"])
    many = lowrank.tinylora(rank=2, size=200).init(KEY, w)["p"]
    close(many.std(), 0.5**0.5, 0.05)


def test_tinyloras_groups_share_a_vector():
    apply = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[
        0
    ]
    params, x = {"w": normal(0, 6, 4, 4)}, normal(1, 3, 4)
    adapter = lowrank.tinylora(size=5, groups=2)
    adapted, state = attached(apply, params, adapter, x)
    assert not state["w"]
    v = state.shared["tinylora"]["v"]
    assert v.shape == (2, 5)
    assert sorted(set(adapted.fixed["w"]["group"].tolist())) == [0, 1]
    state = state.replace(shared={"tinylora": {"v": v.at[1].add(0.3)}})
    folded = jit(lambda s: lowrank.fold(params, s, adapted))(state)["w"]
    changed = np.abs(folded - params["w"]).max((1, 2)) > 1e-3
    np.testing.assert_array_equal(changed, adapted.fixed["w"]["group"] == 1)


def test_uniloras_projection_is_an_isometry():
    """With entries chosen equally often, all factors are as long as the vector."""
    apply = lambda p, x: (x @ p["u"]) @ p["v"]
    params, x = {"u": normal(0, 6, 4), "v": normal(1, 4, 10)}, normal(2, 3, 6)
    adapter = lowrank.unilora(rank=2, size=4)
    adapted, state = attached(apply, params, adapter, x)
    shared = state.shared["unilora"] | adapted.fixed_shared["unilora"]
    theta, norm = (np.asarray(shared[name]) for name in ("theta", "norm"))
    assert np.abs(theta).max() <= 0.02
    total = 0.0
    for s in adapted.fixed.values():
        chosen = np.concatenate([np.ravel(s["index_a"]), np.ravel(s["index_b"])])
        counts = np.bincount(chosen, minlength=4)
        assert counts.max() - counts.min() <= 1
        total += np.sum((theta[chosen] * norm) ** 2)
    close(total, np.sum(theta**2), 1e-6)


def test_trainable_tokens_are_looked_up_and_change_nothing_else():
    table, tokens = jnp.asarray(normal(0, 9, 4)), jnp.array([[0, 5, 2], [5, 5, 8]])
    adapter = lowrank.trainable_tokens(indices=(5, 8))
    apply = lambda p, t: jnp.tanh(p["e"][t]) @ p["e"].T
    params = {"e": table}
    adapted, state = attached(apply, params, adapter, tokens)
    assert state["e"]["rows"].shape == (2, 4)
    rows = normal(1, 2, 4)
    state = state.replace(leaves={"e": {"rows": rows}})
    folded = lowrank.fold(params, state)["e"]
    close(folded, table.at[jnp.array([5, 8])].set(rows), 0)
    close(adapted(params, state, tokens), apply({"e": folded}, tokens), 1e-6)


def model(p, tokens):
    x = jnp.tanh(p["embed"][tokens] @ p["dense"])
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"])[0]


def mixed(ranks=(2, 3), scales=(4, 1)):
    """Two LoRAs on a look-up, a matrix and stacked layers, and their mixture."""
    shapes = {"embed": (9, 6), "dense": (6, 4), "layers": (3, 4, 4)}
    params = {n: normal(i, *shape) for i, (n, shape) in enumerate(shapes.items())}
    tokens, experts = jnp.arange(8).reshape(2, 4), []
    for i, (rank, alpha) in enumerate(zip(ranks, scales, strict=True)):
        lora = lowrank.lora(rank=rank, alpha=alpha)
        adapted, state = attached(model, params, lora, tokens)
        own = {p: moved(lora, s, 10 + i) for p, s in state.leaves.items()}
        experts.append((adapted, state.replace(leaves=own)))
    return params, tokens, experts, lowrank.xlora(experts)


def test_xlora_with_a_one_hot_gate_is_that_adapter():
    params, tokens, experts, mixture = mixed()
    run = jit(lambda g: mixture(params, lowrank.xlora_state(mixture, g), tokens))
    for i, (adapted, state) in enumerate(experts):
        gate = np.eye(2, dtype=np.float32)[i]
        want = jit(adapted)(params, state, tokens)
        close(run(gate), want)
        close(run(np.broadcast_to(gate, (2, 4, 2))), want)
    close(run(np.zeros(2, np.float32)), jit(model)(params, tokens))
    gates = np.array([0.3, 0.6], np.float32)
    state = jit(lambda g: lowrank.xlora_state(mixture, g))(gates)
    folded = jit(lambda s: lowrank.fold(params, s, mixture))(state)
    close(jit(model)(folded, tokens), run(gates))


def test_xlora_gates_differ_by_token():
    apply, w, x = lambda p, x: x @ p["w"], {"w": normal(0, 6, 4)}, normal(1, 5, 6)
    lora, pairs = lowrank.lora(rank=2), []
    for i in (0, 1):
        adapted, state = attached(apply, w, lora, x, key=jax.random.key(i))
        pairs.append((adapted, state.replace(leaves={"w": moved(lora, state["w"], i)})))
    mixture, gates = lowrank.xlora(pairs), np.abs(normal(4, 5, 2))
    run = lambda g: mixture(w, lowrank.xlora_state(mixture, g), x)
    base = x @ w["w"]
    changes = [np.asarray(jit(a)(w, s, x)) - base for a, s in pairs]
    close(jit(run)(gates), base + sum(gates[:, i, None] * changes[i] for i in (0, 1)))
    slots = lowrank.xlora_state(mixture, jnp.asarray(gates)[:, None], layerwise=True)
    close(slots["w"]["gates"], gates, 0)
    with pytest.raises(ValueError, match="no merged weight"):
        lowrank.fold(w, slots, mixture)
    with pytest.raises(ValueError, match="gates of 4 tokens, 5 rows"):
        jit(run)(gates[:4])
    with pytest.raises(ValueError, match="gates end in"):
        lowrank.xlora_state(mixture, jnp.asarray(gates)[:, :1])


def test_xlora_slots_are_the_layers_of_a_stack_in_turn():
    _, _, _, mixture = mixed()
    slots = jnp.arange(10.0).reshape(5, 2)
    state = lowrank.xlora_state(mixture, slots, layerwise=True)
    got = [state[p]["gates"].reshape(-1, 2) for p in state.leaves]
    close(jnp.concatenate(got), slots, 0)
    assert state["layers"]["gates"].shape == (3, 2)


def test_xlora_gates_are_a_softmax_of_the_hidden_states():
    make = lambda: lowrank.xlora_head(key=KEY, inputs=6, outputs=4, depth=2, size=5)
    head = jax.tree.map(np.asarray, jit(make)())
    hidden = normal(1, 2, 3, 6)

    def gates(experts=4, **options):
        run = ft.partial(lowrank.xlora_gates, experts=experts, **options)
        return np.asarray(jit(run)(head, hidden))

    inner = np.maximum(hidden @ head[0]["w"] + head[0]["b"], 0)
    logits = inner @ head[1]["w"] + head[1]["b"]
    close(gates(softmax=False), logits, 1e-6)
    twice = np.exp(2 * logits)
    close(gates(temperature=0.5), twice / twice.sum(-1, keepdims=True), 1e-6)
    top = gates(top_k=2)
    assert ((top > 0).sum(-1) == 2).all()
    close(top.max(-1), gates().max(-1), 0)
    close(gates(top_k=2, softmax_top_k=True).sum(-1), np.ones((2, 3)), 1e-6)
    assert gates(experts=2).shape == (2, 3, 2, 2)
    close(gates(experts=2).sum(-1), np.ones((2, 3, 2)), 1e-6)


def test_xlora_takes_plain_loras_of_the_same_leaves():
    params = {"u": normal(0, 4, 4), "w": normal(2, 1, 4, 4)}
    apply = lambda p, x: jnp.einsum("ebn,enm->ebm", x, p["w"]) @ p["u"]
    pair = lambda a, where: attached(apply, params, a, normal(3, 1, 5, 4), where=where)
    lora = lowrank.lora(rank=2)
    with pytest.raises(ValueError, match="at least one expert"):
        lowrank.xlora([])
    with pytest.raises(ValueError, match="other leaves"):
        lowrank.xlora([pair(lora, "u"), pair(lora, "w")])
    with pytest.raises(ValueError, match="'u' is no plain lora"):
        lowrank.xlora([pair(lowrank.hira(rank=2), "u")])
    mixture = lowrank.xlora([pair(lora, "w")])
    with pytest.raises(ValueError, match="'w' has experts"):
        lowrank.xlora_state(mixture, jnp.ones((5, 1)))


def attention(q, k, v):
    weights = np.exp(np.einsum("bshe,bthe->bhst", q, k))
    return np.einsum("bhst,bthe->bshe", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("size", [None, 5])
def test_a_prefix_is_attended_to_with_the_other_keys(size):
    prompt = lowrank.prefix_tuning(length=3, layers=2, heads=2, dim=8, size=size)
    s = jit(prompt.init)(KEY)
    keys, values = jax.tree.map(np.asarray, jit(prompt.apply)(s))
    assert keys.shape == values.shape == (2, 3, 2, 4)
    q, k, v = (normal(i, 2, 5, 2, 4) for i in range(3))
    k2, v2 = jit(lambda k, v: (prepend(keys[1], k), prepend(values[1], v)))(k, v)
    own = np.exp(np.einsum("bshe,bthe->bhst", q, k))
    extra = np.exp(np.einsum("bshe,the->bhst", q, keys[1]))
    want = np.einsum("bhst,bthe->bhse", own, v)
    want += np.einsum("bhst,the->bhse", extra, values[1])
    want /= (own.sum(-1) + extra.sum(-1))[..., None]
    close(attention(q, k2, v2), want.transpose(0, 2, 1, 3))
    if size is None:
        flat = np.asarray(s["prefix"]).reshape(3, 2, 2, 2, 4)
        close(keys[1], flat[:, 1, 0], 0)
        close(values[0], flat[:, 0, 1], 0)


@pytest.mark.parametrize("size", [None, 3])
def test_a_prefix_of_zeros_halves_what_uniform_attention_sees(size):
    options = {"length": 5, "layers": 1, "heads": 1, "dim": 4}
    prompt = lowrank.prefix_tuning(**options, size=size, zeros=True)
    keys, values = jit(lambda: prompt.apply(prompt.init(KEY)))()
    v = normal(0, 1, 5, 1, 4)
    zero = np.zeros_like(v)
    got = attention(zero, prepend(keys[0], zero), prepend(values[0], v))
    close(got, np.broadcast_to(v.mean(1, keepdims=True) / 2, v.shape))


def test_a_prompt_shifts_positions():
    prompt = lowrank.prompt_tuning(length=3, dim=4)
    p, x = jit(prompt.init)(KEY)["prompt"], normal(1, 2, 5, 4)
    y = np.asarray(prepend(prompt.apply({"prompt": p}), x))
    close(y[:, 3:], x, 0)
    close(y[0, :3], p, 0)
    close(y[1, :3], p, 0)
    labels = np.asarray(prepend(np.full(3, -100), np.ones((2, 5), np.int32)))
    assert (labels[:, :3] == -100).all()
    assert labels.shape == (2, 8)
    assert prepend(p, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    table = normal(2, 9, 4)
    sampled = lowrank.prompt_tuning(length=6, dim=4, table=jnp.asarray(table))
    for row in np.asarray(jit(sampled.init)(KEY)["prompt"]):
        assert (row == table).all(-1).any()


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tunings_encoder_is_the_network_it_names(encoder):
    prompt = lowrank.p_tuning(length=3, dim=4, size=5, encoder=encoder)
    s = jax.tree.map(np.asarray, jit(prompt.init)(KEY))
    x = np.float64(s["embedding"])
    sigmoid = lambda v: 1 / (1 + np.exp(-v))

    def run(layer, x):
        h, c, out = np.zeros(5), np.zeros(5), []
        for row in x:
            i, f, g, o = np.split(row @ layer["w"] + h @ layer["u"] + layer["b"], 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            out.append(h)
        return np.array(out)

    for ahead, back in s.get("lstm", ()):
        x = np.concatenate([run(ahead, x), run(back, x[::-1])[::-1]], 1)
    for i, layer in enumerate(s["mlp"]):
        x = (np.maximum(x, 0) if i else x) @ layer["w"] + layer["b"]
    close(jit(prompt.apply)(s), x)
    assert x.shape == (3, 4)
    assert len(s["mlp"]) == (2 if encoder == "lstm" else 3)
    assert isinstance(prompt, lowrank.Prompt)


BAD = {
    "c3a start": (lambda: lowrank.c3a(block=2, start="ones"), "start 'ones'"),
    "road variant": (lambda: lowrank.road(variant=3), "variant must be 1, 2 or 4"),
    "road group": (lambda: lowrank.road(group=3), "group must be even"),
    "miss mode": (lambda: lowrank.miss(rank=2, mode="cat"), "mode must be"),
    "shira mask": (lambda: lowrank.shira(rank=2, mask="all"), "mask must be"),
    "gralora rank": (lambda: lowrank.gralora(rank=3), "no multiple of the 2 blocks"),
    "gralora hybrid": (lambda: lowrank.gralora(rank=2, hybrid=-1), "at least 0"),
    "hira rank": (lambda: lowrank.hira(rank=0), "rank must be at least 1"),
    "tinylora size": (lambda: lowrank.tinylora(size=0), "must be at least 1"),
    "psoft terms": (lambda: lowrank.psoft(rank=2, terms=0), "terms must be at least"),
    "unilora size": (lambda: lowrank.unilora(size=0), "size must be at least 1"),
    "no token": (lambda: lowrank.trainable_tokens(indices=()), "each once"),
    "token twice": (lambda: lowrank.trainable_tokens(indices=(1, 1)), "each once"),
    "head": (
        lambda: lowrank.xlora_head(key=KEY, inputs=2, outputs=2, depth=0),
        "depth must be",
    ),
    "gates": (
        lambda: lowrank.xlora_gates([], jnp.ones((1, 3)), experts=2),
        "no multiple of 2 experts",
    ),
    "top k": (
        lambda: lowrank.xlora_gates([], jnp.ones((1, 2)), experts=2, top_k=3),
        "top_k must be in 1 to 2",
    ),
    "length": (lambda: lowrank.prompt_tuning(length=0, dim=2), "length must be"),
    "tokens": (lambda: lowrank.prompt_tuning(length=1, dim=2, tokens=(1,)), "pass it"),
    "table": (
        lambda: lowrank.prompt_tuning(length=1, dim=2, table=jnp.ones((3, 4))),
        "has not the width 2",
    ),
    "encoder": (
        lambda: lowrank.p_tuning(length=1, dim=2, size=2, encoder="gru"),
        "encoder must be",
    ),
    "heads": (
        lambda: lowrank.prefix_tuning(length=1, layers=1, heads=3, dim=4),
        "3 heads do not divide 4",
    ),
    "prompt": (
        lambda: lowrank.prepend(jnp.ones((2, 3)), jnp.ones((5, 4, 2))),
        "does not fit",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_named(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lowrank.c3a(block=3), r"block 3 does not divide a weight \[8, 6\]"),
        (lowrank.road(group=4), "group 4 does not divide the 6 outputs"),
        (lowrank.miss(rank=9), "rank 9 is above the 8 inputs"),
        (lowrank.miss(rank=4, mode="bat"), "rank 4 does not divide"),
        (lowrank.miss(rank=2, mode="mini", width=4), "width 4 does not divide"),
        (lowrank.shira(rank=4), "rank 4 has 56 entries"),
        (lowrank.shira(rank=1, mask="statistic"), "with no statistic"),
        (lowrank.gralora(rank=4, blocks=4), "blocks 4 does not divide"),
        (lowrank.gralora(rank=4, hybrid=4), "rank 8 is above"),
        (lowrank.osf(keep=6), "keep=6 preserves 6 of 6"),
        (lowrank.osf(keep=0.1), "preserves 0 of 6"),
        (lowrank.psoft(rank=7), "rank 7 is above"),
        (lowrank.trainable_tokens(indices=(8,)), "index 8 is no row"),
    ],
)
def test_options_that_do_not_fit_a_weight_are_named(adapter, message):
    with pytest.raises(ValueError, match=message):
        adapter.init(KEY, jnp.zeros((8, 6)))


PEERS = (("a", 6, 4), ("b", 4, 8), ("c", 8, 4))
WRITTEN = {
    "IA3": {"feedforward_modules": ["b"]},
    "MISS": {"r": 2, "init_weights": "bat"},
    "SHIRA": {"r": 1},
    "C3A": {"block_size": 2},
    "ROAD": {"variant": "road_4", "group_size": 2},
    "DELORA": {"r": 2},
    "GRALORA": {"r": 2, "hybrid_r": 1},
    "HIRA": {"r": 2},
    "TINYLORA": {"u": 5, "weight_tying": 1.0},
    "PSOFT": {"r": 3, "psoft_mag_a": False},
    "UNILORA": {"r": 2, "theta_d_length": 7, "save_indices": True},
    "OSF": {"effective_rank": 0.5, "rank_pattern": {"b": 1}},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_for_peft_is_read_back(name):
    kind, config = KINDS[name], DEFAULTS[name] | WRITTEN[name]
    layer = Layer("b", 4, 8, PEERS)
    adapter, w = kind.adapter(config, layer), normal(0, 4, 8)
    s = started(adapter, w)
    tensors = kind.write(s, config, layer)
    again = s | kind.read(tensors, config, layer)
    close(merged(adapter, w, again), merged(adapter, w, s))
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in s.items()}
    top = [t for t in tensors if t.split(".")[0] in kind.common_tensors]
    assert bool(top) == bool(kind.common)


def test_tied_tinyloras_share_with_their_neighbours():
    """Three layers, tied by 0.4, are two groups: the first one, and the other two."""
    config = DEFAULTS["TINYLORA"] | {"u": 2, "weight_tying": 0.4}
    vectors = {f"tinylora_v.{g}": np.full(2, g, np.float32) for g in range(3)}
    groups = []
    for path, n, m in PEERS:
        layer = Layer(path, n, m, PEERS)
        factors = {"tinylora_A": np.ones((2, n)), "tinylora_B": np.ones((m, 2))}
        tensors = vectors | factors | {"tinylora_P": np.ones((2, 2, 2))}
        s = KINDS["TINYLORA"].read(tensors, config, layer)
        groups.append((int(s["group"]), len(s["v"])))
    assert groups == [(0, 2), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match="ties neighbours"):
        KINDS["TINYLORA"].fields(lowrank.tinylora(groups=2))
    with pytest.raises(ValueError, match="the order of the layers is not known"):
        KINDS["TINYLORA"].adapter(config, Layer("a", 6, 4))


def test_unilora_draws_for_all_layers_at_once():
    """The counts of an entry over the whole model are those behind its scale."""
    config = DEFAULTS["UNILORA"] | {"r": 2, "theta_d_length": 9}
    counts, scales = np.zeros(9, int), np.zeros(9)
    for path, n, m in PEERS:
        tensors = {"unilora_theta_d": np.zeros(9)}
        s = KINDS["UNILORA"].read(tensors, config, Layer(path, n, m, PEERS))
        for side in "ab":
            index = s[f"index_{side}"].ravel()
            counts += np.bincount(index, minlength=9)
            scales[index] = s[f"scale_{side}"].ravel()
    assert counts.sum() == 2 * (10 + 12 + 12)
    assert counts.max() - counts.min() == 1
    close(scales, counts**-0.5, 1e-6)


def test_psoft_without_its_basis_is_refused():
    config = DEFAULTS["PSOFT"] | {"r": 3}
    tensors = {"psoft_R.weight": np.zeros(3)}
    with pytest.raises(ValueError, match="the file leaves out the basis"):
        KINDS["PSOFT"].read(tensors, config, Layer("a", 6, 4))
