"""Statistics of models: closed forms, batches, devices and transforms."""

import functools as ft

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import measure, tree

KEY = jax.random.key(3)
each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(i, *shape):
    return jax.random.normal(jax.random.fold_in(KEY, i), shape)


def run(fn, *args, **options):
    """Compiled as a whole: each eager operation would be compiled alone."""
    return jit(ft.partial(fn, **options))(*args)


def close(a, b, tolerance=2e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def add_up(parts):
    return ft.reduce(lambda a, b: each(jnp.add, a, b), parts)


X, W = normal(0, 16, 3), {"w": normal(1, 3, 4)}
LABELS = jnp.arange(16) % 4
MLP = {"a": normal(2, 3, 5), "b": normal(3, 5), "c": normal(4, 5, 2)}


def linear(p, x):
    return x @ p["w"]


def mlp(p, x):
    return jnp.tanh(x @ p["a"] + jnp.broadcast_to(p["b"], (*x.shape[:-1], 5))) @ p["c"]


EMPIRICAL = ft.partial(measure.fisher_empirical, linear, W)
SUMS = {
    # a statistic of one batch, whose results over batches add up
    "fisher": lambda x, y: measure.fisher(linear, W, x),
    "gaussian fisher": lambda x, y: measure.fisher(linear, W, x, likelihood="gaussian"),
    "microbatches": lambda x, y: measure.fisher(linear, W, x, batch_size=3),
    "empirical": lambda x, y: EMPIRICAL(x, labels=y),
    "gram": lambda x, y: measure.gram(mlp, MLP, x),
    "activation_norms": lambda x, y: measure.activation_norms(mlp, MLP, x),
}
OTHERS = {
    "monte carlo": lambda x, y: measure.fisher_monte_carlo(linear, W, x, key=KEY),
    "covariance": lambda x, y: measure.covariance(mlp, MLP, x),
    "per feature": lambda x, y: measure.covariance(mlp, MLP, x, per_feature=True),
    "gaussian": lambda x, y: measure.gaussian(x),
    "cka": lambda x, y: measure.cka(x, jnp.tanh(x)),
    "hsic": lambda x, y: measure.hsic(x, jnp.tanh(x)),
    "trace": lambda x, y: measure.hessian_trace(
        lambda p, x: jnp.sum(mlp(p, x) ** 2), MLP, x, key=KEY
    ),
    "frechet": lambda x, y: measure.frechet(
        measure.gaussian(x), measure.gaussian(jnp.tanh(x))
    ),
}
ALL = SUMS | OTHERS


@ft.cache
def compiled(name):
    return jit(ALL[name])


@ft.cache
def whole(name):
    return compiled(name)(X, LABELS)


@pytest.mark.parametrize("name", SUMS)
def test_batches_add_up(name):
    halves = [compiled(name)(X[i], LABELS[i]) for i in (slice(8), slice(8, None))]
    close(add_up(halves), whole(name))


@pytest.mark.parametrize("name", ALL)
def test_sharded_batches_agree(name):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    place = lambda v: jax.device_put(v, NamedSharding(mesh, PartitionSpec("d")))
    close(compiled(name)(place(X), place(LABELS)), whole(name))


@pytest.mark.parametrize("name", ALL)
def test_vmap_agrees_and_gradients_are_finite(name):
    """Where all examples are alike, too: covariances and curvatures vanish."""
    pair = jnp.stack([X, jnp.zeros_like(X)])
    labels = jnp.stack([LABELS, LABELS])

    def value(x, y):
        out = ALL[name](x, y)
        return sum(map(jnp.sum, jax.tree.leaves(out))), out

    both = jit(jax.vmap(jax.grad(value, has_aux=True)))
    slopes, got = both(pair, labels)
    assert np.isfinite(slopes).all()
    for i in range(2):
        want = compiled(name)(pair[i], labels[i])
        close(each(lambda v, i=i: v[i], got), want)


# --- Fisher ---------------------------------------------------------------------------


def test_fisher_of_a_linear_softmax_model():
    p = np.asarray(jax.nn.softmax(linear(W, X)))
    square = np.square(X)
    close(whole("fisher"), {"w": square.T @ (p * (1 - p))})
    residual = np.eye(4)[LABELS] - p
    close(whole("empirical"), {"w": square.T @ residual**2})


def test_fisher_of_a_gaussian_is_the_squared_jacobian():
    jacobian = jit(jax.jacobian(mlp))(MLP, X)
    want = each(lambda j: jnp.sum(j**2, (0, 1)), jacobian)
    close(jit(lambda p: measure.fisher(mlp, p, X, likelihood="gaussian"))(MLP), want)
    given = ft.partial(measure.fisher_empirical, linear, likelihood="gaussian")
    fitted = jit(lambda p: given(p, X, labels=linear(p, X)))(W)
    close(fitted, each(jnp.zeros_like, W))


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_fisher_is_the_curvature_of_the_expected_loss(likelihood):
    """The Fisher's other definition: the diagonal of the Hessian of a KL divergence."""

    def divergence(p, x):
        ours, theirs = mlp(p, x), jax.lax.stop_gradient(mlp(MLP, x))
        if likelihood == "gaussian":
            return 0.5 * jnp.sum((ours - theirs) ** 2)
        return -jnp.sum(jax.nn.softmax(theirs) * jax.nn.log_softmax(ours))

    hessian = jit(jax.hessian(divergence))(MLP, X)
    diagonal = lambda h, w: jnp.diagonal(h.reshape(w.size, w.size)).reshape(w.shape)
    want = {n: diagonal(hessian[n][n], w) for n, w in MLP.items()}
    close(jit(ft.partial(measure.fisher, mlp, likelihood=likelihood))(MLP, X), want)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_monte_carlo_fisher_has_the_exact_one_as_mean(likelihood):
    """Within 5 standard errors, of 64 independent runs."""
    one = lambda key: measure.fisher_monte_carlo(
        linear, W, X, samples=8, likelihood=likelihood, key=key
    )
    draws = np.asarray(run(jax.vmap(one), jax.random.split(KEY, 64))["w"])
    error = draws.std(0) / 8
    exact = whole("fisher" if likelihood == "categorical" else "gaussian fisher")["w"]
    assert (np.abs(draws.mean(0) - exact) < 5 * error).all()
    assert (error < 0.1 * exact).all()


def test_draws_do_not_depend_on_microbatches():
    call = ft.partial(measure.fisher_monte_carlo, linear, W, X)
    whole = jit(lambda key: call(key=key))
    close(jit(lambda key: call(key=key, batch_size=5))(KEY), whole(KEY))
    assert jnp.abs(whole(jax.random.key(4))["w"] - whole(KEY)["w"]).max() > 0.1


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_positions_of_a_sequence_are_independent_outcomes(likelihood):
    """A sequence is worth its positions: here they share no computation."""
    words = X.reshape(4, 4, 3)
    call = jit(ft.partial(measure.fisher, linear, W, likelihood=likelihood))
    close(call(words), call(X))


def test_trees_of_inputs_and_bfloat16():
    apply = lambda p, x, y: (x["u"] + y) @ p["w"]
    zeros = jnp.zeros_like(X)
    want = whole("fisher")
    close(run(lambda u, y: measure.fisher(apply, W, {"u": u}, y), X, zeros), want)
    narrow = {"w": W["w"].astype(jnp.bfloat16)}
    got = run(lambda p, x: measure.fisher(linear, p, x), narrow, X.astype("bfloat16"))
    assert got["w"].dtype == jnp.float32
    np.testing.assert_allclose(got["w"], want["w"], 0.05)


def test_fisher_refuses():
    counted = {**W, "steps": jnp.int32(3)}
    with pytest.raises(ValueError, match="'steps' of dtype int32"):
        measure.fisher(linear, counted, X)
    with pytest.raises(ValueError, match="share the length"):
        EMPIRICAL(X, labels=LABELS[:3])
    with pytest.raises(ValueError, match="labels have the shape"):
        EMPIRICAL(X, labels=X)
    with pytest.raises(ValueError, match="likelihood must be"):
        measure.fisher(linear, W, X, likelihood="poisson")
    with pytest.raises(ValueError, match="batch_size must be"):
        measure.fisher(linear, W, X, batch_size=0)
    with pytest.raises(ValueError, match="samples must be"):
        measure.fisher_monte_carlo(linear, W, X, samples=0, key=KEY)
    with pytest.raises(ValueError, match="samples must be"):
        measure.hessian_trace(jnp.sum, X, samples=0, key=KEY)


# --- activations ----------------------------------------------------------------------


def test_moments_of_activations():
    x, a, b = (np.asarray(v) for v in (X, MLP["a"], MLP["b"]))
    hidden = np.tanh(x @ a + b)
    close(whole("gram"), {"a": x.T @ x, "c": hidden.T @ hidden})
    norms = whole("activation_norms")["c"]
    close(np.sqrt(norms.squares), np.linalg.norm(hidden, axis=0))
    assert norms.count == 16
    got = whole("covariance")["c"]
    want = np.float32(16), hidden.mean(0), np.cov(hidden.T, bias=True)
    close(got, measure.Gaussian(*want))
    alone = whole("per feature")["c"]
    close(alone.mean[:, 0], hidden.mean(0))
    close(alone.covariance[:, 0, 0], hidden.var(0))
    picked = measure.gram(mlp, MLP, X, where=tree.glob("c"))
    assert list(picked) == ["c"]


def test_moments_in_a_scan_and_of_a_tied_leaf():
    layers = {"w": normal(5, 2, 3, 3), "e": normal(6, 4, 3)}

    def apply(p, ids):
        x = jnp.take(p["e"], ids, axis=0)
        x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])
        return x @ p["e"].T

    x = layers["e"][LABELS]
    h = jnp.tanh(x @ layers["w"][0])
    last = jnp.tanh(h @ layers["w"][1])
    got = run(lambda p: measure.gram(apply, p, LABELS), layers)
    close(got, {"e": last.T @ last, "w": jnp.stack([x.T @ x, h.T @ h])})


