"""rewrite.permute, unfold, fold and select against plain index arithmetic."""

import itertools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import rewrite
from jaxlab.rewrite import Factor, Group, Member, Pick, Place, Segment, Symmetries

KEY = jax.random.key(0)

HEADS = Group(
    "q:1:[2]x3", 2,
    (
        Member("q", Place(1, (Factor((2, 3), 0),))),
        Member("o", Place(0, (Segment(4, 6), Factor((2, 3), 0)))),
        Member("o", Place(0, (Segment(10, 12), Factor((2, 2, 3), 0)))),
    ),
)  # fmt: skip
DIMS = Group(
    "q:1:2x[3]", 3,
    (
        Member("q", Place(1, (Factor((2, 3), 1),)), (Place(1, (Factor((2, 3), 0),)),)),
        Member("o", Place(0, (Segment(4, 6), Factor((2, 3), 1))),
               (Place(0, (Segment(4, 6), Factor((2, 3), 0))),)),
        Member("o", Place(0, (Segment(10, 12), Factor((2, 2, 3), 2))),
               (Place(0, (Segment(10, 12), Factor((2, 2, 3), 0))),)),
    ),
    ("q:1:[2]x3",), (2,),
)  # fmt: skip
LOW = Group(
    "o:0:@0+4", 4, (Member("o", Place(0, (Segment(0, 4),))), Member("b", Place(2))),
    ("pinned 5",), (5,),
)  # fmt: skip
LOW = LOW._replace(
    members=tuple(
        m._replace(per=(Place(1 if m.path == "o" else 0),)) for m in LOW.members
    )
)
EXPERTS = Group(
    "b:1", 3, (Member("b", Place(1)), Member("c", Place(0, (Segment(0, 3),))),
               Member("c", Place(0, (Segment(3, 3),)))),
)  # fmt: skip
UNITS = Group(
    "c:1", 4,
    (
        Member("c", Place(1), (Place(0, (Segment(0, 3),)),)),
        Member("c", Place(1), (Place(0, (Segment(3, 3),)),)),
        Member("d", Place(0, (Factor((4, 3), 0),)), (Place(0, (Factor((4, 3), 1),)),)),
    ),
    ("b:1",), (3,),
)  # fmt: skip
EXPERTS = EXPERTS._replace(
    members=(*EXPERTS.members, Member("d", Place(0, (Factor((4, 3), 1),))))
)
SYMMETRIES = Symmetries((HEADS, DIMS, LOW, EXPERTS, UNITS))
SHAPES = {"q": (5, 6), "o": (24, 5), "b": (5, 3, 4), "c": (6, 4), "d": (12,)}
PARAMS = {k: np.arange(np.prod(s), dtype="f4").reshape(s) for k, s in SHAPES.items()}


def coordinate(position, steps):
    """The unit that a position of an axis is of, and its rest; None outside."""
    rest = []
    for step in steps:
        if isinstance(step, Segment):
            position -= step.offset
            if not 0 <= position < step.size:
                return None
        elif isinstance(step, Pick):
            position = step.positions.index(position)
        else:
            at = np.unravel_index(position, step.sizes)
            rest += [int(n) for i, n in enumerate(at) if i != step.index]
            position = int(at[step.index])
    return position, tuple(rest)


def coordinates(x, member):
    """The unit, and where in it, of every position along a member's axis."""
    place = member.place
    return [coordinate(i, place.steps) for i in range(x.shape[place.axis])]


def entries(x, member):
    """Each entry of a member: its index, its coordinate, and what it may depend on."""
    at = coordinates(x, member)
    pers = [
        [coordinate(i, p.steps) for i in range(x.shape[p.axis])] for p in member.per
    ]
    for index in itertools.product(*map(range, x.shape)):
        here = at[index[member.place.axis]]
        by = [c[index[p.axis]] for c, p in zip(pers, member.per, strict=True)]
        if here is not None and None not in by:
            yield index, here, tuple(c[0] for c in by)


def reference(x, member, table):
    """The leaf with a member permuted, entry by entry."""
    at, out = coordinates(x, member), x.copy()
    for index, (unit, rest), by in entries(x, member):
        old = list(index)
        moved = int(table[(*by, unit)]), rest
        old[member.place.axis] = at.index(moved)
        out[index] = x[tuple(old)]
    return out


