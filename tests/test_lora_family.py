"""LoRA and its kin: what defines each, in closed form."""

import functools as ft

from adapters import gram, moved, slope
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import lowrank, measure

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)
N, M, R = 12, 8, 2
W = jax.random.normal(jax.random.key(1), (N, M))
GRAM, SLOPE = gram(jax.random.key(2), W), slope(jax.random.key(3), W)
SHIFTED = {
    "corda": (lowrank.corda(rank=R, alpha=3), GRAM),
    "corda/kpm": (lowrank.corda(rank=R, alpha=3, mode="kpm"), GRAM),
    "lora_ga": (lowrank.lora_ga(rank=R, alpha=3), SLOPE),
    "olora": (lowrank.olora(rank=R, alpha=3),),
    "pissa": (lowrank.pissa(rank=R, alpha=3),),
    "pissa/niter": (lowrank.pissa(rank=R, alpha=3, niter=2),),
}


def close(a, b, tolerance=1e-5):
    scale = float(np.abs(b).max()) + 1e-30
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def exact(x):
    return np.asarray(x, np.float64)


def best(x, rank):
    """The nearest matrix of a rank, and how far it is."""
    u, s, vt = np.linalg.svd(exact(x), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], np.linalg.norm(s[rank:])


@pytest.mark.parametrize("name", SHIFTED)
def test_the_base_is_kept_to_the_bit(name):
    adapter, *statistic = SHIFTED[name]
    s = jit(adapter.init)(KEY, W, *statistic)
    np.testing.assert_array_equal(adapter.merge(W, s), W)
    assert float(jnp.abs(s["a"] @ s["b"]).max()) > 1e-3


def test_pissa_trains_the_best_approximation():
    for name in ("pissa", "pissa/niter"):
        s = jit(SHIFTED[name][0].init)(KEY, W)
        close(1.5 * s["a"] @ s["b"], best(W, R)[0])
        close(s["a"].T @ s["a"], s["b"] @ s["b"].T, 1e-4)


def test_a_random_sketch_needs_iterations_on_a_flat_spectrum():
    w = jax.random.normal(KEY, (60, 50))
    lost = []
    for niter in (0, 4):
        s = jit(lowrank.pissa(rank=R, niter=niter).init)(KEY, w)
        lost.append(np.linalg.norm(exact(w) - exact(s["a"] @ s["b"])) / best(w, R)[1])
    assert 1 <= lost[1] < lost[0]
    assert lost[1] < 1.002


def test_olora_starts_at_orthonormal_rows():
    s = jit(SHIFTED["olora"][0].init)(KEY, W)
    close(s["b"] @ s["b"].T, np.eye(R))
    close(s["a"] @ s["b"], exact(W) @ exact(s["b"]).T @ exact(s["b"]))


def covariance(x, damp=0.01):
    c = exact(x) / np.trace(exact(x)) * len(x)
    return c + damp * np.eye(len(x))


def test_corda_parts_the_weight_by_what_the_context_uses():
    c = covariance(GRAM)
    large, small = (
        1.5 * exact(s["a"] @ s["b"])
        for s in (jit(SHIFTED[n][0].init)(KEY, W, GRAM) for n in ("corda", "corda/kpm"))
    )
    values = np.linalg.svd(c @ exact(W), compute_uv=False)
    kept = np.linalg.norm(c @ (exact(W) - large))
    close(kept, np.linalg.norm(values[R:]))
    close(np.linalg.norm(c @ small), np.linalg.norm(values[-R:]))
    plain = best(W, R)[0]
    assert kept < np.linalg.norm(c @ (exact(W) - plain))
    every = jit(lowrank.corda(rank=M).init)(KEY, W, GRAM)
    close(every["a"] @ every["b"], W, 1e-4)


