"""Modules beside the weights, against the papers' formulas and counts."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import erf, expit, log_softmax

from jaxlab import lowrank

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = jax.random.key(0)


def normal(seed, *shape, scale=1.0):
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return np.float32(scale) * drawn


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def moved(s, seed=8, scale=0.2):
    """Every entry off its start."""
    leaves, structure = jax.tree.flatten(s)
    drawn = [normal((seed, i), *v.shape, scale=scale) for i, v in enumerate(leaves)]
    return jax.tree.unflatten(structure, map(np.add, leaves, drawn))


def layers(p, x):
    """Two layers of a scan and one of its own."""
    x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
    return x @ p["out"]


LAYERS = {"layers": normal(1, 2, 6, 6), "out": normal(2, 6, 4)}
INPUT = normal(3, 5, 6)
BOTTLENECK = lowrank.bottleneck(rank=2)


@ft.cache
def starter(adapter):
    """Attaches an adapter to each leaf of the model."""

    @jit
    def start(params, key):
        return lowrank.attach(layers, params, adapter, INPUT, where="*", key=key)

    return start


def attached(adapter, seed=0):
    """The adapted model and its state, off its start."""
    adapted, state = starter(adapter)(LAYERS, jax.random.key(seed))
    return adapted, moved(state, seed + 5, 0.3)


# The unified table


def relu(z):
    return np.maximum(z, 0)


PUBLISHED = {
    "adapter": lambda x, h, d, u, s: h + relu(h @ d[1]) @ u,
    "parallel": lambda x, h, d, u, s: h + relu(x @ d[0]) @ u,
    "scaled_parallel": lambda x, h, d, u, s: h + s * relu(x @ d[0]) @ u,
    "heads_parallel": lambda x, h, d, u, s: h + relu(x @ d[0]) @ u,
    "lora": lambda x, h, d, u, s: h + s * (x @ d[0]) @ u,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_of_the_table_are_the_published_formulas(name):
    x, h, up = normal(0, 5, 6), normal(1, 5, 4), normal(2, 3, 4)
    down = normal(3, 6, 3), normal(4, 4, 3)
    design = lowrank.DESIGNS[name]
    assert isinstance(design, lowrank.Design)
    s = {"down": down[design.insertion == "sequential"], "up": up}
    got = jit(ft.partial(lowrank.modify, design=design, scale=2.5))(x, h, s)
    close(got, PUBLISHED[name](x, h, down, up, 2.5))


def test_adapters_are_rows_of_the_table_with_biases():
    w, x = normal(0, 6, 4), normal(1, 5, 6)
    h = x @ w
    for adapter, source, scale in (
        (lowrank.bottleneck(rank=3, scale=0.5), h, 0.5),
        (lowrank.parallel(rank=3), x, 1),
        (lowrank.scaled_parallel(rank=3), x, 4),
    ):
        s = moved(jit(adapter.init)(KEY, w))
        assert count(s) == 3 * (source.shape[1] + 4) + 3 + 4
        update = relu(source @ s["down"] + s["down_bias"]) @ s["up"]
        want = h + scale * (update + s["up_bias"])
        close(jit(adapter.apply)(x, w, s), want)
    lora, low = lowrank.lora(rank=3, alpha=6), normal(2, 6, 3)
    s = {"a": low, "b": normal(4, 3, 4)}
    same = {"down": s["a"], "up": s["b"]}
    run = jit(ft.partial(lowrank.modify, design=lowrank.DESIGNS["lora"], scale=2.0))
    close(run(x, h, same), jit(lora.apply)(x, w, s))


def test_a_bias_after_a_bottleneck_is_another_down_bias():
    w, x, b = normal(0, 6, 4), normal(1, 5, 6), normal(2, 4)
    adapter = lowrank.bottleneck(rank=3)
    s = moved(jit(adapter.init)(KEY, w))
    modify = jit(ft.partial(lowrank.modify, design=lowrank.DESIGNS["adapter"]))
    absorbed = s | {"down_bias": s["down_bias"] + b @ s["down"]}
    got = np.asarray(jit(adapter.apply)(x, w, absorbed)) + b
    close(got, modify(x, x @ w + b, s))


@pytest.mark.parametrize("masked", [False, True])
def test_a_prefix_is_a_gated_adapter_of_each_head(masked):
    """Equation 7: the gated sum is attention over prefix and sequence."""
    q, k, v = normal(0, 2, 5, 3, 4), normal(1, 2, 7, 3, 4), normal(2, 2, 7, 3, 4)
    parts = lowrank.mam(layers=2, heads=3, dim=12, length=6, size=8, rank=5)
    tuning = parts["attention"]
    state = moved(jit(tuning.init)(KEY))
    keys, values = (both[1] for both in jit(tuning.apply)(state))
    seen = (
        np.arange(7)[None] <= np.arange(5)[:, None] + 1
        if masked
        else np.full((5, 7), True)
    )
    mask = seen if masked else None
    attend = ft.partial(lowrank.prefix_attention, mask=mask)
    got = jit(attend)(q, k, v, keys, values)

    @jit
    def concatenated(q, k, v, keys, values):
        k, v = lowrank.prepend(keys, k), lowrank.prepend(values, v)
        both = jnp.concatenate([jnp.ones((5, len(keys)), bool), seen], 1)
        return jax.nn.dot_product_attention(q, k, v, mask=both[None, None])

    close(got, concatenated(q, k, v, keys, values))
    assert np.abs(got - concatenated(q, k, v, keys[:0], values[:0])).max() > 0.05
    assert parts["ffn"] == lowrank.scaled_parallel(rank=5, scale=4.0)


def test_a_query_that_sees_nothing_sees_the_prefix():
    q, keys, values = normal(0, 3, 2, 4), normal(1, 6, 2, 4), normal(2, 6, 2, 4)
    attend = ft.partial(lowrank.prefix_attention, mask=np.zeros((3, 3), bool))
    got = jit(attend)(q, q, q, keys, values)
    close(got, jit(jax.nn.dot_product_attention)(q, keys, values))


def test_what_acts_on_outputs_cannot_be_folded():
    adapted, state = attached(BOTTLENECK)
    with pytest.raises(ValueError, match="bottleneck of 'layers' cannot be folded"):
        lowrank.fold(LAYERS, state, adapted)


def test_two_rules_or_networks_of_one_method_are_refused():
    both = {"layers": lowrank.compacter(rank=4, divisions=2)}
    both["out"] = lowrank.compacter(rank=2, divisions=2)
    with pytest.raises(ValueError, match="two compacter adapters of other options"):
        jax.eval_shape(
            lambda p: lowrank.attach(layers, p, both, INPUT, key=KEY), LAYERS
        )


# Compacter, Hyperformer, and tasks that share


def test_compacter_is_a_bottleneck_of_kronecker_sums():
    w, x = normal(0, 5, 12), normal(1, 7, 5)
    adapter = lowrank.compacter(rank=8, divisions=4, factors=2, form="linear")
    fresh, shared = jit(adapter.init)(KEY, w), adapter.shared(KEY, (w.shape,))
    m, r, q, n = 12, 8, 2, 4
    assert count(fresh) == 2 * q * (m + r) + m + r
    assert count(shared) == n**3
    s = moved(fresh | shared)
    dense = lambda left, right: sum(
        np.kron(s["rule"][i], s[left][i] @ s[right][i]) for i in range(n)
    )
    down, up = dense("down_left", "down_right"), dense("up_left", "up_right")
    assert down.shape == (m, r)
    y = x @ w
    want = y + (y @ down + s["down_bias"]) @ up + s["up_bias"]
    close(jit(adapter.apply)(x, w, s), want)


def test_layers_share_one_rule():
    adapter = lowrank.compacter(rank=4, divisions=2)
    adapted, state = attached(adapter)
    assert state.shared["compacter"]["rule"].shape == (2, 2, 2)
    assert state["layers"]["down_left"].shape == (2, 2, 3, 1)
    slopes = jit(jax.grad(lambda s: adapted(LAYERS, s, INPUT).sum()))(state)
    assert np.abs(slopes.shared["compacter"]["rule"]).max() > 0


HYPER = lowrank.hyperformer(rank=2, embedding=4, hidden=6, projected=5, form="relu")


def generated(s, m, r=2):
    """The weights that a task and a layer have, by equations 2 to 5."""
    z = relu(np.concatenate([s["task"], s["layer"]]) @ s["mix_in"] + s["mix_in_shift"])
    z = z @ s["mix_out"] + s["mix_out_shift"]
    z = (z - z.mean()) / np.sqrt(z.var() + 1e-6) * s["norm_scale"] + s["norm_bias"]
    make = lambda name: z @ s[f"{name}_{m}"] + s[f"{name}_{m}_shift"]
    down, up = make("down").reshape(m, r), make("up").reshape(r, m)
    return down, make("down_bias"), up, make("up_bias")


def test_hyperformer_generates_the_weights_of_each_task_and_layer():
    adapted, state = attached(HYPER)
    shared = state.shared["hyperformer"]
    e, h, p, r = 4, 6, 5, 2
    by_size = sum((p + 1) * (2 * m * r + m + r) for m in (6, 4))
    assert count(shared) == e + (2 * e + 1) * h + (h + 1) * p + 2 * p + by_size
    assert count(state.leaves) == 3 * e
    own = [state["layers"]["layer"][0], state["layers"]["layer"][1]]
    own.append(state["out"]["layer"])

    def by_hand(shared):
        x = INPUT
        for i, w in enumerate([*LAYERS["layers"], LAYERS["out"]]):
            y = x @ w
            down, b, up, c = generated(shared | {"layer": own[i]}, y.shape[1])
            y = y + relu(y @ down + b) @ up + c
            x = np.tanh(y) if i < 2 else y
        return x

    close(jit(adapted)(LAYERS, state, INPUT), by_hand(shared), 1e-4)
    other = shared | {"task": normal(9, 4)}
    states = [state, state.replace(shared={"hyperformer": other})]
    tasks = lowrank.share_tasks(states, own=("task",))
    assert count(tasks) == count(state) + e
    run = jit(lambda p, s, x, i: adapted(p, lowrank.of_task(s, i), x))
    for i, one in enumerate((shared, other)):
        close(run(LAYERS, tasks, INPUT, i), by_hand(one), 1e-4)
    assert np.abs(by_hand(shared) - by_hand(other)).max() > 0.02


DOWN, UP = ("down", "down_bias"), ("up", "up_bias")


@pytest.mark.parametrize("own", [(), DOWN, UP, DOWN + UP])
def test_adapters_of_tasks_share_none_half_or_all(own):
    """VL-Adapter's single, half-shared and multiple adapters."""
    states = [attached(BOTTLENECK, seed)[1] for seed in range(3)]
    tasks = lowrank.share_tasks(states, own=own)
    assert isinstance(tasks, lowrank.Tasks)
    each = [count([s[n] for s in states[0].leaves.values() for n in own])]
    assert count(tasks) == count(states[0]) + 2 * each[0]
    pick = jit(jax.vmap(lambda i: lowrank.of_task(tasks, i)))
    picked = pick(np.arange(3))
    for i, state in enumerate(states):
        one = lowrank.of_task(tasks, i)
        assert jax.tree.structure(one) == jax.tree.structure(state)
        for path, s in one.leaves.items():
            for name, v in s.items():
                source = state if name in own else states[0]
                np.testing.assert_array_equal(v, source[path][name])
                np.testing.assert_array_equal(v, picked[path][name][i])