def draw(seed=0):
    key = jax.random.fold_in(KEY, seed)
    return rewrite.random_permutations(SYMMETRIES, key=key)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("seed", range(3))
def test_permute_is_index_arithmetic(seed):
    tables, want = draw(seed), dict(PARAMS)
    for group in SYMMETRIES.groups:
        for m in group.members:
            want[m.path] = reference(want[m.path], m, np.asarray(tables[group.name]))
    same(rewrite.permute(PARAMS, SYMMETRIES, tables), want)


@pytest.mark.parametrize("group", SYMMETRIES.groups, ids=lambda g: g.name)
def test_unfold_puts_the_group_in_front(group):
    table = np.asarray(draw()[group.name])
    for m in group.members:
        x = PARAMS[m.path]
        values = rewrite.unfold(x, m, group)
        assert values.shape[:-1] == (*group.counts, group.size)
        same(rewrite.fold(x, m, group, values), x)
        moved = np.take_along_axis(np.asarray(values), table[..., None], len(m.per))
        same(rewrite.fold(x, m, group, moved), reference(x, m, table))
        rest = rewrite.fold(x, m, group, jnp.full_like(values, -1))
        kept = np.asarray(rest) >= 0
        assert kept.sum() == x.size - values.size
        same(np.asarray(rest)[kept], x[kept])


def test_the_laws_of_permutations():
    one, two = draw(1), draw(2)
    moved = rewrite.permute(PARAMS, SYMMETRIES, one)
    same(rewrite.permute(PARAMS, SYMMETRIES, rewrite.identity(SYMMETRIES)), PARAMS)
    same(rewrite.permute(PARAMS, SYMMETRIES, {}), PARAMS)
    for name in rewrite.identity(SYMMETRIES):
        p, q = one[name], two[name]
        both = {name: jnp.take_along_axis(p, q, -1)}
        step = rewrite.permute(PARAMS, SYMMETRIES, {name: p})
        step = rewrite.permute(step, SYMMETRIES, {name: q})
        same(step, rewrite.permute(PARAMS, SYMMETRIES, both))
        assert (np.sort(np.asarray(p), -1) == np.arange(p.shape[-1])).all()
    sets = lambda t: {k: np.sort(np.ravel(v)) for k, v in t.items()}
    same(sets(moved), sets(PARAMS))
    assert any((np.asarray(moved[k]) != PARAMS[k]).any() for k in PARAMS)


def test_a_dependent_group_counts_by_the_new_units():
    tables = draw(4)
    e, f = np.asarray(tables["b:1"]), np.asarray(tables["c:1"])
    got = rewrite.permute(PARAMS, SYMMETRIES, {"b:1": e, "c:1": f})
    c = PARAMS["c"].reshape(2, 3, 4)
    want = c[:, e[:, None], f].reshape(6, 4)
    same(got["c"], want)
    same(got["d"], PARAMS["d"].reshape(4, 3)[f, e[:, None]].T.reshape(-1))


def test_jit_vmap_and_grad():
    fn = lambda p, t: rewrite.permute(p, SYMMETRIES, t)
    tables = jax.tree.map(lambda *x: jnp.stack(x), draw(1), draw(2))
    stacked = jax.tree.map(lambda x: np.stack([x, x + 1000]), PARAMS)
    got = jax.jit(jax.vmap(fn))(stacked, tables)
    for i in range(2):
        pick = lambda t, i=i: jax.tree.map(lambda x: x[i], t)
        same(pick(got), fn(pick(stacked), pick(tables)))
    weight = jax.tree.map(lambda x: x + 1, PARAMS)
    loss = lambda p: sum(jnp.vdot(weight[k], x) for k, x in fn(p, draw(1)).items())
    gradient = jax.grad(loss)(PARAMS)
    same(fn(gradient, draw(1)), weight)


def test_select_keeps_units_of_every_member():
    units = {"q:1:[2]x3": [1], "q:1:2x[3]": [[2, 0]]}
    got = rewrite.select(
        PARAMS,
        SYMMETRIES,
        jax.tree.map(np.asarray, units, is_leaf=lambda x: isinstance(x, list)),
    )
    o = PARAMS["o"]
    want = np.concatenate([o[:4], o[4:10].reshape(2, 3, 5)[1, [2, 0]],
        o[10:22].reshape(2, 2, 3, 5)[1][:, [2, 0]].reshape(4, 5), o[22:]])  # fmt: skip
    same(got["q"], PARAMS["q"].reshape(5, 2, 3)[:, 1][:, [2, 0]])
    same(got["o"], want)
    same(got["b"], PARAMS["b"])


