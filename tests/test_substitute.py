"""Rules in place of operations, against the function on materialised weights."""

import functools as ft

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from rewrite_models import MODELS, fresh, normal

from jaxlab import tree
from jaxlab.rewrite import as_matrix, from_matrix, substitute, uses

jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
original = lambda x, w, s, op: op(x, w)
shifted = lambda x, w, s, op: op(x, w + op.view(s))
low_rank = lambda x, w, s, op: op(x, w) + op.place(op.project(x, s[0]) @ s[1])


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def by_path(params):
    return dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))


def adapters(apply, params, inputs):
    """An adapter (a, b, use) of rank 2 of every matrix with one kind of use."""
    out, leaves = {}, by_path(params)
    for i, (path, found) in enumerate(uses(apply, params, *inputs).items()):
        if found[:1] and found[0].contracted and len(set(found)) == 1:
            *front, n, m = as_matrix(leaves[path], found[0]).shape
            a, b = normal(2 * i, *front, n, 2), normal(2 * i + 1, *front, 2, m)
            out[path] = a, b, found[0]
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_rule_that_changes_nothing_changes_no_bit(name):
    apply, params, inputs = MODELS[name]()
    got = jit(substitute(apply, {"**": original}))(params, {}, *inputs)
    np.testing.assert_array_equal(got, jit(apply)(params, *inputs))


@pytest.mark.parametrize("name", MODELS)
def test_added_weights_and_adapters_are_as_if_materialised(name):
    """Every leaf shifted and every matrix adapted besides: values and gradients."""
    apply, params, inputs = MODELS[name]()
    delta, adapted = by_path(fresh(params, 99)), adapters(apply, params, inputs)
    both = lambda x, w, s, op: (
        op(x, w + op.view(s[0])) + op.place(op.project(x, s[1]) @ s[2])
    )
    rules = dict.fromkeys(delta, shifted) | dict.fromkeys(adapted, both)
    state = delta | {p: (delta[p], a, b) for p, (a, b, _) in adapted.items()}
    added = delta | {
        p: delta[p] + from_matrix(a @ b, use, delta[p])
        for p, (a, b, use) in adapted.items()
    }
    assert adapted
    tuned = substitute(apply, rules)
    changed = jax.tree.unflatten(
        jax.tree.structure(params),
        [w + added[p] for p, w in by_path(params).items()],
    )
    loss = lambda out: (jnp.sum(jnp.sin(out)), out)
    ours, theirs = (
        (lambda s: loss(tuned(params, s, *inputs))),
        (lambda p: loss(apply(p, *inputs))),
    )
    if name == "branching":  # a while loop has no reverse derivative
        close(jit(ours)(state)[1], jit(theirs)(changed)[1])
        return
    got, out = jit(jax.grad(ours, has_aux=True))(state)
    want, expected = jit(jax.grad(theirs, has_aux=True))(changed)
    close(out, expected, 2e-4)
    for path, slope in by_path(want).items():
        if path not in adapted:
            close(got[path], slope, 2e-3)
            continue
        a, b, use = adapted[path]
        g = as_matrix(slope, use)
        close(got[path], (slope, g @ b.mT, a.mT @ g), 2e-3)


def test_masks_quantisers_and_feature_scales():
    apply, params, (x,) = MODELS["mlp"]()
    mask = normal(5, 2, 4) > 0
    step = jnp.float32(0.25)
    rules = {
        "a/w": lambda x, w, s, op: op(x, jnp.round(w / step) * step),
        "b/w": lambda x, w, s, op: op(x, jnp.where(op.view(s), w, 0)),
        "a/b": lambda x, w, s, op: op.place(op.output(op(x, w)) * s[None]),
    }
    scale = normal(6, 4)
    a, b = params["a"], params["b"]
    h = (x @ (jnp.round(a["w"] / step) * step) + a["b"][None]) * scale[None]
    want = jnp.tanh(h) @ jnp.where(mask, b["w"], 0).T
    got = substitute(apply, rules)(params, {"b/w": mask, "a/b": scale}, x)
    close(got, want)


def test_projecting_a_convolution_is_that_of_its_patches():
    """In an odd layout, strided, padded, dilated and grouped."""
    apply = lambda p, x: jax.lax.conv_general_dilated(
        x, p, (2, 1), ((2, 1), (0, 3)), (1, 2), (2, 2), ("CWNH", "WOHI", "HNCW"),
        feature_group_count=2,
    )  # fmt: skip
    x, w, a = normal(0, 4, 8, 2, 7), normal(1, 2, 6, 3, 2), normal(2, 2, 12, 5)

    def rule(x, w, s, op):
        close(op.project(x, s), op.rows(x) @ s)
        return op(x, w)

    substitute(apply, {"": rule})(w, {"": a}, x)