def test_all_tasks_train_what_they_share():
    adapted, _ = attached(BOTTLENECK)
    states = [attached(BOTTLENECK, seed)[1] for seed in range(2)]
    tasks = lowrank.share_tasks(states, own=UP)

    def loss(tasks, i):
        return (adapted(LAYERS, lowrank.of_task(tasks, i), INPUT) ** 2).sum()

    one, two = (jit(jax.grad(loss))(tasks, i) for i in (0, 1))
    for slopes, other in ((one, 1), (two, 0)):
        assert np.abs(slopes.own["out"]["up"][other]).max() == 0
        assert np.abs(slopes.own["out"]["up"][1 - other]).max() > 0
        assert np.abs(slopes.common["out"]["down"]).max() > 0


# ScaLearn


@ft.cache
def trained_sources():
    """Three trained adapters, what `attach` takes, and what each computes."""
    source = lowrank.compacter(rank=2, divisions=2)
    pairs = [attached(source, seed) for seed in range(3)]
    states = [state for _, state in pairs]
    run, adapted = jit(pairs[0][0]), [adapted for adapted, _ in pairs]
    outputs = [run(LAYERS, state, INPUT) for state in states]
    return source, lowrank.scalearn_sources(states, adapted), outputs


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_scalearn_counts_and_a_single_source(uniform, shared):
    """T m L, T L, T m or T numbers; a one-hot scale is that source."""
    source, statistics, outputs = trained_sources()
    adapter = lowrank.scalearn(source, sources=3, uniform=uniform, shared=shared)

    @jit
    def start(params, statistics):
        return lowrank.attach(
            layers, params, adapter, INPUT, where="*", key=KEY, statistics=statistics
        )

    adapted, state = start(LAYERS, statistics)
    sizes = [1] * 3 if uniform else [6, 6, 4]
    assert count(state) == 3 * sum(set(sizes) if shared else sizes)
    for leaf in jax.tree.leaves(state):
        close(leaf, np.full(leaf.shape, 2 / 3), 0.01)
    run = jit(adapted)
    for scales, output in zip(np.eye(3, dtype="f"), outputs, strict=True):
        hot = lambda v, e=scales: np.zeros(v.shape, "f") + e[:, None]
        close(run(LAYERS, jax.tree.map(hot, state), INPUT), output)
    none = jax.tree.map(np.zeros_like, state)
    close(run(LAYERS, none, INPUT), jit(layers)(LAYERS, INPUT))


