"""rewrite.symmetries finds what a person finds, and nothing that is not true."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from symmetry_models import MODELS
from symmetry_traps import TRAPS, weights

from jaxlab import rewrite, tree

KEY = jax.random.key(5)
FAST = {"xla_backend_optimization_level": 0}
jitted = ft.partial(jax.jit, compiler_options=FAST)


@pytest.fixture(autouse=True)
def as_users_write():
    """The models broadcast and promote as numpy does; the library does not."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@ft.cache
def found(name):
    apply, params, inputs, want = MODELS[name]()
    return apply, params, inputs, want, rewrite.symmetries(apply, params, *inputs)


def texts(group, labels):
    """A group as (size, members, per), in the words of the expected lists."""
    members = {f"{m.path}:{rewrite.describe(m.place)}" for m in group.members}
    return group.size, frozenset(members), tuple(labels.get(p, p) for p in group.per)


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_of_a_model_are_those_that_a_person_finds(name):
    *_, want, got = found(name)
    members = {frozenset(text.split()): n for n, (_, text, _) in want.items()}
    labels = {g.name: members.get(texts(g, {})[1], g.name) for g in got.groups}
    rows = {labels[g.name]: texts(g, labels) for g in got.groups}
    expected = {
        n: (k, frozenset(text.split()), per) for n, (k, text, per) in want.items()
    }
    assert rows.keys() == expected.keys()
    for label, (size, places, per) in expected.items():
        assert rows[label][:2] == (size, places)
        assert sorted(rows[label][2]) == sorted(per), label
    assert got.refused == ()


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_of_a_model_change_nothing(name):
    apply, params, inputs, _, got = found(name)
    change = rewrite.verify(apply, params, got, *inputs, key=KEY, trials=2)
    assert set(change) == {g.name for g in got.groups} | {"all"}
    assert max(change.values()) < 2e-14


KEY_BIAS = "attend/key/bias"  # adds one number to all scores of a query: no effect


@pytest.mark.parametrize("name", MODELS)
def test_a_group_less_one_leaf_changes_the_function(name):
    apply, params, inputs, _, got = found(name)
    still = jax.tree.map(np.asarray, rewrite.identity(got))
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(jnp.asarray, (params, inputs))
        run = jitted(lambda p: apply(p, *inputs))
        move = jitted(lambda t: rewrite.permute(params, got, t))
        want = np.asarray(run(params))
        for group in got.groups:
            left = {m.path for m in group.members} - {KEY_BIAS}
            for _ in range(8):
                table = rng.permuted(still[group.name], axis=-1)
                moved = move(still | {group.name: table})
                for path in sorted(left):
                    out = np.asarray(run(put_back(moved, params, path)))
                    if np.abs(out - want).max() > 1e-7 * np.abs(want).max():
                        left.remove(path)
            assert not left, group.name


def put_back(moved, params, path):
    """The permuted parameters, with one leaf as it was."""
    return tree.path_map(lambda p, x, y: y if p == path else x, moved, params)


def read(text):
    """`size: members [per]; ...` as a set."""
    out = set()
    for part in filter(None, text.split("; ")):
        size, _, rest = part.partition(": ")
        members, _, per = rest.partition(" [")
        out.add((int(size), frozenset(members.split()), (per[:-1],) if per else ()))
    return out


@pytest.mark.parametrize("name", TRAPS)
def test_what_misleads(name):
    apply, shapes, inputs, want = TRAPS[name]
    params = weights(shapes)
    got = rewrite.symmetries(apply, params, *inputs)
    names = {g.name: g.name for g in got.groups}
    # a group is called by its first member
    assert {texts(g, names) for g in got.groups} == read(want)
    change = rewrite.verify(apply, params, got, *inputs, key=KEY)
    assert max(change.values()) < 1e-13


def test_what_is_not_understood_is_named():
    apply, shapes, inputs, _ = TRAPS["a function that is not understood"]
    got = rewrite.symmetries(apply, weights(shapes), *inputs)
    assert ("a", "fft") in got.refused
    assert ("b", "fft") in got.refused


def test_shapes_are_enough():
    apply, params, inputs, _, got = found("grouped_query_decoder")
    spec = lambda t: jax.eval_shape(lambda: jax.tree.map(jnp.asarray, t))
    assert rewrite.symmetries(apply, spec(params), *spec(inputs)) == got


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_a_call_is_seen_through(wrap):
    apply, params, inputs, _, got = found("grouped_query_decoder")
    assert rewrite.symmetries(wrap(apply), params, *inputs) == got


def test_custom_rules_are_seen_through():
    apply, params, inputs, _, got = found("mlp")
    for custom in (jax.custom_jvp, jax.custom_vjp):
        wrapped = custom(apply)
        if custom is jax.custom_vjp:
            wrapped.defvjp(lambda *a: (apply(*a), a), lambda a, g: a)
        else:
            wrapped.defjvps(None, None)
        assert rewrite.symmetries(wrapped, params, *inputs) == got


def test_a_wider_model_takes_the_same_reading():
    """Keeping units of every group leaves a smaller model of the same program."""
    apply, params, inputs, *_ = found("mlp")
    got = found("mlp")[-1]
    units = {g.name: np.arange(g.size)[::2] for g in got.groups}
    small = rewrite.select(params, got, units)
    shapes = jax.tree.map(np.shape, small, is_leaf=lambda x: isinstance(x, jax.Array))
    assert shapes["a"]["w"] == (5, 4)
    assert shapes["b"]["w"] == (4, 3)
    again = rewrite.symmetries(apply, small, *inputs)
    assert [g.name for g in again.groups] == [g.name for g in got.groups]
    assert [g.size for g in again.groups] == [4, 3]


def test_integer_and_scalar_leaves_stay():
    params = {"w": np.ones((3, 4), "f4"), "steps": np.int32(3), "scale": np.float32(2)}
    apply = lambda p, x: (x @ p["w"]).sum(-1) * p["scale"] * p["steps"].astype(x.dtype)
    got = rewrite.symmetries(apply, params, np.ones((2, 3), "f4"))
    assert [(g.name, g.size) for g in got.groups] == [("w:1", 4)]


def test_a_function_that_changes_from_call_to_call_is_named():
    rng = np.random.default_rng(0)
    apply = lambda p, x: x @ p["w"] * rng.normal()
    params, x = {"w": np.ones((3, 4))}, np.ones((2, 3))
    got = rewrite.symmetries(apply, params, x)
    with pytest.raises(ValueError, match="not deterministic"):
        rewrite.verify(apply, params, got, x, key=KEY)
    with pytest.raises(ValueError, match="trials must be at least 1"):
        rewrite.verify(apply, params, got, x, key=KEY, trials=0)


def test_verify_measures_a_false_symmetry():
    params, x = {"w": np.diag([1.0, 2.0, 3.0])}, np.ones((1, 3))
    place = rewrite.Place(1)
    group = rewrite.Group("w:1", 3, (rewrite.Member("w", place),))
    apply = lambda p, x: x @ p["w"]
    change = rewrite.verify(
        apply, params, rewrite.Symmetries((group,)), x, key=KEY, trials=8
    )
    assert change["w:1"] == pytest.approx(2 / 3)
    assert change["all"] > 0


def test_equal_weights_are_equal_places():
    """A tied weight is one leaf, and is permuted wherever it is used."""
    _, params, _, _, got = found("tied_autoencoder")
    assert tree.paths(params) == ["b", "c", "d", "v", "w"]
    assert {m.path for g in got.groups for m in g.members} == {"b", "d", "v", "w"}
