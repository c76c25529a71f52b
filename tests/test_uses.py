"""What `uses` finds in small models and awkward programs, and the matrix of a use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewrite_models import MODELS, fresh, normal

from jaxlab import tree
from jaxlab.rewrite import Use, as_matrix, from_matrix, uses

DOT, CONV, GATHER = "dot_general", "conv_general_dilated", "gather"


def brief(found):
    """(primitive, stacked, batch, contracted, free) of each use."""
    return [tuple(u[1:6]) for u in found]


def matrix(contracted, free, *, name=DOT, batch=(), stacked=()):
    return (name, stacked, batch, contracted, free)


def plain(name, stacked=()):
    return (name, stacked, (), (), ())


FOUND = {
    "mlp": {
        "a/b": [plain("add")],
        "a/w": [matrix((0,), (1,))],
        "b/w": [matrix((1,), (0,))],
    },
    "transformer": {
        "embed/embedding/value": [
            matrix((0,), (1,), name=GATHER),
            matrix((1,), (0,)),
        ],
        "norm/scale/value": [plain("mul")],
        **{f"block/{n}/scale/value": [plain("mul")] for n in ("before", "after")},
        "block/q/kernel/value": [matrix((0,), (1,))],
        "block/k/kernel/value": [matrix((0,), (1, 2))],
        "block/v/kernel/value": [matrix((0,), (1, 2))],
        "block/v/bias/value": [plain("add")],
        "block/o/kernel/value": [matrix((0, 1, 2), (3,))],
        "block/o/bias/value": [plain("add")],
        **{
            f"block/{n}/kernel/value": [matrix((0,), (1,))]
            for n in ("gate", "up", "down")
        },
        **{f"block/{n}/bias/value": [plain("add")] for n in ("gate", "up", "down")},
    },
    "resnet": {
        "params/stem/kernel": [matrix((0, 1, 2), (3,), name=CONV)],
        "params/Conv_0/kernel": [matrix((0, 1, 2), (3,), name=CONV)],
        "params/Conv_1/kernel": [matrix((0, 1, 2), (), name=CONV, batch=(3,))],
        "params/Conv_2/kernel": [matrix((0, 1, 2), (4,), name=CONV, batch=(3,))],
        "params/Conv_3/kernel": [matrix((0, 1, 2), (3,), name=CONV)],
        "params/Dense_0/kernel": [matrix((0,), (1,))],
        **{f"params/Conv_{i}/bias": [plain("add")] for i in range(3)},
        **{f"params/{n}/bias": [plain("add")] for n in ("stem", "Dense_0")},
        "params/GroupNorm_0/bias": [plain("add")],
        "params/GroupNorm_0/scale": [plain("mul")],
        **{f"params/BatchNorm_{i}/bias": [plain("add")] for i in range(2)},
        **{f"params/BatchNorm_{i}/scale": [plain("mul")] for i in range(2)},
        **{f"batch_stats/BatchNorm_{i}/mean": [plain("sub")] for i in range(2)},
        **{f"batch_stats/BatchNorm_{i}/var": [plain("add")] for i in range(2)},
    },
    "equinox": {
        **{f"layers/{i}/weight": [matrix((1,), (0,))] for i in range(3)},
        **{f"layers/{i}/bias": [plain("add")] for i in range(3)},
    },
    "gru": {
        "b": [plain("add")],
        **{n: [matrix((0,), (1,))] for n in ("wi", "wh", "out")},
    },
    "scanned": {
        "in": [matrix((0,), (1,)), matrix((1,), (0,))],
        "layers/q": [matrix((1,), (2, 3), stacked=(0,))],
        "layers/o": [matrix((1, 2), (3,), stacked=(0,))],
        "layers/up": [
            matrix((1,), (2,), stacked=(0,)),
            matrix((2,), (1,), stacked=(0,)),
        ],
        "layers/scale": [plain("mul", (0,))],
        "layers/bias": [plain("add", (0,))],
    },
    "branching": {
        "no": [matrix((0,), (1,))] * 2,
        **{n: [matrix((0,), (1,))] for n in ("yes", "loop", "out")},
    },
    "moe": {
        "router": [matrix((0,), (1,))],
        "up": [matrix((1,), (0, 2))],
        "down": [matrix((1,), (2,), batch=(0,))],
        "folded": [matrix((0,), (2,), batch=(1,))],
    },
    "tied": {
        "embed": [matrix((0,), (1,), name=GATHER), matrix((1,), (0,))],
        "place": [plain("add")],
        "w": [matrix((0,), (1,))],
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_of_a_model_is_found(name):
    apply, params, inputs = MODELS[name]()
    found = uses(apply, params, *inputs)
    assert sorted(found) == sorted(tree.paths(params))
    assert {p: brief(u) for p, u in found.items()} == FOUND[name]
    assert all(u.path == p for p, us in found.items() for u in us)


@pytest.mark.parametrize("name", MODELS)
def test_from_matrix_undoes_as_matrix(name):
    apply, params, inputs = MODELS[name]()
    params = fresh(params)
    found = uses(apply, jax.eval_shape(lambda: params), *inputs)
    leaves = dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))
    for use in (u for us in found.values() for u in us if u.contracted):
        w = leaves[use.path]
        back = from_matrix(as_matrix(w, use), use, w)
        np.testing.assert_array_equal(back, w)
        half = jax.ShapeDtypeStruct(w.shape, jnp.bfloat16)
        assert from_matrix(as_matrix(w, use), use, half).dtype == jnp.bfloat16


def folded(p, x):
    """A leaf (in, heads * dim) as (in, heads, dim)."""
    return jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(4, 2, 3))


def merged(p, x):
    """A leaf (2, 2, 6) as (4, 6)."""
    return x @ p["w"].reshape(4, 6)


def swapped(p, x):
    """A leaf (in, 2, 3) with its output axes exchanged, and merged."""
    return x @ p["w"].reshape(4, 2, 3).transpose(0, 2, 1).reshape(4, 6)


def cast(p, x):
    low = jnp.bfloat16
    return (x.astype(low) @ p["w"].astype(low)).astype(jnp.float32)


def called(p, x):
    inner = jax.jit(lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x))
    return inner(p["w"] * 2, x) + inner(p["w"], x)


@jax.custom_vjp
def straight(w):
    return w.astype(jnp.float32)


straight.defvjp(lambda w: (straight(w), None), lambda _, g: (2 * g,))


def ruled(p, x):
    """Followed through a function with its own derivative."""
    return x @ straight(p["w"])


def barrier(p, x):
    w, x = jax.lax.optimization_barrier((p["w"], x))
    return x @ w


def repeated(p, x):
    """One weight for a batch of products: the batch is rows."""
    w = jnp.broadcast_to(p["w"][None], (5, 4, 6))
    return jnp.einsum("bsd,bdm->bsm", x.reshape(5, 1, 4), w)


def unit_axes(p, x):
    """A leaf (1, 4, 1, 6) as (4, 6)."""
    return x @ jnp.expand_dims(jnp.squeeze(p["w"]), (0, 2)).reshape(4, 6)


def by_two(p, x):
    """Layers in groups of two: one scan within another."""

    def two(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)

    return jax.lax.scan(two, x, p["w"].reshape(3, 2, 4, 4))[0]


def last_first(p, x):
    """Layers on the last axis."""
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(layer, x, jnp.moveaxis(p["w"], -1, 0))[0]


def passed(p, x):
    """Given back by the scan that slices it, as the module of `nnx.scan` is."""
    x, ws = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, p["w"])
    return jnp.einsum("bd,ldm->blm", x, ws)


def kept(p, x):
    """Carried unchanged through a loop."""
    turn = lambda _, c: (jnp.tanh(c[0] @ c[1]), c[1])
    x, w = jax.lax.fori_loop(0, x.shape[0], turn, (x, p["w"]))
    return x @ w


def integers(p, x):
    """A table in eight bits."""
    return x @ p["w"].astype(jnp.int8).astype(jnp.float32)


def moved(p, x):
    """Changed by the loop that carries it."""
    return jax.lax.fori_loop(0, 3, lambda _, w: w * 0.5, p["w"])[:4] + x.sum()


def stepped(p, x):
    """Layers picked one by one."""
    layer = lambda i, x: jnp.tanh(x @ p["w"][i])
    return jax.lax.fori_loop(0, 3, layer, x)


def summed(p, x):
    """A product over an axis along which the leaf is repeated."""
    return jnp.einsum("bd,dm->bm", x, jnp.broadcast_to(p["w"][None], (4, 6)))


def sharded(p, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(spec, spec), out_specs=spec
    )(p["w"], x)


def conditional(p, x):
    """Which leaf a branch gives is not known."""
    return x @ jax.lax.cond(x.sum() > 0, lambda w: w, lambda w: w.T, p["w"])


def unused(p, x):
    return x


def ensemble(p, x):
    return jax.vmap(lambda w: x @ w)(p["w"])


def conv_ensemble(p, x):
    conv = lambda w: jax.lax.conv(x.reshape(5, 1, 4), w, (1,), "SAME")
    return jax.vmap(conv)(p["w"])


def two_indices(p, x):
    return p["w"][jnp.array([0, 1]), jnp.array([2, 0])] + x[:2]


def both_sides(p, x):
    return x @ (p["w"].T @ p["w"])


def branch_out(p, x):
    """A branch hands the leaf on."""
    w = jax.lax.cond(x.sum() > 0, lambda w: w, lambda w: w, p["w"])
    return x @ w


AWKWARD = {
    folded: ((4, 6), [matrix((0,), (1,))]),
    merged: ((2, 2, 6), [matrix((0, 1), (2,))]),
    swapped: ((4, 6), [matrix((0,), (1,))]),
    cast: ((4, 6), [matrix((0,), (1,))]),
    called: ((4, 6), [plain("mul"), matrix((0,), (1,))]),
    ruled: ((4, 6), [matrix((0,), (1,))]),
    barrier: ((4, 6), [matrix((0,), (1,))]),
    repeated: ((4, 6), [matrix((0,), (1,))]),
    unit_axes: ((1, 4, 1, 6), [matrix((1,), (0, 2, 3))]),
    by_two: ((6, 4, 4), [matrix((1,), (2,), stacked=(0,))]),
    last_first: ((4, 4, 3), [matrix((0,), (1,), stacked=(2,))]),
    passed: ((3, 4, 4), [matrix((1,), (2,), stacked=(0,)), matrix((1,), (0, 2))]),
    kept: ((4, 4), [matrix((0,), (1,))] * 2),
    ensemble: ((3, 4, 6), [matrix((1,), (0, 2))]),
    conv_ensemble: ((3, 6, 1, 3), [matrix((2, 3), (0, 1), name=CONV)]),
    two_indices: ((2, 3, 4), [matrix((0, 1), (2,), name=GATHER)]),
    both_sides: ((4, 4), [matrix((0,), (1,)), matrix((0,), (1,))]),
    branch_out: ((4, 6), [matrix((0,), (1,))]),
    integers: ((4, 6), [plain("convert_element_type")]),
    moved: ((4, 4), [plain("scan")]),
    stepped: ((3, 4, 4), [plain("dynamic_slice")]),
    summed: ((6,), [plain(DOT)]),
    sharded: ((4, 6), [plain("shard_map")]),
    conditional: ((4, 4), [plain("cond")] * 2),
    unused: ((4, 6), []),
}


@pytest.mark.parametrize("apply", AWKWARD, ids=lambda f: f.__name__)
def test_awkward_programs_are_followed_or_named(apply):
    shape, want = AWKWARD[apply]
    w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (5, 4)))
    found = uses(apply, {"w": w}, x)["w"]
    assert brief(found) == want
    for use in found:
        matrix_of = lambda use=use: as_matrix(normal(0, *shape), use)
        if use.contracted:
            assert matrix_of().size == np.prod(shape)
        else:
            with pytest.raises(ValueError, match="no matrix product"):
                matrix_of()


def test_as_matrix_orders_axes_as_the_leaf_does():
    w = normal(0, 3, 4, 2, 5)
    use = Use("w", "dot_general", (3,), (2,), (0,), (1,), w.shape)
    want = jnp.einsum("abcd->dcab", w)
    np.testing.assert_array_equal(as_matrix(w, use), want)
    np.testing.assert_array_equal(from_matrix(want, use, w), w)


def test_grouped_kernels_are_split_where_the_groups_are():
    w = normal(0, 3, 2, 12)  # width, channels per group, 3 groups of 4
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=3,
    )  # fmt: skip
    (use,) = uses(conv, {"w": w}, normal(1, 2, 8, 6))["w"]
    assert use.shape == (3, 2, 3, 4)
    want = w.reshape(6, 3, 4).transpose(1, 0, 2)
    np.testing.assert_array_equal(as_matrix(w, use), want)


def test_a_leaf_of_another_shape_is_refused():
    use = Use("w", "dot_general", (), (), (0,), (1,), (2, 3))
    with pytest.raises(ValueError, match=r"like has shape \(3, 3\), but 'w' is used"):
        from_matrix(jnp.zeros((2, 3)), use, jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"matrix of shape \(2, 2\) is not 'w'"):
        from_matrix(jnp.zeros((2, 2)), use, jnp.zeros((2, 3)))


def test_paths_come_in_program_order():
    apply, params, inputs = MODELS["moe"]()
    more = params | {"a": jnp.zeros(3)}
    found = uses(apply, more, *inputs)
    assert list(found) == ["router", "up", "down", "folded", "a"]
    assert found["a"] == ()