def test_corda_of_inputs_that_span_little():
    few = jax.random.normal(KEY, (3, N))
    few = few.T @ few
    init = jit(SHIFTED["corda/kpm"][0].init)
    s = init(KEY, W, few)
    used = np.linalg.norm(exact(few) @ exact(s["a"] @ s["b"]))
    assert used < 0.02 * np.linalg.norm(exact(few) @ exact(W))
    close(init(KEY, W, 1000 * few)["a"], s["a"], 1e-3)
    none = jit(lowrank.corda(rank=R).init)(KEY, W, jnp.zeros((N, N)))
    close(none["a"] @ none["b"], best(W, R)[0])


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_the_first_step_of_lora_ga_is_that_of_full_fine_tuning(direction):
    """Along the best approximation of the gradient that rank 2 r allows."""
    adapter = lowrank.lora_ga(rank=R, alpha=3, direction=direction, gamma=4.0)
    s = jit(adapter.init)(KEY, W, SLOPE)
    loss = lambda t: jnp.sum(SLOPE * adapter.merge(W, s | t))
    trained = {n: s[n] for n in ("a", "b")}
    slopes = jax.grad(loss)(trained)
    step = sum(slopes[n] @ s["b"] if n == "a" else s["a"] @ slopes[n] for n in slopes)
    step = 1.5 * step
    close(step, 1.5**2 * (M**0.25 / 2.0) ** 2 * best(SLOPE, 2 * R)[0], 1e-4)


def test_eva_starts_where_the_inputs_vary():
    x = jax.random.normal(KEY, (30, N)) * jnp.linspace(3, 0.1, N)[None]
    apply, params = lambda p, x: x @ p["w"], {"w": W}
    grams = measure.gram(apply, params, x)
    for whiten in (False, True):
        adapter = lowrank.eva(rank=3, whiten=whiten)
        _, state = lowrank.attach(
            apply, params, adapter, x, where="w", key=KEY, statistics=grams
        )
        _, sigma, vt = np.linalg.svd(exact(x), full_matrices=False)
        want = vt[:3].T / (np.sqrt(sigma[:3]) if whiten else 1)
        close(np.abs(state["w"]["a"]), np.abs(want), 1e-4)
    dull = jit(adapter.init)(KEY, W, jnp.zeros((N, N)))
    assert np.array_equal(dull["a"], np.zeros((N, 3)))


def test_eva_ranks_go_to_the_leaves_that_explain_most():
    steep = jnp.diag(jnp.array([96.0, 2.0, 1.0, 1.0]))
    layers = jnp.stack([jnp.eye(4), jnp.diag(jnp.array([7.0, 1.0, 0.0, 0.0]))])
    grams = {"flat": jnp.eye(4), "layers": layers, "nil": jnp.zeros((4, 4))}
    grams["steep"] = steep
    ranks = lowrank.eva_ranks(grams, rank=2)
    # shares: steep .96, layers (.25 + .875) / 2, flat .25 four times, layers .1875, ...
    assert ranks == {"flat": 4, "layers": 3, "steep": 1}
    assert lowrank.eva_ranks(grams, rank=2, rho=1.0) == dict.fromkeys(grams, 2)
    for options in ({"rank": 0}, {"rank": 1, "rho": 0.5}):
        with pytest.raises(ValueError, match=r"at least 1|rho >= 1"):
            lowrank.eva_ranks(grams, **options)


def dora_state(adapter):
    return jit(lambda w: moved(adapter, adapter.init(KEY, w), scale=0.5))(W)


def test_doras_magnitudes_are_the_lengths_of_its_columns():
    adapter = lowrank.dora(rank=R, alpha=3)
    s = dora_state(adapter)
    close(np.linalg.norm(adapter.merge(W, s), axis=0), np.abs(s["magnitude"]))
    np.testing.assert_array_equal(adapter.merge(W, adapter.init(KEY, W)), W)