def test_scalearn_scales_updates_by_output():
    w, x = normal(0, 6, 4), normal(1, 5, 6)
    source = lowrank.bottleneck(rank=2)
    start = jit(jax.vmap(source.init, (0, None)))
    sources = moved(start(jax.random.split(KEY, 3), w))
    adapter = lowrank.scalearn(source, sources=3)
    omega = normal(2, 3, 4)
    run = jit(jax.vmap(source.apply, (None, None, 0)))
    each = np.asarray(run(x, w, sources))
    want = x @ w + sum(omega[t] * (each[t] - x @ w) for t in range(3))
    close(jit(adapter.apply)(x, w, {"sources": sources, "omega": omega}), want)
    with pytest.raises(ValueError, match="got 3 sources, expected 2"):
        lowrank.scalearn(source, sources=2).init(KEY, w, sources)


def test_scalearn_finds_how_sources_make_a_target():
    """Trained on a mixture of two sources alone, the scales are its weights."""
    source = lowrank.lora(rank=2)
    w, x = normal(0, 6, 4), normal(1, 40, 6)
    start = jit(jax.vmap(source.init, (0, None)))
    sources = moved(start(jax.random.split(KEY, 3), w))
    adapter = lowrank.scalearn(source, sources=3, uniform=True)
    weights = np.array([[0.7], [0.0], [-0.4]], "f")
    fixed = {"sources": sources}

    @jit
    def train(w, x, fixed, weights):
        goal = adapter.apply(x, w, fixed | {"omega": weights})
        loss = lambda o: jnp.mean(
            (adapter.apply(x, w, fixed | {"omega": o}) - goal) ** 2
        )
        step = lambda _, o: o - 0.5 * jax.grad(loss)(o)
        return jax.lax.fori_loop(0, 400, step, jnp.full_like(weights, 2 / 3))

    close(train(w, x, fixed, weights), weights, 1e-2)


