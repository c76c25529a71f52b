"""What defines the merges of singular vectors, and the derivatives they rest on."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import io, merge, rewrite
from jaxlab.io import _run
from jaxlab.merge import _matrices, _svd

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
METHODS = {
    "tsv_m": merge.tsv_m,
    "iso_c": merge.iso_c,
    "iso_cts": ft.partial(merge.iso_cts, common=0.3),
    "wudi": ft.partial(merge.wudi, steps=3, learning_rate=0.02),
    "svc": merge.svc,
    "knots": ft.partial(merge.knots, method=ft.partial(merge.ties, density=1.0)),
    "opcm": merge.opcm,
    "doge_ta": ft.partial(
        merge.doge_ta, density=1.0, scale=0.5, steps=3, learning_rate=0.02
    ),
}
names = pytest.mark.parametrize("name", METHODS)
ALIKE_BOTH_WAYS = ("tsv_m", "iso_c", "opcm")  # in and out play the same part


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def turned(x):
    return jnp.swapaxes(x, -1, -2)


@ft.cache
def run(name, letters="nm"):
    """The method of one leaf, compiled once for each shape."""
    axes = letters if letters in ("nm", "mn") else {"w": letters}
    return jit(lambda x: METHODS[name]({"w": x}, axes=axes)["w"])


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def singular(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


# --- decompositions


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 4)])
def test_derivatives_of_decompositions_are_slopes(shape):
    """Of every factor, up to the signs that a decomposition may choose."""

    def value(x):
        u, s, vt = _svd.svd(x)
        low = _svd.product(u[..., :2] * s[..., None, :2] ** 2, vt[..., :2, :])
        factor, total = _svd.polar(x)
        wave = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
        return jnp.sum((low + factor) * wave) + jnp.sum(total * s[..., 0])

    with jax.enable_x64(True):
        x, along = (normal(*shape, seed=i).astype(jnp.float64) for i in range(2))
        ends = lambda x: value(x + 1e-5 * along) - value(x - 1e-5 * along)
        slope, rise = jit(lambda x: (jax.grad(value)(x), ends(x)))(x)
        got, want = jnp.sum(slope * along), rise / 2e-5
    np.testing.assert_allclose(got, want, 1e-7)


def test_derivative_of_the_polar_factor_at_equal_singular_values():
    """At the identity all coincide, and the factor moves by the antisymmetric part."""
    move = normal(4, 4)
    _, (got, trace) = jax.jvp(_svd.polar, (jnp.eye(4),), (move,))
    close(got, (move - move.T) / 2)
    close(trace, jnp.trace(move))


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e15])
@pytest.mark.parametrize("x", [np.eye(3), np.ones((3, 3)), np.diag([2, 2, 0])])
def test_derivatives_are_finite_where_singular_values_coincide(x, scale):
    assert np.isfinite(slopes()(jnp.asarray(x * scale, jnp.float32))).all()


@ft.cache
def slopes():
    flat = lambda f, v: [jnp.ravel(y) for y in f(v)]
    both = lambda v: jnp.concatenate(flat(_svd.svd, v) + flat(_svd.polar, v))
    return jit(jax.jacrev(both))


@pytest.mark.parametrize(
    ("axes", "ndim", "batch", "inputs", "outputs"),
    [
        ("nm", 2, (), (0,), (1,)),
        ("nm", 3, (0,), (1,), (2,)),
        ("nm", 4, (), (0, 1, 2), (3,)),
        ("nm", 5, (), (0, 1, 2, 3), (4,)),
        ("mn", 2, (), (1,), (0,)),
        ("mn", 3, (0,), (2,), (1,)),
        ("mn", 4, (), (1, 2, 3), (0,)),
        ({"*/x": "bnnm", "**": "nbbm"}, 4, (1, 2), (0,), (3,)),
        ({"a/?": "nbbm", "a/w": "mnbn"}, 4, (2,), (1, 3), (0,)),
        ({"w": "mn"}, 2, (), (0,), (1,)),
    ],
)
def test_the_axes_of_a_leaf(axes, ndim, batch, inputs, outputs):
    use = _matrices.matrix_use("a/w", (2, 3, 4, 5, 6)[:ndim], axes)
    assert (use.batch, use.contracted, use.free) == (batch, inputs, outputs)


def test_what_is_no_matrix():
    for shape in ((), (3,), (0, 4)):
        assert _matrices.matrix_use("w", shape, "nm") is None
    assert _matrices.matrix_use("w", (3, 4), {"*": ""}) is None


# --- every method


@names
def test_the_layout_is_pytorchs_where_it_is_said(name):
    x = normal(3, 5, 5)
    want = run(name)(x)
    close(turned(run(name, "mn")(turned(x))), want)
    other = turned(run(name)(turned(x)))
    alike = np.abs(other - want).max() < 1e-4
    assert alike == (name in ALIKE_BOTH_WAYS)


@names
def test_convolutions_are_the_matrices_their_docstring_says(name):
    x = normal(3, 2, 2, 3, 5)
    want = run(name)(x.reshape(3, 12, 5)).reshape(2, 2, 3, 5)
    close(run(name)(x), want)
    pytorch = jnp.transpose(x, (0, 4, 3, 1, 2))
    close(jnp.transpose(run(name, "mn")(pytorch), (2, 3, 1, 0)), want)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "doge_ta"])
def test_experts_are_merged_one_by_one(name):
    """But for the length, which OPCM gives to the whole tree."""
    x = normal(3, 2, 5, 5)
    unit = lambda v: v / jnp.linalg.norm(v) if name == "opcm" else v
    want = [unit(run(name)(x[:, e])) for e in range(2)]
    got = run(name)(x)
    close(jnp.stack([unit(v) for v in got]), jnp.stack(want))
    close(run(name, "nmb")(jnp.moveaxis(x, 1, -1)), jnp.moveaxis(got, 0, -1))


def test_experts_share_the_lengths_that_doge_ta_divides_by():
    """An expert beside one of 0 is merged as if it were alone."""
    x = normal(3, 1, 5, 5)
    got = run("doge_ta")(jnp.concatenate([x, jnp.zeros_like(x)], 1))
    close(got, jnp.stack([run("doge_ta")(x[:, 0]), jnp.zeros((5, 5))]))
    close(run("doge_ta", "nmb")(jnp.moveaxis(x, 1, -1))[..., 0], got[0])


@pytest.mark.parametrize("name", ["iso_c", "knots", "opcm"])
def test_uses_say_what_the_letters_say(name):
    """A projection to several heads: `[model, heads, head]` is no batch of matrices."""
    x = normal(3, 4, 2, 3)
    apply = lambda p, v: jnp.einsum("bd,dhk->bhk", v, p["w"]) + p["b"]
    shapes = {"w": jax.ShapeDtypeStruct((4, 2, 3), jnp.float32)}
    shapes["b"] = jax.ShapeDtypeStruct((1, 2, 3), jnp.float32)
    found = rewrite.uses(apply, shapes, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    models = {"w": x, "b": normal(3, 1, 2, 3, seed=1)}
    call = lambda axes: jit(lambda m: METHODS[name](m, axes=axes))
    got = call(found)(models)
    jax.tree.map(close, got, call({"?": "nmm", "b": ""})(models))
    plain = call("nm")({"w": x.reshape(3, 4, 6), "b": models["b"].reshape(3, 6)})
    close(got["w"].reshape(4, 6), plain["w"])


@pytest.mark.parametrize("name", [n for n in METHODS if n != "opcm"])
def test_the_order_of_the_models_makes_no_difference(name):
    x = normal(3, 5, 5)
    close(run(name)(x[jnp.array([2, 0, 1])]), run(name)(x))


@pytest.mark.parametrize("name", [n for n in METHODS if n[:3] not in ("iso", "dog")])
def test_one_model_is_itself(name):
    x = normal(1, 5, 4)
    close(run(name)(x), x[0])


@names
def test_no_task_vector_gives_none(name):
    x = jnp.zeros((3, 5, 5))
    np.testing.assert_array_equal(run(name)(x), x[0])


@names
def test_letters_that_do_not_fit_are_named(name):
    for letters in ("nx", "nmb", "nn", "bm"):
        with pytest.raises(ValueError, match=r"'w'.*one of 'b', 'n', 'm' per axis"):
            run(name, letters)(normal(3, 5, 4))


@pytest.mark.parametrize(
    "name", [n for n in METHODS if n[:3] not in ("opc", "svc", "dog")]
)
def test_vectors_have_the_mean(name):
    x = {"w": normal(3, 1, 4), "b": normal(3, 4)}
    axes = {"w": ""}
    method = ft.partial(merge.knots, method=merge.average) if name == "knots" else None
    got = jit(ft.partial(method or METHODS[name], axes=axes))(x)
    for leaf, v in x.items():
        close(got[leaf], v.mean(0))


# --- each method


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 6)])
def test_iso_c_has_one_singular_value(shape):
    x = normal(*shape)
    got, whole = run("iso_c")(x), x.sum(0)
    close(singular(got), np.full(min(shape[1:]), singular(whole).mean()))
    close(_svd.polar(got)[0], _svd.polar(whole)[0])


def test_iso_c_keeps_a_null_space():
    x = normal(2, 5, 2) @ normal(2, 2, 4, seed=1)
    x = x.at[1].set(x[0])  # the sum has rank 2
    got = singular(run("iso_c")(x))
    close(got, singular(x.sum(0)).sum() / 4 * np.array([1, 1, 0, 0]))


def test_iso_cts_ends_in_iso_c():
    x = normal(3, 6, 5)
    got = jit(lambda x: merge.iso_cts({"w": x}, common=1.0)["w"])(x)
    close(got, run("iso_c")(x))


def test_iso_cts_keeps_the_common_directions():
    """Tasks of orthogonal directions: all of them end with one singular value."""
    x = jnp.stack(
        [jnp.diag(jnp.eye(6)[2 * i] * 3 + jnp.eye(6)[2 * i + 1]) for i in range(3)]
    )
    got = jit(lambda x: merge.iso_cts({"w": x}, common=0.5)["w"])(x)
    close(got, 2 * jnp.eye(6))


def test_tsv_m_keeps_tasks_that_do_not_interfere():
    """Orthogonal tasks of low rank: the sum, as the decorrelation changes nothing."""
    u, _, vt = jnp.linalg.svd(normal(6, 6))
    x = jnp.stack([3.0 * u[:, :1] @ vt[:1], 2.0 * u[:, 1:3] @ vt[1:3]])
    close(run("tsv_m")(x), x.sum(0))


def test_tsv_m_decorrelates():
    """Two equal tasks of rank 1 count once, with the mean of their singular values."""
    x = normal(1, 5, 1) @ normal(1, 1, 4, seed=1)
    got = run("tsv_m")(jnp.concatenate([x, 3 * x]))
    close(got, 2 * x[0], 1e-4)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_tsv_c_is_the_best_of_its_rank(fraction):
    x = {"w": normal(3, 2, 6, 4), "b": normal(3, 4)}
    one = jax.tree.map(lambda v: v[0], x)
    small = jit(lambda x: merge.tsv_c(x, fraction=fraction))(x)
    back = jit(merge.tsv_expand)(small, one)
    np.testing.assert_array_equal(back["b"], x["b"])
    rank = int(4 * fraction)
    assert small["w"].u.shape == (3, 2, 6, rank)
    lost = np.linalg.norm(np.asarray(back["w"] - x["w"], np.float64), axis=(-2, -1))
    close(lost, np.linalg.norm(singular(x["w"])[..., rank:], axis=-1))


def test_wudi_goes_down_to_where_no_task_is_disturbed():
    x = normal(3, 12, 5)

    def loss(tau):
        out = jnp.einsum("kio,kij->koj", x, tau[None] - x)
        return float(jnp.sum(out**2 / jnp.sum(x**2, (1, 2))[:, None, None]))

    merged = jit(lambda x: merge.wudi({"w": x}, steps=3000, learning_rate=0.02)["w"])(x)
    # 15 directions in 12 dimensions: no merge disturbs none, but this is the least.
    h = sum(v @ v.T / jnp.sum(v**2) for v in x)
    c = sum(v @ v.T @ v / jnp.sum(v**2) for v in x)
    least = loss(jnp.linalg.solve(h, c))
    assert loss(merged) < least + 0.01 * (loss(x.sum(0)) - least)
    apart = (
        jnp.zeros((2, 6, 4)).at[0, :3].set(x[0, :3, :4]).at[1, 3:].set(x[1, 3:6, :4])
    )
    close(run("wudi")(apart), apart.sum(0))


def test_svc_counts_shared_directions_once():
    x = normal(1, 5, 4)
    close(run("svc")(jnp.concatenate([x] * 3)), x[0])
    apart = jnp.zeros((2, 4, 4)).at[0, :2, :2].set(x[0, :2, :2])
    apart = apart.at[1, 2:, 2:].set(x[0, 2:4, 2:])
    close(run("svc")(apart), apart.sum(0))


def test_svc_changes_singular_values_alone():
    x, merged = normal(3, 5, 4), normal(5, 4, seed=1)
    got = jit(merge.svc)({"w": x}, {"w": merged})["w"]
    u, s, vt = jnp.linalg.svd(merged, full_matrices=False)
    inside = u.T @ got @ vt.T
    close(inside, jnp.diag(jnp.diagonal(inside)))
    assert (jnp.diagonal(inside) <= s * (1 + 1e-5)).all()


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 9), (2, 4, 5, 3)])
def test_knots_of_a_linear_merge_is_that_merge(shape):
    x = {"w": normal(*shape), "b": normal(shape[0], 3)}
    got = jit(ft.partial(merge.knots, method=merge.average))(x)
    jax.tree.map(close, got, merge.average(x))


def test_knots_aligns():
    """The merge sees parts that are the task vectors in one orthonormal basis."""
    x, seen = normal(3, 5, 4), []
    method = lambda d: seen.append(d["w"]) or merge.average(d)
    parts = jit(lambda x: (merge.knots({"w": x}, method=method), seen[0])[1])(x)
    joint, gram = parts.reshape(15, -1), lambda v: v @ v.swapaxes(-1, -2)
    close(gram(parts), gram(x), 1e-4)
    inner = joint.T @ joint
    close(inner, jnp.diag(singular(x.reshape(15, 4)) ** 2), 1e-4)


# --- streamed


def save_all(folder, stacked):
    k = len(jax.tree.leaves(stacked)[0])
    paths = [folder / f"{i}.safetensors" for i in range(k)]
    for i, path in enumerate(paths):
        io.save(path, jax.tree.map(lambda v, i=i: v[i], stacked))
    return paths


@pytest.mark.parametrize(
    "axes",
    ["mn", {"a/*": "mn"}, {"a/w": rewrite.Use("a/w", "", (), (), (1,), (0,), (6, 5))}],
)
def test_streams_with_options_that_are_no_numbers(axes, tmp_path):
    x = {"a": {"w": normal(3, 6, 5)}}
    per_leaf = ft.partial(merge.ties, per="leaf", density=0.5)
    method = ft.partial(merge.knots, axes=axes, method=per_leaf)
    paths = save_all(tmp_path, x)
    _run.stream(method, paths, tmp_path / "out")
    close(io.load(tmp_path / "out")["a"]["w"], method(x)["a"]["w"])
    same = ft.partial(merge.knots, axes=axes, method=ft.partial(per_leaf))
    assert _run.stream(same, paths, tmp_path / "out", resume=True).resumed


def test_the_plan_knows_what_is_needed_at_once(tmp_path):
    """A leaf at a time; but all of them where each depends on all."""
    shape = (3, 60, 50)
    paths = save_all(tmp_path, {"a": normal(*shape), "b": normal(*shape, seed=1)})
    one = 4 * 60 * 50
    leafwise, *others = (
        _run.stream(METHODS[name], paths, tmp_path / name).peak_memory
        for name in ("iso_c", "tsv_m", "iso_cts", "svc", "wudi")
    )
    joint = _run.stream(merge.opcm, paths, tmp_path / "joint").peak_memory
    blocks = _run.stream(merge.linear, paths, tmp_path / "blocks").peak_memory
    assert 2 * 3 * one < leafwise < joint / 1.5
    assert all(2 * 3 * one < x < joint / 1.2 for x in others)
    assert blocks != leafwise


@pytest.mark.parametrize("name", ["tsv_m", "wudi", "opcm"])
def test_live_bytes_is_about_what_the_compiler_takes(name):
    fn = lambda x: METHODS[name]({"w": x})["w"]
    x = jax.ShapeDtypeStruct((3, 96, 64), jnp.float32)
    sizes = jax.jit(fn).lower(x).compile().memory_analysis()
    taken = (
        sizes.temp_size_in_bytes
        + sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
    )
    assert 0.7 * taken < rewrite.live_bytes(fn, x) < 2.5 * taken


# --- trust regions and projected descent


@pytest.mark.parametrize("given", [True, False])
def test_the_trust_region_is_where_tasks_do_not_conflict(given):
    x = {"a": normal(3, 5, 5), "b": normal(3, 7, seed=1)}
    felt = {"a": normal(3, 5, 5, seed=2), "b": normal(3, 7, seed=3)} if given else None
    got = jit(ft.partial(merge.trust_region, quantile=0.7, scale=0.5))(x, felt)
    flat = lambda m: np.concatenate(
        [np.asarray(v).reshape(len(v), -1) for v in m.values()], 1
    )
    tau, g = np.abs(flat(x)), np.abs(flat(felt or x))
    conflict = sum(g[i] * tau[j] for i in range(3) for j in range(3) if i != j)
    inside = conflict < np.sort(conflict)[int(32 * 0.7)]
    assert inside.sum() == 22
    want = 0.5 * flat(x).sum(0) * inside
    close(np.concatenate([np.ravel(v) for v in got.values()]), want)


def test_no_conflict_no_loss():
    x = {"w": jnp.array([[4.0, 0.0, 3.0], [0.0, 2.0, 3.0]])}
    close(merge.trust_region(x, quantile=0.0)["w"], [4, 2, 0])
    close(merge.trust_region({"w": x["w"][:1]})["w"], x["w"][0])
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\]"):
        merge.trust_region(x, quantile=1.5)
    with pytest.raises(ValueError, match="sensitivity differs at 'w'"):
        merge.trust_region(x, {"w": x["w"][:1]})


def test_doge_ta_lessens_conflict():
    x = normal(3, 6, 8)
    keywords = {"density": 1.0, "scale": 0.5, "subspace": 3}
    run = lambda n: jit(
        ft.partial(merge.doge_ta, **keywords, steps=n, learning_rate=0.02)
    )
    plain, moved = (run(n)({"w": x})["w"] for n in (0, 200))
    w = np.asarray(turned(x), np.float64)  # the paper's layout
    each = 0.5 / np.linalg.norm(w, axis=(1, 2))
    close(plain, np.tensordot(each, x, 1))
    loss = lambda m: np.sum(np.sum(w * (w - np.asarray(m)[None]), -1) ** 2)
    assert loss(turned(moved)) < 0.8 * loss(turned(plain))
    other = jit(ft.partial(merge.doge_ta, **keywords, axes="mn"))({"w": turned(x)})["w"]
    close(turned(other), jit(ft.partial(merge.doge_ta, **keywords))({"w": x})["w"])
    with pytest.raises(ValueError, match="subspace must be at least 1"):
        merge.doge_ta({"w": x}, subspace=0)