def test_dora_forms_no_matrix_of_the_weights_size():
    """Neither forward nor backward."""
    adapter, w = lowrank.dora(rank=R), jnp.ones((40, 56))
    s = adapter.init(KEY, w)
    loss = lambda s, x: jnp.sum(adapter.apply(x, w, s) ** 2)
    seen = jax.make_jaxpr(lambda s, x: jax.grad(loss)(s, x))(s, jnp.ones((3, 40)))
    sizes = [v.aval.size for eqn in seen.jaxpr.eqns for v in eqn.outvars]
    assert max(sizes) < 40 * 56
    assert "dot_general" in str(seen)


@pytest.mark.parametrize("detach", [True, False])
def test_dora_holds_the_norm_constant_in_its_slopes(detach):
    adapter = lowrank.dora(rank=R, alpha=3, detach=detach)
    s, x = dora_state(adapter), jax.random.normal(KEY, (5, N))
    norm = jnp.linalg.norm(W + 1.5 * s["a"] @ s["b"], axis=0)

    def plain(s):
        v = W + 1.5 * s["a"] @ s["b"]
        lengths = norm if detach else jnp.linalg.norm(v, axis=0)
        return x @ (v * (s["magnitude"] / lengths)[None])

    trained = ("a", "b", "magnitude")
    got, want = (
        jit(jax.grad(lambda s, f=f: jnp.sum(jnp.sin(f(s)))))(s)
        for f in (ft.partial(adapter.apply, x, W), plain)
    )
    for name in trained:
        close(got[name], want[name], 1e-4)


def test_dora_where_the_weight_and_its_update_cancel():
    adapter = lowrank.dora(rank=R, detach=False)
    w = W.at[:, 0].set(0)
    s = adapter.init(KEY, w)
    s |= {"a": w[:, 1:3], "b": jnp.zeros((R, M)).at[0, 1].set(-1.0).at[1, 2].set(-0.9)}
    x = jax.random.normal(KEY, (5, N))
    loss = lambda s: jnp.sum(adapter.apply(x, w, s) ** 2)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves(jit(jax.grad(loss))(s)))
    y = adapter.apply(x, w, s)
    assert float(jnp.abs(y[:, :2]).max()) < 1e-2
    close(y[:, 2:], (x @ w)[:, 2:], 1e-3)
    close(y, x @ adapter.merge(w, s), 1e-2)


def pruned(state):
    return [np.asarray(s["diag"] != 0) for s in state.leaves.values()]


ADALORA = lowrank.adalora(rank=4, alpha=6)


@ft.cache
def layered(adapter):
    """A leaf of three layers and one alone, adapted."""
    params = {"layers": jnp.stack([W[:M], W[4:], 2 * W[:M]]), "out": W[:M]}
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    apply = lambda p, x: jax.lax.scan(layer, x, p["layers"])[0] @ p["out"]
    x = jax.random.normal(KEY, (5, M))

    @jit
    def start(params):
        pair = lowrank.attach(apply, params, adapter, x, where="**", key=KEY)
        leaves = {p: moved(adapter, s, 5) for p, s in pair[1].leaves.items()}
        return pair[0], pair[1].replace(leaves=leaves)

    adapted, state = start(params)
    return adapted, params, state, x


def test_adalora_reaches_its_budget_exactly():
    _, _, state, _ = layered(ADALORA)
    allocator = lowrank.adalora_allocator(
        target=2, total=14, warmup=2, final=4, interval=2
    )
    assert isinstance(allocator, lowrank.Allocator)

    @jit
    def step(state, importance, count):
        key = jax.random.fold_in(KEY, count)
        slopes = jax.tree.map(lambda v: jax.random.normal(key, v.shape), state)
        importance = allocator.observe(importance, state, slopes, count)
        state = jax.tree.map(lambda v, g: v - 0.1 * g, state, slopes)
        return allocator.prune(state, importance, count), importance

    importance, kept, seen = jit(allocator.init)(state), [], []
    assert isinstance(importance, lowrank.Importance)
    for count in range(1, 15):
        state, importance = step(state, importance, count)
        kept.append(int(sum(v.sum() for v in pruned(state))))
        seen.append(importance)
    # 8 + floor(8 (1 - (t - 2) / 8)^3) of 16 triplets, at even steps and at the end
    assert kept[:2] == [16, 16]
    assert [kept[t - 1] for t in (4, 6, 8, 10)] == [11, 9, 8, 8]
    assert kept[10:] == [8, 8, 8, 8]
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(seen[8], seen[13])  # from step 10 = T - t_f on nothing is observed