def test_sources_of_other_leaves_are_refused():
    one = attached(BOTTLENECK)[1]
    adapter = lowrank.lora(rank=2)
    other = attached(adapter)[1]
    with pytest.raises(ValueError, match="of other leaves or adapters"):
        lowrank.scalearn_sources([one, other])
    with pytest.raises(ValueError, match="of other leaves or adapters"):
        lowrank.share_tasks([one, other], own=())
    with pytest.raises(IndexError, match="task 2 of 2"):
        lowrank.of_task(lowrank.share_tasks([one, one], own=UP), 2)


# Moment Probing


def covariances(params, x, heads):
    """MHC3 before its convolutions, head by head."""
    z = x @ params["project"] + params["project_bias"]
    parts = []
    for part in np.split(z, heads, -1):
        unit = part - part.mean(-1, keepdims=True)
        unit = unit / np.sqrt(part.var(-1, keepdims=True) + 1e-5)
        unit = unit * params["norm_scale"] + params["norm_bias"]
        parts.append(unit - unit.mean())
    out = []
    for one, two in itertools.pairwise(parts):
        moment = one.T @ two / len(x)
        out.append(moment / np.linalg.norm(moment, axis=0, keepdims=True))
    return np.stack(out, -1)


def test_moment_probing_sees_cross_covariances_of_neighbouring_heads():
    head = lowrank.moment_probing(classes=18, dim=9, heads=3, depth=0)
    params = moved(jit(head.init, static_argnums=1)(KEY, 5))
    x, mean = normal(1, 2, 7, 5), normal(2, 2, 5)
    params["second"], params["second_bias"] = np.eye(18, dtype="f"), np.zeros(18, "f")
    run = jit(head.apply)
    got = np.asarray(run(params, x, mean))
    first = mean @ params["first"] + params["first_bias"]
    want = np.stack([covariances(params, tokens, 3).ravel() for tokens in x])
    close(2 * got - first, want)
    by_mean = run(params, x)
    close(2 * (by_mean - got), (x.mean(1) - mean) @ params["first"])


