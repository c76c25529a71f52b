"""Adapters (adalora to lora_prune): outputs, sizes, starts, biases, errors.

What has no merged weight is compared with the paper's formula in numpy, float64; what
is trained is counted in closed form; a fresh state is what its docstring says.
"""

from collections.abc import Callable, Mapping
import functools as ft
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank

# Halves the compile time, where the point is not what optimised code computes.
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FORMS = {
    "relu": lambda z: np.where(z > 0, z, 0),
    "gelu": lambda z: z / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "linear": lambda z: z,
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True),
}
SMALL = {"rank": 2, "embedding": 3, "hidden": 5, "projected": 4}


def bottleneck(form, scale=1.0):
    """Y + s (f(y D + b_d) U + b_u) of the layer's own output."""

    def formula(x, w, s):
        y = x @ w
        z = FORMS[form](y @ s["down"] + s["down_bias"])
        return y + scale * (z @ s["up"] + s["up_bias"])

    return formula


def compacter(form):
    """A bottleneck of two sums of Kronecker products of one rule."""

    def formula(x, w, s):
        whole = lambda part: sum(
            np.kron(rule, left @ right)
            for rule, left, right in zip(
                s["rule"], s[f"{part}_left"], s[f"{part}_right"], strict=True
            )
        )
        made = {"down": whole("down"), "up": whole("up")}
        return bottleneck(form)(x, w, s | made)

    return formula


def hyperformer(form):
    """A bottleneck of what networks make of two embeddings."""

    def formula(x, w, s):
        m, rank = w.shape[1], SMALL["rank"]
        z = np.concatenate([s["task"], s["layer"]])
        z = np.maximum(z @ s["mix_in"] + s["mix_in_shift"], 0)
        z = z @ s["mix_out"] + s["mix_out_shift"]
        z = (z - z.mean()) / np.sqrt(z.var() + 1e-6)
        z = z * s["norm_scale"] + s["norm_bias"]
        of = lambda part: z @ s[f"{part}_{m}"] + s[f"{part}_{m}_shift"]
        made = {"down": of("down").reshape(m, rank), "up": of("up").reshape(rank, m)}
        made |= {"down_bias": of("down_bias"), "up_bias": of("up_bias")}
        return bottleneck(form)(x, w, made)

    return formula


of = ft.partial
OUTPUTS = [
    (of(lowrank.bottleneck, rank=3, form=f, scale=1.5), bottleneck(f, 1.5))
    for f in FORMS
] + [
    (of(lowrank.bottleneck, rank=2), bottleneck("relu")),
    (of(lowrank.compacter, rank=4, divisions=2), compacter("gelu")),
    (
        of(lowrank.compacter, rank=3, divisions=3, factors=2, form="tanh"),
        compacter("tanh"),
    ),
    (of(lowrank.compacter, rank=2, divisions=1, form="silu"), compacter("silu")),
    (of(lowrank.hyperformer, **SMALL), hyperformer("gelu")),
    (of(lowrank.hyperformer, **SMALL, form="relu"), hyperformer("relu")),
]


def close(got, want):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize(("make", "formula"), OUTPUTS)
def test_applied_as_the_paper_has_it_without_a_merged_weight(make, formula):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 6)), rng.standard_normal((2, 3, 5))
    with jax.enable_x64(True):
        adapter, key = make(), jax.random.key(0)
        assert adapter.merge is None
        shapes = jax.eval_shape(adapter.init, key, w)
        if adapter.shared is not None:
            shapes |= jax.eval_shape(lambda: adapter.shared(key, (w.shape,)))
        s = {n: 0.2 + rng.standard_normal(v.shape) for n, v in shapes.items()}
        got, want = jit(adapter.apply)(x, w, s), formula(x, w, s)
    assert np.abs(want - x @ w).max() > 0.01
    close(got, want)