def test_adaloras_importance_is_the_papers():
    """And of equal importance the first are kept."""
    _, _, state, _ = layered(ADALORA)
    allocator = lowrank.adalora_allocator(target=1, total=1, beta1=0.5, beta2=0.25)
    prune, observe = jit(allocator.prune), jit(allocator.observe)
    nothing = jax.tree.map(np.zeros_like, allocator.init(state))
    first = pruned(prune(state, nothing, 1))
    assert first[0].tolist() == [[True] * 4, [False] * 4, [False] * 4]
    assert first[1].tolist() == [False] * 4
    ones = jax.tree.map(np.ones_like, state)
    seen = observe(nothing, ones, ones, 0)
    close(seen.sensitivity["out"]["a"], np.full((M, 4), 0.5))
    close(seen.uncertainty["out"]["a"], np.full((M, 4), 0.375))
    # |w g| = 1, and s = I U = .5 (.75 |1 - .5|): one entry of Q counts 1 / m of one of
    # Lambda, which counts as much as a column of P
    zero = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), ones)
    zero["out"]["b"][1, 3] = 7.0
    zero["out"]["diag"][2] = 1.0
    zero["layers"]["a"][1, :, 0] = 2.0
    left = pruned(prune(ones, observe(nothing, ones, zero, 0), 1))
    assert left[0].tolist() == [[True] + [False] * 3, [True] + [False] * 3, [False] * 4]
    assert left[1].tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="target 5 is above"):
        lowrank.adalora_allocator(target=5, total=1).prune(ones, seen, 1)


def test_penalties_are_those_of_the_papers():
    eye = np.eye(M, 4, dtype=np.float32)
    for adapter, name in (
        (ADALORA, "adalora"),
        (lowrank.kasa(rank=4, alpha=3), "kasa"),
    ):
        _, _, state, _ = layered(adapter)
        matrices = [
            {n: exact(v)[i] if p == "layers" else exact(v) for n, v in s.items()}
            for p, s in state.leaves.items()
            for i in range(3 if p == "layers" else 1)
        ]
        apart = [
            np.linalg.norm(x @ x.T - np.eye(4))
            for s in matrices
            for x in (s["a"].T, s["b"])
        ]
        values = sum((s["diag"] ** 2).sum() for s in matrices)
        if name == "kasa":
            penalty = ft.partial(lowrank.kasa_penalty, beta=0.3, gamma=0.7)
            close(jit(penalty)(state), 0.3 * values + 0.7 * sum(apart))
        else:
            penalty = lowrank.adalora_penalty
            close(jit(penalty)(state), np.mean(apart))
        level = {"a": eye, "b": eye.T, "diag": np.zeros(4, np.float32)}
        like = lambda v, w: np.broadcast_to(v, w.shape)
        flat = {p: jax.tree.map(like, level, dict(s)) for p, s in state.leaves.items()}
        value, slopes = jit(jax.value_and_grad(penalty))(state.replace(leaves=flat))
        assert float(value) == 0
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(slopes))
    with pytest.raises(ValueError, match="no adapter of the state is adalora"):
        lowrank.adalora_penalty(state)


def test_kasa_drops_the_least_components():
    adapter = lowrank.kasa(rank=R)
    close(adapter.merge(W, adapter.init(KEY, W)), best(W, M - R)[0])