def test_covariance_keeps_its_digits_far_from_zero():
    far = 1000 + X
    got = run(lambda x: measure.covariance(linear, W, x), far)["w"].covariance
    np.testing.assert_allclose(got, np.cov(X.T, bias=True), 1e-3, 1e-4)


def test_covariance_of_two_uses_is_of_all_rows():
    apply = lambda p, x: linear(p, x) + linear(p, 2 + x)
    want = measure.gaussian(jnp.concatenate([X, 2 + X]))
    close(run(lambda x: measure.covariance(apply, W, x), X)["w"], want)


# --- Gaussians ------------------------------------------------------------------------


def test_pooled_moments_are_those_of_all_rows():
    parts = [measure.gaussian(X[i : i + 4] + 50) for i in range(0, 16, 4)]
    pooled = ft.reduce(measure.pool, parts)
    close(pooled, measure.gaussian(X + 50), 1e-4)
    close(pooled, ft.reduce(measure.pool, reversed(parts)), 1e-4)
    none = measure.gaussian(X[:0])
    close(measure.pool(none, parts[0]), parts[0], 0)
    close(measure.pool(none, none), none, 0)
    np.testing.assert_allclose(pooled.covariance, np.cov(X.T, bias=True), 1e-4, 1e-4)


def normal_with(mean, covariance):
    return measure.Gaussian(jnp.float32(10), jnp.array(mean), jnp.array(covariance))