def test_lora_prune_forgets_what_was_pruned_only_when_folded():
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(v) for v in ((3, 6), (6, 4), (6, 2), (2, 4)))
    w[rng.random(w.shape) < 0.4] = 0
    whole, s = w + 1.5 * a @ b, {"a": a, "b": b}
    with jax.enable_x64(True):
        adapter = lowrank.lora_prune(rank=2, alpha=3)
        close(jit(adapter.apply)(x, w, s), x @ whole)
        close(jit(adapter.merge)(w, s), np.where(w == 0, 0, whole))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_column_of_zeros_reflects_nothing(orthogonal):
    rng = np.random.default_rng(0)
    w, u = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    u[:, 1] = 0
    basis = np.linalg.qr(u[:, [0, 2]])[0] if orthogonal else u[:, [0, 2]]
    want = w
    for v in basis.T:
        want = want - 2 * np.outer(v, v @ want) / (v @ v)
    with jax.enable_x64(True):
        adapter = lowrank.hra(rank=3, orthogonal=orthogonal)
        close(jit(adapter.merge)(w, {"u": u}), want)


class Row(NamedTuple):
    """What an adapter trains of [n, m], and which of its first entries are what."""

    make: Any
    trained: Callable[[int, int], float]
    zeros: str = ""
    ones: str = ""
    drawn: Mapping[str, Callable] = MappingProxyType({})  # by the key alone, and how
    statistic: Callable[[int, int], tuple[int, int]] | None = None


def uniform(limit):
    def check(v, n, m):
        most = limit(n, m)
        assert 0.7 * most < np.abs(v).max() <= most * (1 + 1e-6)
        np.testing.assert_allclose(v.std(), most / 3**0.5, rtol=0.3)

    return check


def normal(deviation):
    def check(v, n, m):
        np.testing.assert_allclose(v.std(), deviation, rtol=0.3)
        assert np.abs(v).max() > 1.8 * deviation

    return check


def glorot(size):
    return uniform(lambda n, m: (6 / size(m)) ** 0.5)