def test_moment_probing_convolves_the_covariances():
    head = lowrank.moment_probing(classes=2, dim=21, heads=3, depth=2)
    params = moved(jit(head.init, static_argnums=1)(KEY, 5))
    x = normal(1, 6, 5)
    image = covariances(params, x, 3)
    for i in range(2):
        kernel, side = params[f"convolution_{i}"], (image.shape[0] - 3) // 2 + 1
        image = image * (1 + erf(image / np.sqrt(2))) / 2 if i else image
        cut = lambda a, b, z=image: z[2 * a : 2 * a + 3, 2 * b : 2 * b + 3]
        dot = lambda a, b, c=cut, k=kernel: np.tensordot(c(a, b), k, 3)
        image = np.array([[dot(a, b) for b in range(side)] for a in range(side)])
    second = image.ravel() @ params["second"] + params["second_bias"]
    first = x.mean(0) @ params["first"] + params["first_bias"]
    close(jit(head.apply)(params, x), (first + second) / 2)
    published = lowrank.moment_probing(classes=10)
    shapes = jax.eval_shape(lambda k: published.init(k, 768), KEY)
    assert shapes["second"].shape == (2883, 10)


def test_moment_probing_has_slopes_where_all_tokens_are_equal():
    head = lowrank.moment_probing(classes=2, dim=28)
    params = jit(head.init, static_argnums=1)(KEY, 5)
    run = jit(jax.grad(lambda p, x: (head.apply(p, x) ** 2).sum()))
    for x in (np.ones((6, 5), "f"), normal(1, 6, 5)):
        slopes = run(params, x)
        assert all(np.isfinite(v).all() for v in jax.tree.leaves(slopes))
    assert np.abs(slopes["project"]).max() > 0


def fitted(logits, params, x, y):
    """The accuracy after some steps of Adam on all of a head."""
    optimizer = optax.adam(0.02)

    def loss(params):
        scores = jax.nn.log_softmax(logits(params, x))
        return -scores[jnp.arange(len(y)), y].mean()

    def step(_, carry):
        params, moments = carry
        with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
            updates, moments = optimizer.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    params, _ = jax.lax.fori_loop(0, 120, step, (params, optimizer.init(params)))
    return (logits(params, x).argmax(-1) == y).mean()


def test_moment_probing_tells_what_means_do_not():
    """Tokens of mean zero, whose first two features agree or disagree in sign."""
    sign = np.arange(40) % 2
    x = normal(1, 40, 12, 6)
    x[..., 1] = x[..., 0] * (2 * sign - 1)[:, None]
    x = x - x.mean(1, keepdims=True)
    head = lowrank.moment_probing(classes=2, dim=12, heads=2, depth=0)
    params = jit(head.init, static_argnums=1)(KEY, 6)
    run = jit(ft.partial(fitted, head.apply))
    assert run(params, x, sign) > 0.9
    first = {"first": params["first"], "first_bias": params["first_bias"]}
    linear = lambda p, x: x.mean(1) @ p["first"] + p["first_bias"][None]
    assert jit(ft.partial(fitted, linear))(first, x, sign) < 0.7


def test_psrp_scales_and_shifts_from_one_layer():
    module = lowrank.psrp(rank=3)
    assert isinstance(module, lowrank.Module)
    params, x, h = module.init(KEY, 4), normal(1, 5, 4), normal(2, 5, 4)
    assert count(params) == 3 * 3 * 4
    run = jit(module.apply)
    np.testing.assert_array_equal(run(params, x, h), h)
    params = moved(params)
    r = relu(x @ params["down"])
    want = h + (r @ params["scale"]) * h + r @ params["shift"]
    close(run(params, x, h), want)


# DVPT


def test_dynamic_prompts_are_what_the_example_answers():
    module = lowrank.dvpt(prompts=2, rank=3)
    params, x = module.init(KEY, 4), normal(1, 2, 5, 4)
    run = jit(module.apply)
    np.testing.assert_array_equal(run(params, x), x)
    params = moved(params)
    got = np.asarray(run(params, x))
    for one, tokens in zip(got, x, strict=True):
        h = tokens @ params["down"] + params["down_bias"]
        h = h / (1 + np.exp(-1.702 * h))
        weights = np.exp(params["prompts"] @ h.T / np.sqrt(3))
        found = weights / weights.sum(1, keepdims=True) @ h
        z = h + np.concatenate([found, np.zeros((3, 3))])
        update = z @ params["up"] + params["up_bias"]
        close(one, tokens + params["gate"] * update)
    swapped = run(params, x[:, [0, 1, 4, 3, 2]])
    close(swapped[:, :2], got[:, :2])  # prompts see the tokens in any order


# ConTraCon