def test_frechet_in_closed_form():
    one = normal_with([1.0], [[4.0]])
    other = normal_with([-2.0], [[9.0]])
    close(run(measure.frechet, one, other), jnp.float32(9 + 1))
    close(run(measure.frechet, one, other, unbiased=True), jnp.float32(9 + 10 / 9))
    turn = jnp.linalg.qr(normal(7, 3, 3))[0]
    commuting = lambda d: (turn * jnp.array(d)[None]) @ turn.T
    a, b = jnp.array([1.0, 4.0, 0.0]), jnp.array([9.0, 0.0, 0.0])
    pair = [normal_with([0.0] * 3, commuting(d)) for d in (a, b)]
    got = run(measure.frechet, *pair)
    np.testing.assert_allclose(got, (1 - 3) ** 2 + 4, 1e-5)


def test_frechet_is_a_distance():
    y, turn = normal(8, 16, 3), jnp.linalg.qr(normal(7, 3, 3))[0]
    far = jit(lambda x, y: measure.frechet(measure.gaussian(x), measure.gaussian(y)))
    close(far(X, y), far(y, X), 1e-5)
    assert far(X, y) > 0.1
    assert 0 <= far(X, X) < 1e-5
    close(far(X @ turn, y @ turn), far(X, y), 1e-4)