gram = lambda n, m: (n, n)
slope = lambda n, m: (n, m)
two = lambda n, m: 2 * (n + m)
plus = lambda f: lambda n, m: two(n, m) + f(n, m)
fan = uniform(lambda n, m: n**-0.5)
fan_out = uniform(lambda n, m: m**-0.5)
half = uniform(lambda n, m: 2**-0.5)
A = {"a": fan}
B = ("b", "", A)
left, right = glorot(lambda m: m / 2 + 3), glorot(lambda m: 3 + 2)
ROWS = [
    Row(
        of(lowrank.adalora, rank=2),
        plus(lambda n, m: 2),
        "diag",
        "",
        {"a": normal(0.02), "b": normal(0.02)},
    ),
    Row(
        of(lowrank.boft, block_size=2, factors=2), lambda n, m: 4 * n + m, "a", "scale"
    ),
    Row(of(lowrank.boft, blocks=4), lambda n, m: n * n / 4 + m, "a", "scale"),
    Row(of(lowrank.bone, block=4), lambda n, m: 4 * m, "c"),
    Row(of(lowrank.bone, block=2, form="row"), lambda n, m: 2 * n, "c"),
    Row(
        of(lowrank.bottleneck, rank=3),
        lambda n, m: 2 * m * 3 + 3 + m,
        "down_bias up up_bias",
        "",
        {"down": fan_out},
    ),
    Row(of(lowrank.c3a, block=2), lambda n, m: n * m / 2, "kernel"),
    Row(
        of(lowrank.c3a, block=4, start="gaussian"),
        lambda n, m: n * m / 4,
        drawn={"kernel": normal(1)},
    ),
    Row(
        of(lowrank.c3a, block=4, start="xavier_uniform"),
        lambda n, m: n * m / 4,
        drawn={"kernel": uniform(lambda n, m: (6 / (n + m)) ** 0.5)},
    ),
    Row(
        of(lowrank.c3a, block=4, start="kaiming_uniform"),
        lambda n, m: n * m / 4,
        drawn={"kernel": fan},
    ),
    Row(
        of(lowrank.compacter, rank=4, divisions=2, factors=3),
        lambda n, m: 2 * 3 * (m + 4) + m + 4,
        "down_bias up_bias",
        "",
        {"down_left": left, "down_right": right, "up_left": right, "up_right": left},
    ),
    Row(
        of(lowrank.contracon, heads=2, kernel=3),
        lambda n, m: 2 * (9 + 2),
        "shift",
        "gate",
    ),
    Row(
        of(lowrank.contracon, heads=4, drawn=True),
        lambda n, m: 4 * (81 + 2),
        "",
        "gate",
        {name: uniform(lambda n, m: 1 / 9) for name in ("kernel", "shift")},
    ),
    Row(of(lowrank.corda, rank=2), two, statistic=gram),
    Row(of(lowrank.delora, rank=2), plus(lambda n, m: 1), *B),
    Row(of(lowrank.dora, rank=2), plus(lambda n, m: m), *B),
    Row(of(lowrank.eva, rank=2), two, "b", statistic=gram),
    Row(of(lowrank.fourierft, frequencies=9), lambda n, m: 9, "c"),
    Row(of(lowrank.full), lambda n, m: n * m),
    Row(
        of(lowrank.gralora, rank=4, blocks=4, hybrid=1),
        lambda n, m: 5 * (n + m),
        "b b_whole",
        "",
        {"a": uniform(lambda n, m: (n / 4) ** -0.5), "a_whole": fan},
    ),
    Row(of(lowrank.hira, rank=2), two, *B),
    Row(of(lowrank.hra, rank=4), lambda n, m: 4 * n, drawn={"u": half}),
    Row(
        of(lowrank.hra, rank=2, orthogonal=True), lambda n, m: 2 * n, drawn={"u": half}
    ),
    Row(
        of(lowrank.hydra, rank=2, sequential_rank=3),
        plus(lambda n, m: 2 * 3 * m),
        "b b_out",
        "",
        {"a": fan, "a_out": fan_out},
    ),
    Row(
        of(lowrank.hydra, rank=2),
        plus(lambda n, m: 2 * 2 * m),
        "b b_out",
        "",
        {"a": fan, "a_out": fan_out},
    ),
    Row(
        of(lowrank.hyperformer, rank=2, embedding=40),
        lambda n, m: 40,
        drawn={"layer": normal(1)},
    ),
    Row(of(lowrank.ia3), lambda n, m: m, "", "scale"),
    Row(of(lowrank.ia3, feedforward=True), lambda n, m: n, "", "scale"),
    Row(
        of(lowrank.kasa, rank=19),
        lambda n, m: 19 * (n + m) + 19,
        "b",
        "",
        {"a": fan, "diag": normal(1)},
    ),
    Row(
        of(lowrank.loha, rank=2),
        lambda n, m: 2 * two(n, m),
        "a2",
        "",
        {"a1": fan, "b1": half, "b2": half},
    ),
    Row(
        of(lowrank.lokr, rank=2, factor=4),
        lambda n, m: 4 * 4 + n / 2 + m / 2,
        "c",
        "",
        {"d_a": uniform(lambda n, m: (n / 4) ** -0.5), "d_b": half},
    ),
    Row(
        of(lowrank.lokr, rank=1, factor=4, decompose_both=True),
        lambda n, m: 4 + 4 + n / 4 + m / 4,
        "c_b",
        "",
        {
            "c_a": uniform(lambda n, m: 4**-0.5),
            "d_a": uniform(lambda n, m: (n / 4) ** -0.5),
            "d_b": uniform(lambda n, m: 1),
        },
    ),
    Row(
        of(lowrank.lokr, rank=8, factor=4),
        lambda n, m: 4 * 4 + n / 4 * m / 4,
        "c",
        "",
        {"d": uniform(lambda n, m: (n / 4) ** -0.5)},
    ),
    Row(of(lowrank.lora, rank=2, bias=True), plus(lambda n, m: m), "b bias", "", A),
    Row(of(lowrank.lora, rank=2, frozen_a=True), lambda n, m: 2 * m, *B),
    Row(of(lowrank.lora, rank=2, start="gaussian"), two, "b", "", {"a": normal(1 / 2)}),
    Row(
        of(lowrank.lora, rank=16, start="orthogonal"),
        lambda n, m: 16 * (n + m),
        drawn={name: normal(0.1 * 2**-0.5) for name in ("a", "b")},
    ),
    Row(of(lowrank.lora_ga, rank=2), two, statistic=slope),
    Row(of(lowrank.lora_gain, rank=2), plus(lambda n, m: m), "b gain", "", A),
    Row(
        of(lowrank.lora_gain, rank=2, bias=True),
        plus(lambda n, m: 2 * m),
        "b bias gain",
        "",
        A,
    ),
    Row(of(lowrank.lora_prune, rank=2), two, *B),
]
name = lambda row: f"{row.make.func.__name__}{[*row.make.keywords.values()]}"
rows = pytest.mark.parametrize("row", ROWS, ids=name)