@pytest.mark.parametrize("drawn", [False, True])
def test_contracon_convolves_each_head(drawn):
    w, k, heads, step = normal(0, 6, 8), 3, 2, 1 + drawn
    adapter = lowrank.contracon(heads=heads, kernel=k, dilation=step, drawn=drawn)
    s, merge = jit(adapter.init)(KEY, w), jit(adapter.merge)
    assert count(s) == heads * (k * k + 2)
    assert np.allclose(merge(w, s), w, atol=1e-6) != drawn
    s = moved(s)
    want = []
    for head in range(heads):
        part = w[:, 4 * head : 4 * head + 4]
        padded, to = np.pad(part, step), 2 * step + 1
        cut = lambda a, b, z=padded, to=to: z[a : a + to : step, b : b + to : step]
        dot = lambda a, b, c=cut, i=head: (c(a, b) * s["kernel"][i]).sum()
        convolved = np.array([[dot(a, b) for b in range(4)] for a in range(6)])
        want.append(convolved + s["shift"][head] + expit(s["gate"][head]) * part)
    close(merge(w, s), np.concatenate(want, 1))


def test_the_surest_task_is_chosen():
    """By the entropy of the mean over augmentations, not the mean entropy."""
    choose = jit(lowrank.contracon_task)
    torn = np.array([[[9.0, 0.0], [0.0, 0.2]], [[0.0, 9.0], [0.0, 0.3]]])
    steady = np.array([[[3.0, 0.0, 0.0], [9.0, 0, 0]], [[3.0, 0, 0], [9.0, 0, 0]]])
    flat = np.zeros((2, 2, 4))
    assert choose([torn, steady, flat]).tolist() == [1, 1]
    assert choose([steady, flat]).tolist() == [0, 0]
    assert choose([torn[:1], steady]).tolist() == [0, 1]


# DR-Tune


def turned(dim=4):
    """A proper rotation."""
    q = np.linalg.qr(normal(11, dim, dim))[0]
    q[:, 0] *= np.sign(np.linalg.det(q))
    return q


def test_a_rotation_of_the_features_is_found():
    tune, rotation = lowrank.dr_tune(size=12), turned()
    assert isinstance(tune, lowrank.DRTune)
    bank, x = tune.init(4), normal(1, 9, 4)
    assert isinstance(bank, lowrank.FeatureBank)
    bank = jit(tune.push)(bank, 3 * x, x @ rotation.T, np.arange(9) % 3)
    find = jit(tune.rotation)
    close(find(bank), rotation)
    mirror = np.array([-1, 1, 1, 1], "f")
    mirrored = bank._replace(tuned=np.asarray(bank.tuned) * mirror)
    assert np.linalg.det(find(mirrored)) > 0.999


def test_calibrated_classes_lie_where_the_tuned_ones_do():
    tune, rotation = lowrank.dr_tune(size=10), turned()
    x, labels = normal(1, 8, 4), np.arange(8) % 2
    drift = np.array([[0.5, 0, 0, 0], [0, 0.4, 0, 0]], "f")[labels]
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
    tuned = unit(x) @ rotation.T + drift
    bank = jit(tune.push)(tune.init(4), 2 * x, tuned, labels)
    prototypes = normal(2, 4, 3)
    got = np.asarray(jit(tune.calibrate)(bank, prototypes, np.float32(1.5), rotation))
    close(np.linalg.norm(got[:8], axis=1), np.full(8, 1.5))
    features, near = unit(x) @ rotation.T, unit(tuned)
    for c in range(2):
        mine = labels == c
        cosine = near[mine] @ unit(prototypes[:, c])
        share = np.exp(cosine) / np.exp(cosine).sum()
        step = share @ near[mine] - features[mine].mean(0)
        close(got[:8][mine], 1.5 * unit(features[mine] + step))
    assert np.isfinite(got).all()


def test_the_bank_keeps_the_last_and_the_loss_counts_them():
    tune = lowrank.dr_tune(size=3)
    bank, push = tune.init(2), jit(tune.push)
    for i in range(2):
        x = np.full((2, 2), i + 1, "f")
        bank = push(bank, x, 2 * x, np.array([0, 1]))
    assert np.asarray(bank.pretrained)[:, 0].tolist() == [2, 1, 2]
    assert bank.labels.tolist() == [1, 1, 0]
    logits, labels = normal(1, 2, 3), np.array([2, 0])
    theirs, old = normal(2, 3, 3), np.array([1, -1, 0])
    logs = log_softmax(np.concatenate([logits, theirs]), axis=1)
    want = -(logs[0, 2] + logs[1, 0] + logs[2, 1] + logs[4, 0]) / 4
    close(jit(tune.loss)(logits, labels, theirs, old), want)
    with pytest.raises(ValueError, match="a batch of 4 is larger than a bank of 3"):
        tune.push(bank, jnp.ones((4, 2)), jnp.ones((4, 2)), jnp.zeros(4, int))