def test_frechet_gradient_is_the_slope():
    """The closed form of its derivative; equal eigenvalues do no harm."""

    def distance(x, y):
        return measure.frechet(measure.gaussian(x), measure.gaussian(y))

    def slopes(x, y):
        vx, vy = jnp.cos(x), jnp.sin(y)
        at = lambda h: distance(x + h * vx, y + h * vy)
        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        return jax.jvp(distance, (x, y), (vx, vy))[1], slope

    with jax.enable_x64(True):
        x, y = (jnp.asarray(v, jnp.float64) for v in (X, normal(8, 16, 3)))
        np.testing.assert_allclose(*run(slopes, x, y), 1e-7)
    same = normal_with([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    slope = run(jax.grad(lambda g: measure.frechet(g, same)), same)
    close(slope, each(jnp.zeros_like, slope), 1e-6)


# --- similarity -----------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("wide", [2, 30])
def test_cka_ignores_rotation_scale_and_shift(wide, unbiased):
    x, y = normal(9, 12, wide), normal(10, 12, 3)
    cka = jit(ft.partial(measure.cka, unbiased=unbiased))
    close(cka(x, x), jnp.ones(()), 1e-5)
    turn = jnp.linalg.qr(normal(11, wide, wide))[0]
    close(cka(3 * x @ turn + 1, x), jnp.ones(()), 1e-5)
    close(cka(5 * x @ turn - 2, y), cka(x, y), 1e-5)
    close(cka(y, x), cka(x, y), 1e-6)
    assert cka(x, y) < 0.9
    assert cka(jnp.ones_like(x), y) == 0


def test_cka_as_the_papers_write_it():
    x, y = (np.asarray(normal(i, 12, n), np.float64) for i, n in ((9, 20), (10, 3)))
    centre = np.eye(12) - 1 / 12
    k, l = x @ x.T, y @ y.T
    inner = lambda a, b: np.trace(a @ centre @ b @ centre)
    want = inner(k, l) / np.sqrt(inner(k, k) * inner(l, l))
    np.testing.assert_allclose(run(measure.cka, jnp.array(x), jnp.array(y)), want, 1e-5)
    got = run(measure.hsic, jnp.array(x), jnp.array(y), unbiased=False)
    np.testing.assert_allclose(got.xy, inner(k, l) / 11**2, 1e-5)


def test_unbiased_hsic_is_the_mean_over_distinct_examples():
    """Its U-statistic, and 0 on average where x and y are independent."""
    x, y = normal(12, 5, 2), normal(13, 5, 2)
    k, l = (np.asarray(v @ v.T, np.float64) for v in (x, y))
    distinct = [
        (i, j, q, r) for i, j, q, r in np.ndindex(5, 5, 5, 5) if len({i, j, q, r}) == 4
    ]
    terms = [
        k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
        for i, j, q, r in distinct
    ]
    np.testing.assert_allclose(jit(measure.hsic)(x, y).xy, np.mean(terms), 1e-4, 1e-5)
    many = jit(measure.hsic)(normal(14, 4000, 6, 2), normal(15, 4000, 6, 2)).xy
    assert abs(many.mean()) < 4 * many.std() / 4000**0.5


def test_minibatches_estimate_the_whole():
    x = normal(16, 400, 4)
    y = x @ normal(17, 4, 3) + normal(18, 400, 3)
    whole = jit(measure.cka)(x, y)
    batched = jit(measure.hsic)(x.reshape(50, 8, 4), y.reshape(50, 8, 3))
    sums = each(lambda v: v.sum(0), batched)
    np.testing.assert_allclose(measure.similarity(sums), whole, atol=0.05)
    biased = jit(measure.cka)(x.reshape(50, 8, 4), y.reshape(50, 8, 3)).mean()
    assert biased - whole > 0.05


def test_hsic_refuses_too_few_or_other_rows():
    with pytest.raises(ValueError, match="at least 4 rows"):
        measure.hsic(X[:3], X[:3])
    with pytest.raises(ValueError, match="at least 2 rows"):
        measure.cka(X, X[:3])
    with pytest.raises(ValueError, match="expected rows"):
        measure.gaussian(X[0])


# --- curvature ------------------------------------------------------------------------


def test_one_probe_is_exact_where_the_hessian_is_diagonal():
    def loss(p):
        return jnp.sum(p["u"] ** 3) + 2 * jnp.sum(p["v"].astype("f4") ** 2)

    point = {"u": normal(19, 4), "v": normal(20, 2, 3).astype(jnp.bfloat16)}
    got = run(lambda p: measure.hessian_diagonal(loss, p, key=KEY), point)
    close(got, {"u": 6 * point["u"], "v": jnp.full((2, 3), 4.0)})
    assert got["v"].dtype == jnp.float32
    traces = run(lambda p: measure.hessian_trace(loss, p, key=KEY), point)
    close(traces, each(jnp.sum, got))


def test_probes_have_the_trace_as_mean_and_the_stated_variance():
    h = normal(21, 6, 6)
    h = h + h.T
    loss = lambda p: 0.5 * p @ h @ p
    one = lambda key: measure.hessian_trace(loss, jnp.ones(6), samples=2, key=key)
    draws = jit(jax.vmap(one))(jax.random.split(KEY, 4000))
    variance = 2 * (jnp.sum(h**2) - jnp.sum(jnp.diagonal(h) ** 2)) / 2
    np.testing.assert_allclose(draws.var(), variance, 0.1)
    assert abs(draws.mean() - jnp.trace(h)) < 5 * (variance / 4000) ** 0.5


def test_another_leaf_moves_no_probe():
    loss = lambda p: jnp.sum(p["w"]) ** 4
    diagonal = jit(lambda p: measure.hessian_diagonal(loss, p, key=KEY))
    one, two = diagonal({"w": X}), diagonal({"a": X, "w": X})
    close(one["w"], two["w"], 0)
    close(two["a"], jnp.zeros_like(X), 0)
