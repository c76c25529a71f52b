"""Guidance by two predictions: each rule in numpy, and what all of them promise."""

import functools as ft
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import diffusion
from jaxlab.types import Denoiser, Noise

SEED = 0
RNG = np.random.default_rng(SEED)
B = (3, 8, 4, 2)
W = 5.0


def jit(f):
    return jax.jit(
        lambda *v: f(*v), compiler_options={"xla_backend_optimization_level": 0}
    )


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def told(x, noise, cond):
    """The prediction is what the condition says, a little more at each time."""
    return cond["value"] + noise.t * cond["pace"].reshape(-1, 1, 1, 1)


def given(a=0.6, s=0.8):
    c, u, x = RNG.standard_normal((3, *B))
    cond = {"value": jnp.asarray(c), "pace": jnp.full(len(x), 0.1)}
    null = {"value": u, "pace": np.full(len(x), -0.1)}
    return c, u, x, cond, null, Noise(0.0, np.float64(a), np.float64(s))


axes = lambda v: tuple(range(1, v.ndim))
size = lambda v: np.sqrt((v**2).sum(axes(v), keepdims=True))
std = lambda v: v.std(axes(v), keepdims=True)
inner = lambda a, b: (a * b).sum(axes(a), keepdims=True)


def by_cfg(c, u):
    return u + W * (c - u)


def by_rescale(c, u):
    g = by_cfg(c, u)
    return 0.7 * g * std(c) / std(g) + 0.3 * g


def by_apg(c, u, eta=0.25, limit=4.0, past=0.0):
    d = c - u + past
    d = d * np.minimum(1, limit / size(d))
    along = inner(d, c) / inner(c, c) * c
    return c + (W - 1) * (d - along + eta * along)


def by_zero(c, u):
    u = u * inner(c, u) / inner(u, u)
    return u + W * (c - u)


def by_tcfg(c, u):
    rows = np.stack([c, u], 1).reshape(len(c), 2, -1)
    first = np.linalg.svd(rows, full_matrices=False)[2][:, :1]
    flat = u.reshape(len(c), 1, -1)
    kept = (flat @ first.transpose(0, 2, 1) @ first).reshape(u.shape)
    return kept + W * (c - kept)


def by_magnitude(c, u):
    return u + (1 + (W - 1) * np.exp(-0.5 * size(c - u) / size(u))) * (c - u)