def test_a_class_that_the_bank_lacks_is_not_moved_and_only_heads_have_slopes():
    tune = lowrank.dr_tune(size=4)
    x, tuned = normal(1, 2, 3), normal(2, 2, 3)
    bank = jit(tune.push)(tune.init(3), x, tuned, np.array([0, 0]))
    prototypes = normal(3, 3, 2)

    def loss(prototypes, x, tuned):
        bank = tune.push(tune.init(3), x, tuned, jnp.array([0, 0]))
        calibrated = tune.calibrate(bank, prototypes, jnp.float32(1))
        logits = calibrated @ prototypes
        return tune.loss(tuned @ prototypes, jnp.array([0, 1]), logits, bank.labels)

    slopes = jit(jax.grad(loss, (0, 1, 2)))(prototypes, x, tuned)
    assert np.abs(slopes[0]).max() > 0
    assert np.abs(slopes[1]).max() == 0
    assert np.isfinite(slopes[2]).all()
    moved_only = jit(tune.calibrate)(bank, prototypes, np.float32(1))
    other = prototypes * np.array([1, -3], "f")  # of the class without features
    again = jit(tune.calibrate)(bank, other, np.float32(1))
    np.testing.assert_array_equal(moved_only, again)
    assert np.abs(moved_only[2:]).max() == 0


# Reprogramming


def votes(table):
    """Logits and labels whose predictions make a table [sources, targets]."""
    pairs = [(s, t) for (s, t), n in np.ndenumerate(table) for _ in range(n)]
    sources, targets = np.array(pairs).T
    return np.eye(len(table), dtype="f")[sources], targets


def test_a_label_map_by_frequency_is_the_best_assignment_where_classes_are_clear():
    table = np.array([[1, 7, 0], [5, 2, 0], [0, 0, 4], [2, 1, 3], [0, 0, 0]])
    got = lowrank.label_map(*votes(table), classes=3)
    rows, columns = linear_sum_assignment(-table)
    assert got[:, 0].tolist() == rows[np.argsort(columns)].tolist()
    greedy = np.array([[5, 4], [4, 0], [0, 0]])  # the best sum is 8, the greedy 5
    assert lowrank.label_map(*votes(greedy), classes=2).tolist() == [[0], [1]]


def test_several_sources_stand_for_a_class():
    table = np.array([[9, 8], [7, 6], [0, 5], [1, 2], [0, 0]])
    got = lowrank.label_map(*votes(table), classes=2, each=2)
    assert got.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="5 sources are too few for 3 x 2"):
        lowrank.label_map(*votes(table), classes=3, each=2)


def test_sources_of_a_label_map_are_all_different():
    logits, labels = normal(1, 50, 9), np.arange(50) % 3
    for each in (1, 3):
        chosen = np.asarray(lowrank.label_map(logits, labels, classes=3, each=each))
        assert chosen.shape == (3, each)
        assert len(set(chosen.ravel().tolist())) == 3 * each
    silent = lowrank.label_map(logits[:1], labels[:1], classes=3)
    first = int(logits[0].argmax())
    rest = [i for i in range(9) if i != first][:2]
    assert silent[:, 0].tolist() == [first, *rest]


def test_a_frame_and_a_border():
    image = normal(0, 2, 3, 4, 1)
    frame = lowrank.visual_prompt(size=6)
    params = {"program": normal(1, 6, 6, 1)}
    got = np.asarray(jit(frame.apply)(params, image))
    np.testing.assert_array_equal(got[:, 2:5, 1:5], image)
    around = np.ones((6, 6), bool)
    around[2:5, 1:5] = False
    close(got[0][around], expit(params["program"])[around])
    border = lowrank.visual_prompt(size=6, pad=2)
    images = normal(2, 2, 6, 6, 1)
    got = np.asarray(jit(border.apply)(params, images)) - images
    close(got[1, :2], params["program"][:2])
    assert np.abs(got[:, 2:4, 2:4]).max() == 0
    with pytest.raises(ValueError, match="images of 3 x 4 for a prompt of 6"):
        border.apply(params, image)