@rows
def test_a_first_state_is_what_it_says_and_of_its_key(row):
    """So many numbers; zero, one, drawn by the key as said, or made of the weight."""
    adapter, rng = row.make(), np.random.default_rng(2)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    for shape in ((20, 36), (60, 40)):
        w, statistic = draw(*shape), ()
        if row.statistic is not None:
            statistic = (draw(*row.statistic(*shape)),)
        sizes = jax.eval_shape(adapter.init, jax.random.key(0), w, *statistic)
        trained = [v.size for name, v in sizes.items() if name not in adapter.fixed]
        assert sum(trained) == row.trained(*shape)
    init = jit(adapter.init)
    states = [init(jax.random.key(i), w, *statistic) for i in (0, 0, 1)]
    first, again, other = (jax.tree.map(np.asarray, s) for s in states)
    for name, v in first.items():
        np.testing.assert_array_equal(v, again[name])
        assert (v == other[name]).all() == (name not in row.drawn), name
        assert (not v.any()) == (name in row.zeros.split()), name
        assert (v == 1).all() == (name in row.ones.split()), name
    assert {*row.zeros.split(), *row.ones.split()} <= first.keys()
    for name, check in row.drawn.items():
        check(first[name], *shape)


def test_what_all_layers_share_is_as_many_numbers_as_promised():
    key, sizes = jax.random.key(0), ((4, 6), (3, 6), (6, 8))
    rule = lowrank.compacter(rank=6, divisions=3).shared(key, sizes)["rule"]
    rule = np.asarray(rule)
    assert rule.shape == (3, 3, 3)
    assert 0.5e-4 < rule.std() < 2e-4
    e, h, p, r = (SMALL[n] for n in ("embedding", "hidden", "projected", "rank"))
    networks = e + (2 * e + 1) * h + (h + 1) * p + 2 * p
    generators = [(p + 1) * (2 * m * r + m + r) for m in (6, 8)]
    shared = lowrank.hyperformer(**SMALL).shared
    s = jax.eval_shape(lambda key: shared(key, sizes), key)
    assert sum(v.size for v in s.values()) == networks + sum(generators)
    names = ("norm_scale", "norm_bias", "up_6_shift", "up_6")
    some = jit(lambda key: [shared(key, sizes)[name] for name in names])(key)
    ones, *zeros, up = map(np.asarray, some)
    assert (ones == 1).all()
    assert not any(v.any() for v in zeros)
    np.testing.assert_allclose(up.std(), 0.01, rtol=0.4)


def start(make, *statistic, shape=(8, 6)):
    """The first state for a weight, in float64, and that weight."""
    w = np.random.default_rng(1).standard_normal(shape)
    with jax.enable_x64(True):
        s = jit(make.init)(jax.random.key(0), w, *statistic)
    return {name: np.asarray(v) for name, v in s.items()}, w


def test_orthogonal_starts_of_lora_span_apart():
    """A reads and B writes half of the r directions each, so that A B = 0."""
    s, _ = start(lowrank.lora(rank=4, start="orthogonal"))
    np.testing.assert_allclose(s["a"] @ s["b"], 0, atol=1e-12)
    assert [np.linalg.matrix_rank(v) for v in s.values()] == [2, 2]
    assert 0.03 < s["a"].std() < 0.2


@pytest.mark.parametrize(("mode", "mine"), [("ipm", slice(3)), ("kpm", slice(3, 6))])
def test_corda_starts_at_balanced_components(mode, mine):
    x = np.random.default_rng(0).standard_normal((30, 8)) * np.arange(1, 9)
    g = x.T @ x
    adapter = lowrank.corda(rank=3, alpha=6, mode=mode)
    s, w = start(adapter, g)
    c = g / np.trace(g) * 8 + 0.01 * np.eye(8)
    p, sigma, qt = np.linalg.svd(c @ w, full_matrices=False)
    want = np.linalg.inv(c) @ p[:, mine] @ np.diag(sigma[mine]) @ qt[mine]
    close(2 * s["a"] @ s["b"], want)
    close(np.linalg.norm(s["b"], axis=1), np.sqrt(sigma[mine] / 2))
    close(np.linalg.norm(c @ s["a"], axis=0), np.sqrt(sigma[mine] / 2))
    np.testing.assert_array_equal(s["a"], s["a0"])
    np.testing.assert_array_equal(s["b"], s["b0"])


