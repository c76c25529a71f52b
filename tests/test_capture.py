"""Statistics captured from models, against the same by hand."""

import functools as ft

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from rewrite_models import MODELS, normal

from jaxlab import tree
from jaxlab.rewrite import as_matrix, capture, uses

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
everything = lambda path, leaf: True
same = lambda x: x
gram = lambda x: x.mT @ x


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def matrices(apply, params, inputs):
    """The leaves with one kind of matrix product: path -> (leaf, use)."""
    found = uses(apply, params, *inputs)
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    alone = {p: u[0] for p, u in found.items() if u[:1] and len(set(u)) == 1}
    return {p: (leaves[p], u) for p, u in alone.items() if u.contracted}


@pytest.mark.parametrize("name", MODELS)
def test_input_times_matrix_is_output(name):
    """For every product of every model, summed over its uses; the result is kept."""
    apply, params, inputs = MODELS[name]()
    chosen = matrices(apply, params, inputs)
    assert chosen
    where = lambda path, leaf: path in chosen

    def both(params, *inputs):
        one = capture(apply, where=where, reduce=same)(params, *inputs)
        two = capture(apply, where=where, reduce=same, of="output")(params, *inputs)
        return *one, *two, apply(params, *inputs)

    a, x, b, y, want = jit(both)(params, *inputs)
    np.testing.assert_array_equal(a, want)
    np.testing.assert_array_equal(b, want)
    assert x.keys() == y.keys() == chosen.keys()
    for path, (w, use) in chosen.items():
        close(jnp.matmul(x[path], as_matrix(w, use)), y[path])


def test_gram_of_an_mlp_is_that_by_hand():
    apply, params, (x,) = MODELS["mlp"]()
    h = np.tanh(x @ params["a"]["w"] + params["a"]["b"][None])
    out, stats = capture(apply, where=tree.glob("*/w"), reduce=gram)(params, x)
    close(stats, {"a/w": x.T @ x, "b/w": h.T @ h})
    np.testing.assert_array_equal(out, apply(params, x))
    z = np.asarray(x @ params["a"]["w"])
    bias = capture(apply, where=tree.glob("a/b"), reduce=gram)
    close(bias(params, x)[1], {"a/b": z.T @ z})


def test_reduce_may_return_any_tree():
    apply, params, (x,) = MODELS["mlp"]()
    moments = lambda x: {"n": x.shape[-2], "sums": [x.sum(-2), (x * x).sum(-2)]}
    stats = capture(apply, where=tree.glob("a/w"), reduce=moments)(params, x)[1]
    close(stats, {"a/w": {"n": 5, "sums": [x.sum(0), (x * x).sum(0)]}})


CONVS = {
    "plain": ((2, 7, 8, 4), (3, 3, 4, 6), {}),
    "strided": ((2, 7, 8, 4), (3, 2, 4, 6), {"window_strides": (2, 3)}),
    "padded": ((2, 7, 8, 4), (3, 3, 4, 6), {"padding": ((2, 0), (1, 3))}),
    "cropped": ((2, 7, 8, 4), (3, 3, 4, 6), {"padding": ((-1, 0), (1, -2))}),
    "dilated": ((2, 7, 8, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 1)}),
    "transposed": ((2, 4, 3, 4), (3, 3, 4, 6), {"lhs_dilation": (2, 3)}),
    "grouped": ((2, 7, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": ((2, 7, 8, 4), (3, 3, 1, 4), {"feature_group_count": 4}),
    "multiplied": ((2, 7, 8, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
    "everything": (
        (2, 7, 8, 4),
        (3, 2, 2, 6),
        {
            "window_strides": (2, 1),
            "padding": ((2, 1), (0, 3)),
            "lhs_dilation": (1, 2),
            "rhs_dilation": (2, 2),
            "feature_group_count": 2,
        },
    ),
}
LAYOUTS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (0, 1, 2, 3), (0, 1, 2, 3)),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (0, 3, 1, 2), (3, 2, 0, 1)),
    "odd": (("CWNH", "WOHI", "HNCW"), (3, 2, 0, 1), (1, 3, 0, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONVS)
def test_patches_times_matrix_is_the_convolution(name, layout):
    xs, ws, options = CONVS[name]
    numbers, turn_x, turn_w = LAYOUTS[layout]
    x, w = normal(0, *xs).transpose(turn_x), normal(1, *ws).transpose(turn_w)
    defaults = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))}
    apply = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], dimension_numbers=numbers, **(defaults | options)
    )
    take = lambda of: capture(apply, where=everything, reduce=same, of=of)
    both = lambda p, x: (take("input")(p, x)[1]["w"], take("output")(p, x)[1]["w"])
    rows, out = jit(both)({"w": w}, x)
    (use,) = uses(apply, {"w": w}, x)["w"]
    groups = options.get("feature_group_count", 1)
    assert rows.shape[:-2] == ((groups,) if groups > 1 else ())
    close(jnp.matmul(rows, as_matrix(w, use)), out)
    assert use.shape[use.contracted[-1]] == rows.shape[-1] // np.prod(
        [use.shape[a] for a in use.contracted[:-1]]
    )


