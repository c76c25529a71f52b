"""What a change of all models does to their merge, in float64."""

import functools as ft

from cases import MERGE
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import measure, merge, rewrite

each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SHAPES = {"gate": (2,), "up": (2, 5, 4), "down": (2, 4, 5)}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def draw(*lead, seed=0):
    """Two experts of four units and their weights, or several such models."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal((*lead, *s)) for n, s in SHAPES.items()}


def apply(p, x):
    h = jnp.tanh(jnp.einsum("bn,enh->beh", x, p["up"]))
    return jnp.einsum("e,beh,ehm->bm", p["gate"], h, p["down"])


def close(a, b, tolerance=1e-9):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def apart(a, b):
    """How far the furthest entries are from each other."""
    far = lambda x, y: np.abs(np.float64(x) - np.float64(y)).max()
    return max(jax.tree.leaves(each(far, a, b)))


@ft.cache
def permutation():
    """The experts change places, and so do the units of each, not alike."""
    found = rewrite.symmetries(apply, draw(), np.ones((2, 5)))
    experts, units = sorted(found.groups, key=lambda g: g.size)
    assert (experts.counts, units.counts) == ((), (2,))
    order = {experts.name: jnp.array([1, 0]), units.name: jnp.array([[1, 2, 3, 0]] * 2)}
    order[units.name] = order[units.name].at[1].set(jnp.array([2, 1, 0, 3]))
    return jit(lambda p: rewrite.permute(p, found, order))


def permuted(models):
    """Every one of several models."""
    one = lambda i: permutation()(each(lambda v: v[i], models))
    k = len(models["gate"])
    return each(lambda *v: np.stack(v), *map(one, range(k)))


def rotated(p, axis):
    """Every matrix, in all models and experts alike, on its axis n or m."""

    place, spec = {"n": (-2, "ij,...jm->...im"), "m": (-1, "ij,...nj->...ni")}[axis]

    def leaf(x):
        n = x.shape[place]
        q = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]
        return np.einsum(spec, q, x)

    return {name: x if name == "gate" else leaf(x) for name, x in p.items()}


# --- methods of stacked models alone

ONE = [n for n, c in MERGE.items() if len(c.data("float32", 0)) == 1 and not c.random]
ROTATE = {
    # method -> the axes on which a rotation of all models rotates the merge
    **dict.fromkeys("linear average slerp nuslerp multislerp karcher".split(), "nm"),
    **dict.fromkeys("passthrough wise_ft transfer periodic expo fuse".split(), "nm"),
    **dict.fromkeys("task_arithmetic model_stock anisotropic".split(), "nm"),
    **dict.fromkeys("tsv_m iso_c iso_cts svc opcm".split(), "nm"),
    "knots": "m",  # merged in the basis of the outputs, entry by entry of the inputs
}
LENGTHS = {
    # an option of theirs, or a softmax, is a length: the merge does not scale
    *("nearswap", "ram", "ramplus_tl", "wudi", "arcee_fusion"),
    "doge_ta",  # divides by the lengths
}
MASKS = {n for n, c in MERGE.items() if not c.keeps_dtype}  # these do not scale at all


@ft.cache
def merged(name):
    """The merges of some models and of their images, compiled once."""
    case = MERGE[name]
    k = len(case.data("float32", 0)[0]["a"])
    more = {"eps": 0.0} if name == "multislerp" else {}  # its guard is a length
    x = draw(k)
    images = {
        "same": x,
        "permuted": permuted(x),
        "n": rotated(x, "n"),
        "m": rotated(x, "m"),
        "scaled": each(lambda v: 3.7 * v, x),
        "turned": each(lambda v: np.roll(v, 1, 0), x),
    }
    call = jit(ft.partial(case.fn, **case.coefficients, **more))
    return {law: each(np.asarray, call(image)) for law, image in images.items()}


@pytest.mark.parametrize("name", ONE)
def test_permuted_models_merge_to_the_permuted_merge(name):
    """Experts and units, which `rewrite.symmetries` found."""
    got = merged(name)
    same = got["same"]
    want = permuted(same) if same["gate"].ndim == 2 else permutation()(same)
    close(got["permuted"], want)
    assert apart(got["permuted"], same) > 0.05


@pytest.mark.parametrize("axis", ["n", "m"])
@pytest.mark.parametrize("name", [n for n in ONE if n not in MASKS])
def test_rotated_models_merge_to_the_rotated_merge(name, axis):
    """Where the method knows no basis; and where it does, they do not."""
    want = rotated(merged(name)["same"], axis)
    if axis in ROTATE.get(name, ""):
        close(merged(name)[axis], want)
    else:
        assert apart(merged(name)[axis], want) > 0.05


@pytest.mark.parametrize("name", ONE)
def test_scaled_models_merge_to_the_scaled_merge(name):
    same, scaled = merged(name)["same"], merged(name)["scaled"]
    want = same if name in MASKS else each(lambda v: 3.7 * v, same)
    if name in LENGTHS:
        assert apart(scaled, want) > 0.05
    else:
        close(scaled, want)


ALIKE = "consensus_ta delta_guided expo magmax trust_region"
COUNTS = "transfer opcm"  # the last model is where it ends; the first counts whole


@pytest.mark.parametrize("name", (ALIKE + " " + COUNTS).split())
def test_the_order_of_models_counts_where_it_is_said(name):
    far = apart(merged(name)["turned"], merged(name)["same"])
    assert far > 0.05 if name in COUNTS.split() else far < 1e-12


# method -> options, and what three copies of a task vector are times it
COPIES = {
    "magmax": ({}, 1),
    "delta_guided": ({}, 1),
    "sce": ({"density": 1.0}, 1),
    "consensus_ta": ({"votes": 2}, 3),
    "ram": ({"threshold": 0.0}, 1),
    "tsv_m": ({"fraction": 1.0}, 1),
    "knots": ({"method": ft.partial(merge.ties, density=1.0)}, 1),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_merge_to_a_multiple(name):
    options, times = COPIES[name]
    one = {n: v for n, v in draw(seed=5).items() if n != "gate"}
    same = each(lambda v: np.stack([v] * 3), one)
    got = jit(ft.partial(getattr(merge, name), **options))(same)
    close(got, each(lambda v: times * v, one))


# --- Fisher and RegMean


def test_fisher_commutes_with_permutations_and_forgets_units():
    """Only how the Fishers of an entry compare counts, not the unit of either."""
    call = jit(ft.partial(merge.fisher, weights=[0.5, 0.3, 0.4], floor=0.0))
    x, f = draw(3), each(np.square, draw(3, seed=1))
    want = call(x, f)
    close(call(permuted(x), permuted(f)), permutation()(want))
    close(call(x, each(lambda v: 1e-6 * v, f)), want)
    unit = each(np.exp, draw(seed=2))
    moved = each(lambda v, u: u * v, x, unit), each(lambda v, u: v / u**2, f, unit)
    close(call(*moved), each(lambda v, u: u * v, want, unit))
    louder = each(lambda v: np.concatenate([9 * v[:1], v[1:]]), f)
    assert apart(call(x, louder), want) > 0.05


@ft.cache
def regmean(**options):
    def call(models, x):
        first = each(lambda v: v[0], models)
        grams = jax.vmap(ft.partial(measure.gram, apply))(models, x)
        uses = rewrite.uses(apply, first, x[0])
        return merge.regmean(models, grams, uses=uses, **options)

    return jit(call)


def data(k):
    return np.random.default_rng(7).standard_normal((k, 12, 5))


def test_regmean_commutes_with_permutations():
    """The Grams of the permuted models too: those of `measure.gram`."""
    x = draw(3)
    want = regmean()(x, data(3))
    close(regmean()(permuted(x), data(3)), permutation()(want))
    assert apart(want, merge.average(x)) > 0.05


@pytest.mark.parametrize("exact", [True, False])
def test_regmean_in_another_basis_of_the_inputs(exact):
    """Exact regression knows no basis; damped, it keeps the units of each input."""
    options = {"off_diagonal": 1.0 if exact else 0.7, "ridge": 0.0}
    turn = np.random.default_rng(9).standard_normal((5, 5))
    units = np.diag(np.exp(turn[0]))

    def moved(basis):
        models = x | {"up": np.linalg.inv(basis) @ x["up"]}
        got = regmean(**options)(models, data(3) @ basis)
        return each(np.asarray, got | {"up": basis @ got["up"]})

    x = draw(3)
    want = regmean(**options)(x, data(3))
    close(moved(units), want)
    assert (apart(moved(turn), want) < 1e-9) == exact