def matrices(n):
    """Blur, halving and doubling of an axis, as matrices."""
    mirror = lambda j: -j if j < 0 else 2 * (n - 1) - j if j >= n else j
    blur, half, double = np.zeros((n, n)), np.zeros((n // 2, n)), np.zeros((n, n // 2))
    for i in range(n):
        for k, w in zip(range(i - 2, i + 3), (1, 4, 6, 4, 1), strict=True):
            blur[i, mirror(k)] += w / 16
        for shift, w in ((0, 0.75), (1 if i % 2 else -1, 0.25)):
            double[i, np.clip(i // 2 + shift, 0, n // 2 - 1)] += w
        half[i // 2, i] = 0.5
    return blur, half, double


def by_fdg(c, u):
    (b1, h1, d1), (b2, h2, d2) = matrices(B[1]), matrices(B[2])
    both = lambda p, q, v: np.einsum("ij,bjkc,lk->bilc", p, v, q)
    d = c - u
    low = both(b1 @ d1, b2 @ d2, both(h1 @ b1, h2 @ b2, d))
    return c + 4.0 * (d - low) + 1.0 * low


RULES = {
    "cfg": (ft.partial(diffusion.cfg, scale=W), by_cfg, "x0"),
    "rescale": (ft.partial(diffusion.cfg, scale=W, rescale=0.7), by_rescale, "x0"),
    "rescale/v": (
        ft.partial(diffusion.cfg, scale=W, rescale=0.7, space="v"),
        by_rescale,
        "v",
    ),
    "apg": (
        ft.partial(diffusion.apg, scale=W, eta=0.25, norm_limit=4.0),
        by_apg,
        "x0",
    ),
    "cfg_zero": (ft.partial(diffusion.cfg_zero, scale=W), by_zero, "flow"),
    "tcfg": (ft.partial(diffusion.tcfg, scale=W), by_tcfg, "eps"),
    "magnitude": (
        ft.partial(diffusion.magnitude_aware, scale=W, damping=0.5),
        by_magnitude,
        "flow",
    ),
    "fdg": (ft.partial(diffusion.fdg, scales=(5.0, 2.0)), by_fdg, "x0"),
    "fdg/one": (ft.partial(diffusion.fdg, scales=(W, W, W)), by_cfg, "x0"),
}


def predicted(name, c, u, x, noise):
    """A rule in its space, in numpy; then as x0."""
    _, rule, space = RULES[name]
    turn = lambda v, a, b: diffusion.convert(v, x, noise, source=a, target=b)
    c, u = (np.asarray(turn(v, "x0", space)) for v in (c, u))
    return turn(rule(c, u), space, "x0")


@pytest.mark.parametrize("name", RULES)
def test_the_formula(name):
    c, u, x, cond, null, noise = given()
    denoise = RULES[name][0](null=null)(told)
    got = jit(denoise)(x, noise, cond)
    np.testing.assert_allclose(got, predicted(name, c, u, x, noise), atol=2e-12)


def test_projection_depends_on_the_space_and_cfg_does_not():
    _, _, x, cond, null, noise = given()
    at = lambda f, space: np.asarray(jit(f(space)(told))(x, noise, cond))
    near = lambda f: np.abs(at(f, "x0") - at(f, "eps")).max()
    make = lambda rule, **more: (
        lambda space: rule(scale=W, null=null, space=space, **more)
    )
    assert near(make(diffusion.cfg)) < 1e-12
    assert near(make(diffusion.apg, eta=1.0)) < 1e-12
    assert near(make(diffusion.apg)) > 0.1
    assert near(make(diffusion.cfg, rescale=0.7)) > 0.1


def test_momentum_over_three_steps():
    c, u, x, cond, null, noise = given()
    denoise = diffusion.apg(
        scale=W, null=null, eta=0.25, norm_limit=9.0, momentum=-0.5
    )(told)
    state, past, step = denoise.init(x, cond), 0.0, jit(denoise.apply)
    for i in range(3):
        at = noise._replace(t=float(i))
        got, state = step(x, at, cond, state)
        now = c + 0.1 * i, u - 0.1 * i
        np.testing.assert_allclose(got, by_apg(*now, limit=9.0, past=past), atol=2e-12)
        past = -0.5 * (now[0] - now[1] + past)
    assert np.abs(got - by_apg(*now, limit=9.0)).max() > 0.1  # without momentum


def test_orthogonal_or_absent_predictions_have_defined_answers():
    c = np.zeros((1, 2, 2, 1))
    c[0, 0], noise = 1.0, Noise(0.0, 1.0, 1.0)
    zero = {"value": np.zeros_like(c), "pace": np.zeros(1)}
    cond = {"value": jnp.asarray(c), "pace": jnp.zeros(1)}
    across = zero | {"value": c[:, ::-1].copy()}
    names = ("rescale", "apg", "cfg_zero", "tcfg", "magnitude")

    def total(x, cond, null):
        rules = (RULES[name][0](null=null)(told) for name in names)
        values = jnp.stack([jnp.sum(rule(x, noise, cond)) for rule in rules])
        return values.sum(), values

    run, x = jit(jax.value_and_grad(total, (0, 1), has_aux=True)), np.zeros_like(c)
    for pair in ((cond, zero), (zero, cond), (zero, zero), (cond, across)):
        for leaf in jax.tree.leaves(run(x, *pair)):
            assert np.isfinite(leaf).all()


def test_one_call_sees_both_conditions_side_by_side():
    seen = []

    def spy(x, noise, cond):
        seen.append((x.shape, noise.sigma.shape, cond["value"].shape))
        return told(x, noise, cond)

    _, _, x, cond, null, noise = given()
    levels = Noise(*(jnp.full(3, v) for v in noise))
    spied = lambda x, noise, cond: spy(x, noise._replace(t=0.0), cond)
    out, state = (d := diffusion.cfg(scale=W, null=null)(spied)).apply(
        x, levels, cond, d.init(x, cond)
    )
    assert seen == [((6, *B[1:]), (6,), (6, *B[1:]))]
    assert int(state.inner.rows) == 6
    np.testing.assert_allclose(out, predicted("cfg", *given_again(), noise))


def given_again():
    return np.random.default_rng(SEED).standard_normal((3, *B))


def test_a_scale_for_each_sample_and_for_each_level():
    _, _, x, cond, null, noise = given()

    @jit
    def run(scale, null=null, x=x, cond=cond):
        return diffusion.cfg(scale=scale, null=null)(told)(x, noise, cond)

    scales = np.array([1.0, 3.0, 7.0])
    each = run(scales)
    for i, scale in enumerate(scales):
        pick = lambda v, i=i: jax.tree.map(lambda a: a[i : i + 1], v)
        alone = run(scale, pick(null), x[i : i + 1], pick(cond))
        np.testing.assert_allclose(each[i : i + 1], alone, atol=1e-14)
    np.testing.assert_array_equal(each[0], told(x, noise, cond)[0])
    level = diffusion.cfg(scale=lambda noise: 5 * noise.ratio, null=null)(told)
    np.testing.assert_allclose(jit(level)(x, noise, cond), run(np.full(3, 20 / 3)))
    total = lambda w: diffusion.cfg(scale=w, null=null)(told)(x, noise, cond).sum()
    slope = jit(jax.grad(total))(2.0)
    np.testing.assert_allclose(slope, (cond["value"] - null["value"]).sum(), rtol=1e-10)


def test_weights_by_step_are_each_columns_own():
    edm = diffusion.edm()
    long = diffusion.from_ratios(edm, [8, 4, 2, 0])
    short = diffusion.from_ratios(edm, [3, 1, 0])
    grid, values = diffusion.columns([long, short]), np.array([[1, 4], [2, 5], [3, 6]])
    one, two = (diffusion.by_step(grid, v) for v in (values, values[:, 0]))
    for pair, want in (
        ((8, 3), (1, 4)),
        ((4, 1), (2, 5)),
        ((2.0001, 0.2), (2, 5)),
        ((2.00001, 1), (3, 5)),
    ):
        noise = Noise(0.0, np.ones(2), np.asarray(pair, np.float64))
        np.testing.assert_array_equal(one(noise), want)
    np.testing.assert_array_equal(two(noise), [3, 2])
    up = diffusion.by_step(diffusion.reverse(long), np.array([5, 6]))
    assert [int(up(Noise(0.0, 1.0, s))) for s in (2.0, 3.9, 4.0, 8.0)] == [5, 5, 6, 6]


GRID = diffusion.karras(diffusion.vp(), steps=7)
CENTRE = np.array([1.0, -0.5])


def gaussian(mean, variance):
    """The denoiser of N(mean cond, variance)."""

    def denoise(x, noise, cond):
        a, s = (jnp.reshape(v, (-1, 1)) for v in (noise.alpha, noise.sigma))
        m = np.atleast_1d(mean)[None] * cond[:, None]
        return m + a * variance / (a**2 * variance + s**2) * (x - a * m)

    return denoise


def test_cfg_plus_plus_is_its_own_loop():
    denoise, scale = gaussian(CENTRE, 0.3), 0.6
    x = np.asarray(diffusion.prior(jax.random.key(0), (4, 2), GRID), np.float64)
    guide = diffusion.cfg_plus_plus(scale=scale, null=np.zeros(1), grid=GRID)
    plain = diffusion.cfg(scale=scale, null=np.zeros(1))
    run = lambda guide: diffusion.sample(
        guide(denoise), x, GRID, solver=diffusion.ddim(), cond=jnp.ones(4)
    )
    now = x
    for i in range(7):
        at, to = (Noise(*(v[j] for v in GRID.noise)) for j in (i, i + 1))
        c, u = (denoise(now, at, np.full(4, v)) for v in (1.0, 0.0))
        eps = (now - at.alpha * u) / at.sigma
        now = to.alpha * (u + scale * (c - u)) + to.sigma * eps
    out = run(guide)
    np.testing.assert_allclose(out.x, now, atol=1e-12)
    assert float(out.nfe) == 14
    assert np.abs(run(plain).x - now).max() > 0.05


def test_cfg_plus_plus_of_columns_is_that_of_each():
    short = diffusion.karras(diffusion.vp(), steps=4)
    least = diffusion.karras(diffusion.vp(), steps=5, end="least")
    x = np.asarray(diffusion.prior(jax.random.key(0), (3, 2), GRID), np.float64)

    def run(x, grid):
        guide = diffusion.cfg_plus_plus(scale=0.6, null=NULL, grid=grid)
        given = {"solver": diffusion.ddim(), "cond": np.ones(len(x))}
        denoise = guide(gaussian(CENTRE, 0.3))
        return jit(lambda x: diffusion.sample(denoise, x, grid, **given).x)(x)

    grids = [GRID, short, least]
    out = run(x, diffusion.columns(grids))
    for i in (1, 2):
        np.testing.assert_allclose(out[i], run(x[i : i + 1], grids[i])[0], atol=1e-12)


def test_guided_gaussian_variance_is_exact_and_of_second_order():
    gamma, high = 3.0, 80.0
    both = lambda x, noise, cond: x * cond / (cond + noise.sigma**2)
    denoise = diffusion.cfg(scale=gamma, null=np.full((1, 1), 2.0))(both)
    edge = 1 + high**2
    exact = high**2 / edge**gamma / ((edge + 1) / 2) ** (1 - gamma)
    assert abs(exact - 2 ** (1 - gamma)) < 1e-4

    @jax.jit
    def variance(rows):
        x = jnp.full((1, 1), high)
        one = jnp.ones((1, 1))
        out = diffusion.sample(denoise, x, rows, solver=diffusion.heun(), cond=one)
        return out.x[0, 0] ** 2

    errors = []
    for steps in (50, 100, 200, 400):
        grid = diffusion.karras(diffusion.edm(sigma_max=high), steps=steps)
        errors.append(float(variance(diffusion.heun().plan(grid))) - exact)
    ratios = np.divide(errors[:-1], errors[1:])
    assert ((ratios > 3.7) & (ratios < 4.4)).all(), errors
    assert abs(errors[-1]) < 3e-4
    assert abs(exact - 2 / (gamma + 1)) > 0.2  # what guidance does not sample


def test_guidance_by_itself_is_none_and_by_another_a_line():
    denoise, weak = gaussian(CENTRE, 0.3), gaussian(0.0 * CENTRE, 1.0)
    x, noise = RNG.standard_normal((4, 2)), Noise(0.0, np.float64(0.6), np.float64(0.8))
    at = x, noise, jnp.ones(4)
    for scale in (0.0, 3.0, 50.0):
        same = diffusion.autoguidance(denoise, scale=scale)(denoise)
        np.testing.assert_array_equal(same(*at), denoise(*at))
    guided = diffusion.autoguidance(weak, scale=3.0)(denoise)
    np.testing.assert_allclose(guided(*at), 3 * denoise(*at) - 2 * weak(*at))
    state = guided.apply(*at, guided.init(x, at[2]))[1]
    assert (int(state.inner.rows), int(state.own.rows)) == (4, 4)


SOLVERS = {
    "heun": diffusion.heun(),
    "unipc": diffusion.unipc(),
    "ddim": diffusion.ddim(eta=1.0),
}
NULL = np.zeros(1)


@pytest.mark.parametrize("name", SOLVERS)
def test_guidance_composes_under_every_transform(name):
    rule = diffusion.apg(scale=2.5, null=NULL, eta=0.5, momentum=-0.3)
    denoise = diffusion.interval(rule, low=0.2, high=5.0)(gaussian(CENTRE, 0.3))
    x = jnp.asarray(RNG.standard_normal((2, 3, 2)))

    def run(x, cond):
        key = jax.random.key(1)
        given = {"solver": SOLVERS[name], "key": key, "cond": cond}
        return diffusion.sample(denoise, x, GRID, **given).x

    cond = jnp.asarray([[1.0, 1.0, 1.0], [0.5, 1.5, -1.0]])
    one = jit(run)
    each = jnp.stack([one(*v) for v in zip(x, cond, strict=True)])
    np.testing.assert_allclose(jit(jax.vmap(run))(x, cond), each, rtol=1e-9)
    if name == "heun":
        slope = jit(jax.grad(lambda c: run(x[0], c).sum()))(cond[0])
        step = np.array([1e-5, 0, 0])
        up, down = (one(x[0], cond[0] + d * step).sum() for d in (1, -1))
        np.testing.assert_allclose(slope[0], (up - down) / 2e-5, rtol=1e-6)


def test_a_sharded_batch_stays_where_it_is():
    mesh = jax.make_mesh((8,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("b"))
    denoise = diffusion.apg(scale=2.5, null=NULL)(gaussian(CENTRE, 0.3))
    x, noise = (
        RNG.standard_normal((16, 2)),
        Noise(0.0, np.float64(0.6), np.float64(0.8)),
    )
    run = lambda x, cond: denoise(x, noise, cond)
    whole = jax.jit(run)(x, jnp.ones(16))
    parts = jax.device_put((x, jnp.ones(16)), place)
    program = jax.jit(run, in_shardings=(place, place)).lower(*parts).compile()
    np.testing.assert_allclose(program(*parts), whole, atol=1e-14)
    text = program.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "permute("))


def test_narrow_samples_keep_their_dtype():
    _, _, x, cond, null, noise = given()
    low = ft.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.bfloat16))
    noise = Noise(*(jnp.float32(v) for v in noise))
    plain = lambda x, noise, cond: cond["value"]
    for make, _, _ in RULES.values():
        denoise = make(null=low(null))(plain)
        out = jax.eval_shape(lambda *v, d=denoise: d(*v), low(x), noise, low(cond))
        assert out.dtype == "bfloat16"


def bad(**change):
    base = {"scale": W, "null": NULL}
    return diffusion.cfg(**(base | change))(gaussian(CENTRE, 0.3))


@pytest.mark.parametrize(
    ("word", "change"),
    [
        ("scale", {"scale": float("nan")}),
        ("rescale", {"rescale": float("nan")}),
        ("scale of shape", {"scale": np.ones(5)}),
        ("broadcast", {"null": np.zeros(5)}),
        ("tree", {"null": {"a": np.zeros(1)}}),
        ("int64", {"null": np.zeros(1, np.int64)}),
    ],
)
def test_bad_options_are_named(word, change):
    x, noise = jnp.ones((4, 2)), Noise(0.0, 0.6, 0.8)
    with pytest.raises(ValueError, match=word):
        bad(**change)(x, noise, jnp.ones(4))


def test_bad_input_is_named():
    x, noise = jnp.ones((4, 2)), Noise(0.0, 0.6, 0.8)
    with pytest.raises(ValueError, match="needs cond"):
        bad()(x, noise, None)
    short = diffusion.cfg(scale=W, null=NULL)(lambda x, noise, cond: x[:, :1])
    with pytest.raises(ValueError, match="the denoiser gave"):
        short(x, noise, jnp.ones(4))
    with pytest.raises(ValueError, match="2 steps"):
        diffusion.by_step(diffusion.from_ratios(diffusion.edm(), [2, 1, 0]), [1.0])
    with pytest.raises(ValueError, match="low <= high"):
        diffusion.interval(diffusion.cfg(scale=W, null=NULL), low=2.0, high=1.0)
    with pytest.raises(ValueError, match="grid"):
        diffusion.cfg_zero(scale=W, null=NULL, zero_steps=1)
    fine = diffusion.fdg(scales=(1.0, 2.0, 3.0), null=NULL, axes=(1,))
    with pytest.raises(ValueError, match="bands"):
        fine(gaussian(CENTRE, 0.3))(x, noise, jnp.ones(4))
    with pytest.raises(ValueError, match="norm_limit"):
        diffusion.apg(scale=W, null=NULL, norm_limit=-1.0)
    assert isinstance(bad(), Denoiser)


def long_grids():
    for schedule in (diffusion.edm(), diffusion.vp(), diffusion.flow()):
        yield diffusion.uniform(schedule, steps=1000)
        yield diffusion.exponential(schedule, steps=1000, low=1e-3, high=1e2)
        yield diffusion.karras(schedule, steps=1000, low=1e-3, high=1e2)
    yield diffusion.karras(diffusion.edm(sigma_max=5e4), steps=1000, rho=10.0)
    yield diffusion.shift(diffusion.uniform(diffusion.flow(), steps=1000), factor=3.0)


def test_a_thousand_steps_are_told_apart_in_single_precision():
    for grid in long_grids():
        step = diffusion.by_step(grid, np.arange(1000))
        levels = Noise(*(jnp.asarray(v[:-1], jnp.float32) for v in grid.noise))
        np.testing.assert_array_equal(step(levels), np.arange(1000))


def test_pure_noise_and_the_clean_sample_are_levels_like_others():
    grid = diffusion.uniform(diffusion.flow(), steps=4)  # from alpha = 0
    step = diffusion.by_step(grid, np.arange(4))
    found = [int(step(Noise(*v))) for v in zip(*grid.noise, strict=True)]
    assert found == [0, 1, 2, 3, 3]
    make = lambda **limits: diffusion.interval(
        diffusion.cfg(scale=W, null=NULL), **limits
    )(gaussian(CENTRE, 0.3))
    x, cond = jnp.ones((4, 2)), jnp.ones(4)
    dark = Noise(1.0, np.float64(0.0), np.float64(1.0))
    np.testing.assert_allclose(make()(x, dark, cond), W * CENTRE[None] * cond[:, None])
    plain = make(high=1e9)(x, dark, cond)
    np.testing.assert_allclose(plain, CENTRE[None] * cond[:, None])


def test_a_traced_scale_and_momentum_share_one_program():
    count = []

    def spied(x, noise, cond):
        count.append(1)
        return gaussian(CENTRE, 0.3)(x, noise, cond)

    @jax.jit
    def guided(x, scale, eta, momentum):
        rule = diffusion.apg(scale=scale, null=NULL, eta=eta, momentum=momentum)
        given = {"solver": diffusion.ddim(), "cond": jnp.ones(3)}
        return diffusion.sample(rule(spied), x, GRID, **given).x

    x = jnp.asarray(RNG.standard_normal((3, 2)))
    outs = [guided(x, *v) for v in ((1.0, 0.0, 0.0), (3.0, 0.5, 0.0), (3.0, 0.5, -0.5))]
    assert len(count) == 1
    assert min(float(jnp.abs(a - b).max()) for a, b in itertools.pairwise(outs))


@pytest.mark.parametrize("loop", ["unrolled", "python"])
def test_every_loop_and_remat_give_the_same(loop):
    rule = diffusion.apg(scale=2.5, null=NULL, momentum=-0.3)
    denoise, solver = rule(gaussian(CENTRE, 0.3)), diffusion.ddim()
    grid, cond = diffusion.karras(diffusion.vp(), steps=3), jnp.ones(3)
    x = jnp.asarray(RNG.standard_normal((3, 2)))
    run = lambda **how: diffusion.sample(
        denoise, x, grid, solver=solver, cond=cond, **how
    )
    out, want = run(loop=loop, remat=True), run()
    np.testing.assert_allclose(out.x, want.x, atol=1e-13)
    assert float(out.nfe) == float(want.nfe) == 6