def test_patches_of_an_image_by_hand():
    """A kernel HWI sees the pixels below and right of it, channels fastest."""
    x = jnp.arange(18.0).reshape(1, 3, 3, 2)
    apply = lambda p, x: jax.lax.conv_general_dilated(
        x, p, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    take = capture(apply, where=everything, reduce=same)
    (rows,) = take(jnp.zeros((2, 2, 2, 1)), x)[1].values()
    want = [x[0, i : i + 2, j : j + 2].ravel() for i in range(2) for j in range(2)]
    np.testing.assert_array_equal(rows, want)


def test_scanned_layers_are_stacked_and_constants_summed():
    apply, params, (x,) = MODELS["scanned"]()
    seen = {n: [] for n in ("q", "o", "scale", "bias")}
    h = x @ params["in"]
    flat = lambda x, n: np.asarray(x).reshape(-1, n)
    for i in reversed(range(3)):
        p = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        seen["q"].insert(0, flat(h, 4))
        a = jnp.tanh(jnp.einsum("bsd,dhk->bshk", h, p["q"]))
        seen["o"].insert(0, flat(a, 6))
        h = h + jnp.einsum("bshk,hkd->bsd", a, p["o"])
        seen["scale"].insert(0, flat(h, 4))
        z = h * p["scale"][None, None]
        seen["bias"].insert(0, flat(z, 4))
        z = z + p["bias"][None, None]
        h = h + jax.nn.gelu(z @ p["up"]) @ p["up"].T
    want = {f"layers/{n}": np.stack([v.T @ v for v in vs]) for n, vs in seen.items()}
    where = lambda path, leaf: path in want
    close(jit(capture(apply, where=where, reduce=gram))(params, x)[1], want, 1e-4)


def test_a_recurrence_sums_over_time():
    apply, params, (xs,) = MODELS["gru"]()
    want = jnp.einsum("tbi,tbj->ij", xs, xs)
    close(capture(apply, where=tree.glob("wi"), reduce=gram)(params, xs)[1]["wi"], want)


def test_layers_in_groups_come_in_the_order_of_the_leaf():
    """Two scans slice one axis; another pair slices two axes, the last one first."""
    one = lambda x, w: (x @ w, None)
    many = lambda x, ws: (jax.lax.scan(one, x, ws)[0], None)
    apply = lambda p, x: jax.lax.scan(many, x, p)[0]
    w, x = normal(0, 6, 4, 4), normal(1, 5, 4)
    grouped = lambda p, x: apply(p.reshape(3, 2, 4, 4), x)
    crossed = lambda p, x: apply(jnp.moveaxis(p, 0, 1), x)
    rows = []
    for i in range(6):
        rows.append(x)
        x = x @ w[i]
    take = lambda f, w: capture(f, where=everything, reduce=same)(w, rows[0])[1][""]
    close(take(grouped, w), jnp.stack(rows))
    by_column = w.reshape(3, 2, 4, 4).swapaxes(0, 1)
    close(take(crossed, by_column), jnp.stack(rows).reshape(3, 2, 5, 4).swapaxes(0, 1))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_branch_not_taken_adds_zero_and_a_loop_sums(sign):
    apply, params, (x,) = MODELS["branching"]()
    x = sign * abs(x)
    stats = jit(capture(apply, where=everything, reduce=gram))(params, x)[1]
    yes, no = (gram(x), 0 * gram(x)) if sign > 0 else (0 * gram(x), gram(x))
    second = x @ params["no"]
    h = jnp.tanh(x @ params["yes"]) if sign > 0 else second @ params["no"]
    loop = []
    for _ in range(3):
        loop.append(gram(h))
        h = jnp.tanh(h @ params["loop"])
    want = {"no": no + (gram(second) if sign < 0 else 0), "yes": yes}
    close(stats, want | {"loop": sum(loop), "out": gram(h)}, 1e-4)


def test_a_table_sees_one_hot_rows_and_tied_leaves_ask_which():
    apply, params, (tokens,) = MODELS["tied"]()
    with pytest.raises(ValueError, match=r"'embed' has uses whose statistics have no"):
        capture(apply, where=tree.glob("embed"), reduce=gram)(params, tokens)
    pick = lambda name: capture(
        apply, where=tree.glob("embed"), reduce=gram, only=lambda u: u.primitive == name
    )
    counts = np.diag(np.bincount(np.ravel(tokens), minlength=7))
    close(pick("gather")(params, tokens)[1]["embed"], counts.astype(np.float32))
    x = params["embed"][tokens] + params["place"][None]
    h = np.tanh(np.asarray(x @ params["w"]).reshape(-1, 4))
    close(pick("dot_general")(params, tokens)[1]["embed"], h.T @ h)


def test_experts_are_a_batch():
    apply, params, (x,) = MODELS["moe"]()
    stats = capture(apply, where=tree.glob("down", "up"), reduce=gram)(params, x)[1]
    h = jax.nn.relu(jnp.einsum("td,edf->etf", x, params["up"]))
    close(stats, {"down": jnp.einsum("etf,etg->efg", h, h), "up": x.T @ x})


def test_under_vmap_and_sharding():
    apply, params, (x,) = MODELS["scanned"]()
    take = capture(apply, where=tree.glob("**/q", "**/scale"), reduce=gram)
    batch = jnp.stack([x * (i + 1) for i in range(8)])
    each = jit(jax.vmap(take, (None, 0)))(params, batch)
    whole = jit(take)(params, batch.reshape(-1, *x.shape[1:]))
    close(jax.tree.map(lambda s: s.sum(0), each[1]), whole[1], 2e-4)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("d"))
    rows = jax.device_put(batch.reshape(-1, *x.shape[1:]), spread)
    close(jit(take)(params, rows)[1], whole[1], 2e-4)


