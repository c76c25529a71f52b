"""Matching brings back what was planted, in every architecture; the laws of tables."""

import functools as ft

import jax
import numpy as np
import pytest
from symmetry_models import MODELS

from jaxlab import align, rewrite, tree

KEY = jax.random.key(4)
SEED = 9
RNG = np.random.default_rng(SEED)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# experts; blocks on one axis, in a loop over time; tied weights
FEW = ("mixture_with_top_k", "gru_with_fused_gates", "tied_autoencoder")
# layers in a scan, heads in groups; channels in groups
NAMES = (*FEW, "scanned_decoder_with_remat", "unet_with_group_norm")


@pytest.fixture(autouse=True)
def as_users_write():
    """The models broadcast and promote as numpy does; the library does not."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@ft.cache
def model(name):
    """A model in float32, its groups, and three of its copies in another order."""
    apply, params, inputs, _ = MODELS[name]()
    params = jax.tree.map(lambda x: np.asarray(x, "f4"), params)
    groups = rewrite.symmetries(apply, params, *inputs)
    draw = jit(jax.vmap(lambda k: rewrite.random_permutations(groups, key=k)))
    drawn = draw(jax.random.split(KEY, 3))
    tables = [{n: np.asarray(t[i]) for n, t in drawn.items()} for i in range(3)]
    move = jit(lambda p, t: rewrite.permute(p, groups, t))
    return apply, params, inputs, groups, tables, move


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FEW)
def test_weights_bring_back_what_was_planted(name):
    """Unit by unit, through noise; what was found is a place to stay."""
    _, params, _, groups, tables, move = model(name)
    noisy = jax.tree.map(
        lambda x: x + 0.02 * RNG.normal(size=x.shape).astype("f4"), params
    )
    want = align.inverse(groups, tables[0])
    match = ft.partial(align.weight_matching, params, move(noisy, tables[0]), groups)
    found = match(key=KEY)
    same(found, want)
    same(match(key=KEY, start=found, iterations=1), want)
    assert any((t != np.arange(t.shape[-1])).any() for t in want.values())
    same(move(move(params, tables[0]), found), params)


@pytest.mark.parametrize("name", ["mixture_with_top_k", "gru_with_fused_gates"])
def test_many_copies_all_become_the_first(name):
    _, params, _, groups, tables, move = model(name)
    copies = [move(params, t) for t in tables]
    stacked = jax.tree.map(lambda *x: np.stack(x), *copies)
    found = align.match_many(stacked, groups, key=KEY)
    for i, one in enumerate(copies):
        back = {n: t[i] for n, t in found.items()}
        same(move(one, back), copies[0])


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_a_group_that_acts_on_models(name):
    _, params, _, groups, (a, b, c), move = model(name)
    compose, inverse = (ft.partial(f, groups) for f in (align.compose, align.inverse))
    still = rewrite.identity(groups)
    same(compose(compose(a, b), c), compose(a, compose(b, c)))
    same(compose(a, still), a)
    same(compose(still, a), a)
    same(compose(a, inverse(a)), still)
    same(compose(inverse(a), a), still)
    same(inverse(compose(a, b)), compose(inverse(b), inverse(a)))
    same(move(move(params, a), b), move(params, compose(a, b)))


@pytest.mark.parametrize("name", ["mixture_with_top_k", "gru_with_fused_gates"])
def test_activations_bring_back_what_was_planted(name):
    apply, params, inputs, groups, tables, move = model(name)
    moved = move(params, tables[1])
    found = align.activation_matching(apply, params, moved, groups, [inputs], key=KEY)
    same(found, align.inverse(groups, tables[1]))


@pytest.mark.parametrize(
    ("name", "leaves", "untold"),
    [
        ("mixture_with_top_k", ["w2"], set()),
        ("scanned_decoder_with_remat", ["l/q", "l/v"], {"l/down:1"}),
        ("unet_with_group_norm", ["first", "back"], {"join:3"}),
        ("gru_with_fused_gates", ["bi"], set()),
    ],
)
def test_some_leaves_tell_all_groups_that_they_are_in(name, leaves, untold):
    """Whatever the others are; a group of which they tell nothing stays."""
    _, params, _, groups, tables, move = model(name)
    spoil = lambda path, x: x if path in leaves else 9 * np.asarray(x)[..., ::-1]
    found = align.weight_matching(
        params,
        tree.path_map(spoil, move(params, tables[2])),
        groups,
        key=KEY,
        where=tree.glob(*leaves),
    )
    want, still = align.inverse(groups, tables[2]), rewrite.identity(groups)
    tell = {g.name for g in groups.groups if any(m.path in leaves for m in g.members)}
    assert {g.name for g in groups.groups} - tell == untold
    for group in groups.groups:
        same(found[group.name], (want if group.name in tell else still)[group.name])