def test_the_operation_says_what_it_is():
    apply, params, (x,) = MODELS["scanned"]()
    seen = {}

    def rule(x, w, s, op):
        seen[op.use.path] = (op.use.stacked, w.shape, op.rows(x).shape)
        y = op(x, w)
        assert (op.place(op.output(y)) == y).shape == y.shape
        return y

    substitute(apply, {"layers/o": rule, "layers/q": rule})(params, {}, x)
    want = {
        "layers/q": ((0,), (4, 2, 3), (6, 4)),
        "layers/o": ((0,), (2, 3, 4), (6, 6)),
    }
    assert seen == want


def test_state_of_layers_in_groups_is_in_the_order_of_the_leaf():
    """Two scans slice one axis; state is sliced alike."""
    one = lambda x, w: (x @ w, None)
    many = lambda x, ws: (jax.lax.scan(one, x, ws)[0], None)
    apply = lambda p, x: jax.lax.scan(many, x, p.reshape(3, 2, 4, 4))[0]
    w, x, scale = normal(0, 6, 4, 4), normal(1, 5, 4), normal(2, 6)
    rule = lambda x, w, s, op: op(x, w * s)
    got = substitute(apply, {"**": rule})(w, {"": scale}, x)
    close(got, apply(w * scale[:, None, None], x))