def test_a_prompt_and_a_map_remade_each_epoch_turn_a_network_to_a_new_task():
    """Dense and pruned: the weights stay, the prompt's loss falls."""

    def apply(p, x):
        return jnp.tanh(x.reshape(len(x), -1) @ p["one"]) @ p["two"]

    dense = {"one": normal(1, 16, 8), "two": normal(2, 8, 5)}
    sparse = jax.tree.map(lambda w: w * (np.abs(w) > 0.7), dense)
    prompt = lowrank.visual_prompt(size=4)
    model = lowrank.reprogram(apply, prompt)
    labels = np.arange(16) % 2
    images = normal(3, 16, 2, 2, 1, scale=0.2)
    images = images + labels[:, None, None, None].astype("f")

    @jit
    def epoch(params, s):
        shown = apply(params, prompt.apply(s, images))
        mapping = lowrank.label_map(shown, labels, classes=2)

        def loss(s):
            logits = model(params, s, mapping, images)
            return -jax.nn.log_softmax(logits)[jnp.arange(16), labels].mean()

        value, slopes = jax.value_and_grad(loss)(s)
        return jax.tree.map(lambda v, g: v - 2.0 * g, s, slopes), value

    for params in (dense, sparse):
        s, values = prompt.init(KEY, 1), []
        for _ in range(20):
            s, value = epoch(params, s)
            values.append(float(value))
        assert values[-1] < 0.8 * values[0]


# All modules


def half(name):
    """A module on bfloat16: its function, its parameters and its inputs."""
    low = lambda *shape: normal(2, *shape).astype(jnp.bfloat16)
    if name == "prefix":
        keys = normal(1, 2, 3, 4)
        return (
            lambda p, *x: lowrank.prefix_attention(*x, p, p),
            keys,
            (low(5, 3, 4),) * 3,
        )
    module, size, inputs = {
        "psrp": (lowrank.psrp(rank=2), 4, (low(5, 4), low(5, 4))),
        "dvpt": (lowrank.dvpt(prompts=2, rank=3), 4, (low(2, 5, 4),)),
        "frame": (lowrank.visual_prompt(size=6), 2, (low(3, 4, 4, 2),)),
        "border": (lowrank.visual_prompt(size=4, pad=1), 2, (low(3, 4, 4, 2),)),
    }[name]
    return module.apply, moved(module.init(KEY, size)), inputs


@pytest.mark.parametrize("name", ["prefix", "psrp", "dvpt", "frame", "border"])
def test_parameters_are_wide_and_outputs_as_the_inputs(name):
    apply, params, inputs = half(name)
    assert all(v.dtype == np.float32 for v in jax.tree.leaves(params))
    got = jit(apply)(params, *inputs)
    assert got.dtype == jnp.bfloat16
    wide = jit(apply)(params, *(x.astype(np.float32) for x in inputs))
    assert wide.dtype == jnp.float32
    close(got.astype(np.float32), wide, 0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lowrank.bottleneck(rank=0), "rank must be at least 1, got 0"),
        (lambda: lowrank.parallel(rank=1, form="sine"), "form 'sine' is none of"),
        (lambda: lowrank.compacter(rank=6), "divisions 4 does not divide rank 6"),
        (
            lambda: lowrank.compacter(rank=4).init(KEY, jnp.ones((4, 6))),
            "divisions 4 does not divide the 6 outputs",
        ),
        (lambda: lowrank.contracon(heads=2, kernel=4), "kernel must be odd, got 4"),
        (
            lambda: lowrank.contracon(heads=4).init(KEY, jnp.ones((4, 6))),
            "heads 4 does not divide the 6 outputs",
        ),
        (lambda: lowrank.contracon_task([]), "at least one task"),
        (lambda: lowrank.dr_tune(size=0), "size must be at least 1"),
        (lambda: lowrank.dvpt(prompts=0), "prompts and rank must be at least 1"),
        (
            lambda: lowrank.dvpt(rank=1).apply(
                lowrank.dvpt(rank=1).init(KEY, 2), jnp.ones((3, 2))
            ),
            "3 tokens are fewer than 50 prompts",
        ),
        (lambda: lowrank.moment_probing(classes=2, dim=9), "heads must be at least 2"),
        (lambda: lowrank.moment_probing(classes=2, dim=8), "too small for depth 2"),
        (lambda: lowrank.psrp(rank=0), "rank must be at least 1"),
        (lambda: lowrank.share_tasks([], own=()), "at least one state"),
        (
            lambda: lowrank.share_tasks([attached(BOTTLENECK)[1]], own=("a",)),
            "own has 'a', which is no entry",
        ),
        (lambda: lowrank.scalearn(HYPER, sources=0), "sources must be at least 1"),
        (lambda: lowrank.scalearn_sources([]), "at least one state"),
        (lambda: lowrank.visual_prompt(size=4, pad=3), "pad must be from 1 to 2"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