def test_corda_of_no_inputs_is_pissa():
    s, w = start(lowrank.corda(rank=2), np.zeros((8, 8)))
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    close(s["a"] @ s["b"], (u[:, :2] * sigma[:2]) @ vt[:2])


def test_eva_starts_at_right_singular_vectors():
    x = np.random.default_rng(0).standard_normal((30, 8)) * np.arange(1, 9)
    _, sigma, vt = np.linalg.svd(x)
    for whiten, lengths in ((False, np.ones(3)), (True, sigma[:3] ** -0.5)):
        s, _ = start(lowrank.eva(rank=3, whiten=whiten), x.T @ x)
        close(np.abs(vt[:3] @ s["a"]).diagonal(), lengths)
        close(np.linalg.norm(s["a"], axis=0), lengths)
    s, _ = start(lowrank.eva(rank=3, whiten=True), x[:2].T @ x[:2])
    assert [bool(v.any()) for v in s["a"].T] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "left", "right", "length"),
    [
        ({}, [0, 1], [2, 3], 6**0.25 / 4),
        ({"direction": "A2rBr", "gamma": 9.0}, [2, 3], [0, 1], 6**0.25 / 3),
        ({"direction": "ArBr", "gamma": None}, [1, 3], [0, 2], 1),
        ({"niter": 1, "gamma": 1}, [0, 1], [2, 3], 6**0.25),
    ],
)
def test_lora_ga_starts_at_the_gradients_vectors(options, left, right, length):
    g = np.random.default_rng(2).standard_normal((8, 6))
    s, _ = start(lowrank.lora_ga(rank=2, **options), g)
    u, _, vt = np.linalg.svd(g)
    close(np.abs(u[:, left].T @ s["a"]), length * np.eye(2))
    close(np.abs(s["b"] @ vt[right].T), length * np.eye(2))
    np.testing.assert_array_equal(s["a"], s["a0"])
    np.testing.assert_array_equal(s["b"], s["b0"])


def test_what_is_made_of_the_weight():
    s, w = start(lowrank.kasa(rank=2))
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    close(s["a0"] @ s["b0"], (u[:, -2:] * sigma[-2:]) @ vt[-2:])
    s, w = start(lowrank.dora(rank=2))
    close(s["squares"], (w**2).sum(0))
    close(s["magnitude"], np.sqrt((w**2).sum(0)))
    s, w = start(lowrank.delora(rank=2, bound=7.0))
    close(s["norms"], np.sqrt((w**2).sum(1)))
    assert s["bound"] == 7.0
    s, w = start(lowrank.full())
    np.testing.assert_array_equal(s["w"], w)
    s, _ = start(lowrank.contracon(heads=3, kernel=3))
    kernel = np.zeros((3, 3, 3))
    kernel[:, 1, 1] = 1 - 1 / (1 + np.exp(-1))
    close(s["kernel"], kernel)


def test_reflections_start_in_pairs_or_apart():
    paired = start(lowrank.hra(rank=4))[0]["u"]
    np.testing.assert_array_equal(paired[:, ::2], paired[:, 1::2])
    for adapter in (lowrank.hra(rank=3), lowrank.hra(rank=4, orthogonal=True)):
        u = start(adapter)[0]["u"]
        assert np.linalg.matrix_rank(u) == u.shape[1]


def test_biases_that_go_with_a_layers_output():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    b, bias, a, out = draw(6), draw(6), draw(6, 2), draw(2, 6)
    pairs = [
        (lowrank.lora(rank=2, alpha=3, bias=True), {"bias": bias}, b + 1.5 * bias),
        (lowrank.lora_gain(rank=2, bias=True), {"bias": bias}, b + bias),
        (lowrank.ia3(), {"scale": bias}, b * bias),
        (
            lowrank.hydra(rank=2, scale=0.7),
            {"a_out": a, "b_out": out},
            b + 0.7 * b @ a @ out,
        ),
    ]
    with jax.enable_x64(True):
        for adapter, s, want in pairs:
            close(adapter.bias(jnp.asarray(b), jax.tree.map(jnp.asarray, s)), want)
    assert all(pairs[i][0].bias(None, pairs[i][1]) is None for i in (2, 3))
    assert lowrank.ia3(feedforward=True).bias is None
    assert lowrank.lora(rank=2).bias is None