def test_a_derivative_rule_survives_where_no_selected_leaf_is():
    """And is that of the body where one is."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda r, g: (3 * g @ r[1].T, 5 * r[0].T @ g)
    )
    apply = lambda p, x: product(product(x, p["a"]), p["b"])
    params, x = {"a": normal(0, 3, 3), "b": normal(1, 3, 3)}, normal(2, 4, 3)
    tuned = substitute(apply, {"b": original})
    slopes = jax.grad(lambda p: tuned(p, {}, x).sum())(params)
    plain = jax.grad(lambda p: (x @ p["a"] @ p["b"]).sum())(params)
    close(slopes, {"a": 5 * plain["a"], "b": plain["b"]})


def test_two_leaves_in_one_product_and_one_leaf_twice():
    apply = lambda p, x: x @ (p["a"] @ p["b"]) + x @ (p["a"].T @ p["a"])
    params = {"a": normal(0, 3, 3), "b": normal(1, 3, 3)}
    delta = {"a": normal(2, 3, 3), "b": normal(3, 3, 3)}
    x = normal(4, 2, 3)
    got = substitute(apply, {"*": shifted})(params, delta, x)
    close(got, apply(jax.tree.map(jnp.add, params, delta), x))
    state = {"b": (normal(5, 3, 1), normal(6, 1, 3))}
    rules = {"a": original, "b": low_rank}
    changed = params | {"b": params["b"] + state["b"][0] @ state["b"][1]}
    close(substitute(apply, rules)(params, state, x), apply(changed, x))


def test_any_operation_can_be_done_by_a_rule():
    """Slices, sums and selections have no matrix, but weights all the same."""

    def apply(p, x):
        penalty = jnp.sum(p["w"] ** 2) + jnp.linalg.norm(p["w"])
        chosen = jnp.where(x > 0, p["w"], 2 * p["w"])
        first, _ = jnp.split(p["w"], 2)
        return x @ p["w"][:, :2] + penalty + (chosen + x)[:, :2] * first[:1, :2]

    params, delta, x = {"w": normal(0, 4, 4)}, {"w": normal(1, 4, 4)}, normal(2, 4, 4)
    with jax.numpy_rank_promotion("allow"):
        got = substitute(apply, {"w": shifted})(params, delta, x)
        close(got, apply(jax.tree.map(jnp.add, params, delta), x))
    refused = substitute(lambda p, x: x @ p["w"][:2], {"w": low_rank})
    with pytest.raises(ValueError, match="'w' is used by 'slice', which is no matrix"):
        refused(params, {"w": (x, x)}, x[:, :2])


def test_adapters_in_a_wider_dtype_than_the_program():
    apply = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    params, x = {"w": normal(0, 3, 4)}, normal(1, 5, 3)
    state = {"w": (normal(2, 3, 2), normal(3, 2, 4))}

    def rule(x, w, s, op):
        return op(x, w).astype(jnp.float32) + op.project(x, s[0]) @ s[1]

    out = substitute(apply, {"w": rule})(params, state, x)
    assert out.dtype == jnp.bfloat16
    low = x.astype(jnp.bfloat16).astype(jnp.float32)
    want = apply(params, x).astype(jnp.float32) + low @ state["w"][0] @ state["w"][1]
    np.testing.assert_array_equal(out, want.astype(jnp.bfloat16))
    thin = substitute(apply, {"w": low_rank})(params, state, x)
    close(thin.astype(jnp.float32), want, 2e-2)


def test_many_adapters_at_once_and_a_sharded_batch():
    apply, params, (x,) = MODELS["scanned"]()
    state = {p: (a, b) for p, (a, b, _) in adapters(apply, params, (x,)).items()}
    tuned = substitute(apply, dict.fromkeys(state, low_rank))
    scales = jnp.arange(3.0)
    many = jax.vmap(lambda s: jax.tree.map(lambda v: v * s, state))(scales)
    got = jit(jax.vmap(tuned, (None, 0, None)))(params, many, x)
    close(got[0], apply(params, x))
    close(got[2], jit(tuned)(params, jax.tree.map(lambda v: 2 * v, state), x), 2e-4)

    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("d"))
    rows = jnp.concatenate([x * i for i in range(4)])
    out = jit(tuned)(params, state, jax.device_put(rows, spread))
    close(out, jit(tuned)(params, state, rows))


def test_a_loop_may_test_a_selected_leaf():
    def apply(p, x):
        small = lambda c: jnp.sum(c @ p["w"]) < 40
        return jax.lax.while_loop(small, lambda c: c + 1, x)

    w, x = jnp.eye(3), jnp.zeros((1, 3))
    got = substitute(apply, {"w": shifted})({"w": w}, {"w": w}, x)
    assert (got == apply({"w": 2 * w}, x)).all()
    assert got[0, 0] != apply({"w": w}, x)[0, 0]


def test_jitted_functions_keep_their_shardings_and_names():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("d"))
    inner = jax.jit(lambda x, w: x @ w, in_shardings=(rows, None), out_shardings=rows)
    apply = lambda p, x: inner(x, p["w"])
    params, x = {"w": normal(0, 3, 4)}, normal(1, 8, 3)
    tuned = jax.jit(lambda p, x: substitute(apply, {"w": original})(p, {}, x))
    assert tuned(params, x).sharding.spec == PartitionSpec("d")
    text = tuned.lower(params, x).as_text(debug_info=True)
    assert "<lambda>/dot_general" in text


STACKED = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
REFUSED = [
    ({}, {}, "needs at least one rule"),
    ({"v": original}, {}, "rule 'v' matches no leaf of "),
    ({"*": original, "w": original}, {}, r"'w' has two rules: '\*', 'w'"),
    ({"w": original}, {"v": 1.0}, "state has 'v', which has no rule"),
    ({"unused": original}, {}, "rule 'unused' never applies"),
    ({"w": shifted}, {"w": jnp.zeros((2, 3))}, r"state\['w'\] .* \(2, 3\), .* \(3,\)"),
    (
        {"w": lambda x, w, s, op: x[:1]},
        {},
        "the rule for 'w' .* returned shape",
    ),
]


@pytest.mark.parametrize(("rules", "state", "message"), REFUSED)
def test_bad_input_is_refused(rules, state, message):
    params = {"unused": jnp.zeros(2), "w": jnp.zeros((3, 4, 4))}
    with pytest.raises(ValueError, match=message):
        substitute(STACKED, rules)(params, state, jnp.zeros((2, 4)))


def test_a_leaf_that_a_loop_changes_is_refused():
    apply = lambda p, x: x @ jax.lax.fori_loop(0, 3, lambda _, w: w * 0.5, p["w"])
    with pytest.raises(ValueError, match="'w' is changed by, or comes out of, 'scan'"):
        substitute(apply, {"w": original})({"w": jnp.eye(3)}, {}, jnp.eye(3))


def test_projecting_by_an_elementwise_operation_is_refused():
    apply, params, (x,) = MODELS["mlp"]()
    state = {"a/b": (jnp.ones((4, 1)), jnp.ones((1, 4)))}
    with pytest.raises(ValueError, match="'add' of 'a/b' is no matrix product"):
        substitute(apply, {"a/b": low_rank})(params, state, x)