def test_statistics_are_differentiable():
    apply, params, (x,) = MODELS["mlp"]()
    take = capture(apply, where=tree.glob("b/w"), reduce=gram)
    weight = normal(9, 4, 4)

    def by_hand(p):
        h = jnp.tanh(x @ p["a"]["w"] + p["a"]["b"][None])
        return jnp.sum(weight * (h.T @ h))

    ours = lambda p: jnp.sum(weight * take(p, x)[1]["b/w"])
    close(jax.grad(ours)(params), jax.grad(by_hand)(params))


def test_within_shard_map_each_device_sees_its_rows():
    def apply(p, xs):
        cell = lambda h, x: (jnp.tanh(x @ p["wi"] + h @ p["wh"]), None)
        return jax.lax.scan(cell, jnp.zeros_like(xs[0] @ p["wi"]), xs)[0]

    params = {"wi": normal(0, 3, 4), "wh": normal(1, 4, 4)}
    xs = normal(2, 5, 16, 3)
    take = capture(apply, where=everything, reduce=gram)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    whole, rows = PartitionSpec(), PartitionSpec(None, "d")
    summed = lambda p, xs: jax.lax.psum(take(p, xs)[1], "d")
    split = jax.shard_map(summed, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    close(jit(split)(params, xs), jit(take)(params, xs)[1], 2e-5)


def test_what_is_not_selected_keeps_its_derivative_rule():
    @jax.custom_vjp
    def double(x):
        return x

    double.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))
    apply = lambda p, x: double(x @ p["a"]) @ p["b"]
    params = {"a": normal(0, 3, 3), "b": normal(1, 3, 3)}
    take = capture(apply, where=everything, reduce=gram)
    x = normal(2, 4, 3)
    want = jax.grad(lambda p: apply(p, x).sum())(params)
    close(jax.grad(lambda p: take(p, x)[0].sum())(params), want)


def test_remat_is_kept():
    """Differentiating again runs the layer again, as the function itself does."""
    apply, params, (x,) = MODELS["scanned"]()
    take = capture(apply, where=tree.glob("**/q"), reduce=gram)
    text = str(jax.make_jaxpr(take)(params, x))
    assert text.count("remat2[") == 1
    assert "DotsSaveable" in text
    assert "prevent_cse=True" in text
    assert "reverse=True" in text


REFUSED = {
    "slice": lambda p, x: x @ p["w"][:3],
    "dynamic_slice": lambda p, x: x @ jax.lax.dynamic_slice(p["w"], (1, 0), (3, 4)),
    "scan": lambda p, x: x @ jax.lax.fori_loop(0, 2, lambda _, w: 2 * w, p["w"])[:3],
    "no operation": lambda p, x: x,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_is_refused_by_leaf_and_primitive(name):
    params, x = {"w": normal(0, 4, 4)}, normal(1, 2, 3)
    with pytest.raises(ValueError, match=rf"^'w' is selected but .* '?{name}'?$"):
        capture(REFUSED[name], where=everything, reduce=gram)(params, x)


def test_a_product_in_the_condition_of_a_loop_is_refused():
    def apply(p, x):
        small = lambda c: jnp.sum(c @ p["w"]) < 1
        return jax.lax.while_loop(small, lambda c: c + 1, x)

    with pytest.raises(ValueError, match="'w' is used in the condition of 'while'"):
        capture(apply, where=everything, reduce=gram)(
            {"w": jnp.eye(3)}, jnp.zeros((1, 3))
        )


def test_bad_input_is_refused():
    apply, params, inputs = MODELS["mlp"]()
    with pytest.raises(ValueError, match="of must be 'input' or 'output', got 'both'"):
        capture(apply, where=everything, reduce=gram, of="both")
    with pytest.raises(ValueError, match="selects no leaf"):
        capture(apply, where=tree.glob("c/*"), reduce=gram)(params, *inputs)
    never = capture(apply, where=everything, reduce=gram, only=lambda use: False)
    with pytest.raises(ValueError, match="'a/b' is selected but has no use"):
        never(params, *inputs)