def test_select_of_dependent_units():
    e, f = np.array([2, 0]), np.array([[3, 1], [0, 2]])
    got = rewrite.select(PARAMS, SYMMETRIES, {"b:1": e, "c:1": f})
    same(got["b"], PARAMS["b"][:, e])
    c = PARAMS["c"].reshape(2, 3, 4)[:, e[:, None], f]
    same(got["c"], c.reshape(4, 2))
    d = PARAMS["d"].reshape(4, 3)
    same(got["d"], np.stack([d[f[i], e[i]] for i in range(2)], 1).reshape(-1))


def test_select_of_all_units_permutes():
    tables = draw(5)
    select = jax.jit(lambda p, t: rewrite.select(p, SYMMETRIES, t))
    same(select(PARAMS, tables), rewrite.permute(PARAMS, SYMMETRIES, tables))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_any_chain_of_steps(sizes, data):
    """A factor of a segment of a factor: fold inverts unfold, select shrinks it."""
    index = data.draw(st.integers(0, len(sizes) - 1))
    pad = data.draw(st.integers(0, 2))
    outer = data.draw(st.integers(1, 3))
    length = int(np.prod(sizes)) + pad
    steps = (
        Factor((outer, length), 1), Segment(pad, length - pad),
        Factor(tuple(sizes), index),
    )  # fmt: skip
    size = sizes[index]
    group = Group("w", size, (Member("w", Place(1, steps)),))
    x = np.arange(2.0 * outer * length, dtype="f4").reshape(2, -1)
    table = np.asarray(data.draw(st.permutations(range(size))))
    got = rewrite.permute({"w": x}, Symmetries((group,)), {"w": table})["w"]
    same(got, reference(x, group.members[0], table))
    fewer = data.draw(st.integers(1, size))
    got = rewrite.select({"w": x}, Symmetries((group,)), {"w": table[:fewer]})["w"]
    at = [coordinate(i, steps) for i in range(x.shape[1])]
    kept = [unit is None or unit[0] < fewer for unit in at]
    same(got, reference(x, group.members[0], table)[:, kept])


def test_a_reordered_axis_is_permuted_but_not_narrowed():
    group = Group("w", 4, (Member("w", Place(0, (Pick((1, 2, 3, 0)),))),))
    x, table = np.arange(8.0, dtype="f4").reshape(4, 2), np.array([2, 0, 3, 1])
    got = rewrite.permute({"w": x}, Symmetries((group,)), {"w": table})["w"]
    same(got, reference(x, group.members[0], table))
    assert rewrite.describe(group.members[0].place) == "0:~1,2,3,0"
    with pytest.raises(ValueError, match="reordered axis cannot be left out"):
        rewrite.select({"w": x}, Symmetries((group,)), {"w": table[:2]})


@pytest.mark.parametrize(
    ("tables", "match"),
    [
        ({"nope": np.arange(2)}, "no group is named 'nope'"),
        ({"q:1:[2]x3": np.arange(3)}, r"has shape \(3,\), expected"),
        ({"q:1:2x[3]": np.arange(3)}, r"shape \(3,\), expected \(2, "),
    ],
)
def test_bad_permutations_are_named(tables, match):
    with pytest.raises(ValueError, match=match):
        rewrite.permute(PARAMS, SYMMETRIES, tables)
    if "q:1:[2]x3" not in tables:
        with pytest.raises(ValueError, match=match):
            rewrite.select(PARAMS, SYMMETRIES, tables)


def test_a_missing_leaf_is_named():
    params = {k: v for k, v in PARAMS.items() if k != "o"}
    with pytest.raises(ValueError, match=r"permutes 'o', which is no leaf"):
        rewrite.permute(params, SYMMETRIES, draw())


def test_places_read_like_the_paths_they_follow():
    assert rewrite.describe(Place(1)) == "1"
    assert rewrite.describe(HEADS.members[1].place) == "0:@4+6:[2]x3"