PLAIN = {
    "adalora": (ADALORA, 4),
    "kasa": (lowrank.kasa(rank=4, alpha=3), 8),
    "mica": (lowrank.mica(rank=4, alpha=3, rslora=True), 4),
    "pissa": (lowrank.pissa(rank=4, alpha=3), 8),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_lora_underneath(name):
    adapter, rank = PLAIN[name]
    adapted, params, state, x = layered(adapter)
    plain, s = lowrank.as_lora(adapted, state)
    assert {e["a"].shape[-1] for e in s.leaves.values()} == {rank}
    assert not jax.tree.leaves(plain)
    close(jit(plain)(params, s, x), jit(adapted)(params, state, x))
    want = lowrank.fold(params, state, adapted)
    jax.tree.map(close, lowrank.fold(params, s), want)


def test_dora_is_no_plain_lora():
    adapted, _, state, _ = layered(lowrank.dora(rank=R))
    with pytest.raises(ValueError, match="'layers': dora is no plain LoRA"):
        lowrank.as_lora(adapted, state)


def test_starts_of_lora():
    s = jit(lowrank.lora(rank=4, start="orthogonal").init)(KEY, W)
    assert float(jnp.abs(s["a"] @ s["b"]).max()) < 1e-7
    for name in ("a", "b"):
        assert 0.03 < np.std(s[name]) < 0.12  # 1 / (10 sqrt(2)) expected
    s = jit(lowrank.lora(rank=4, start="gaussian").init)(KEY, np.zeros((400, 8), "f4"))
    close(np.std(s["a"]), 0.25, 0.1)


def test_lora_plus_moves_b_faster():
    _, _, state, _ = layered(PLAIN["mica"][0])
    leaves = {p: {"a": s["a"], "b": s["a"]} for p, s in state.leaves.items()}
    state = state.replace(leaves=leaves)
    ones = jax.tree.map(np.ones_like, state)
    schedule = optax.linear_schedule(1.0, 0.0, 2)
    for rate, rates in ((0.5, (0.5, 0.5)), (schedule, (1.0, 0.5))):
        tx = lowrank.lora_plus(optax.sgd, learning_rate=rate, ratio=4.0)
        moments = tx.init(state)
        for now in rates:
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, moments = tx.update(ones, moments)
            assert isinstance(updates, lowrank.State)
            for s in updates.leaves.values():
                close(s["a"], -now * np.ones(s["a"].shape))
                close(s["b"], -4 * now * np.ones(s["b"].shape))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lowrank.lora(rank=2, start="zero"), "start must be .* got 'zero'"),
        (lambda: lowrank.lora(rank=3, start="orthogonal"), "an even rank"),
        (lambda: lowrank.pissa(rank=2, alpha=0.0), "alpha must be above 0 for pissa"),
        (lambda: lowrank.pissa(rank=2, niter=-1), "niter must be at least 0, got -1"),
        (lambda: lowrank.corda(rank=2, mode="both"), "mode must be .* got 'both'"),
        (lambda: lowrank.lora_ga(rank=2, direction="BA"), "direction .* got 'BA'"),
        (lambda: lowrank.lora_ga(rank=2, gamma=0.0), "gamma must be above 0"),
        (lambda: lowrank.lora_plus(optax.sgd, learning_rate=1, ratio=0.0), "ratio"),
        (lambda: lowrank.adalora_allocator(target=1, total=3, final=3), "total > warm"),
        (lambda: lowrank.adalora_allocator(target=1, total=3, beta1=1.0), "beta1"),
        (lambda: lowrank.eva(rank=2).init(KEY, W), r"eva needs .*\[12, 12\].*got none"),
        (lambda: lowrank.corda(rank=2).init(KEY, W, GRAM[:3]), r"of shape \(3, 12\)"),
        (lambda: lowrank.lora_ga(rank=2).init(KEY, W, GRAM), r"gradient \[12, 8\]"),
        (lambda: lowrank.lora_ga(rank=5).init(KEY, W, SLOPE), "2 . rank = 10 is above"),
        (lambda: lowrank.kasa(rank=M).init(KEY, W), "rank 8 leaves nothing"),
        (lambda: lowrank.dora(rank=9).init(KEY, W), r"above min\(n, m\)"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
