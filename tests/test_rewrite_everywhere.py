"""uses, capture and substitute agree with each other and with calculus, in float64.

For each product Y = X W of a model: dL/dW = X^T dL/dY, where X is what `capture` sees
and dL/dY the slope of what a rule of `substitute` adds to Y.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from symmetry_models import MODELS

from jaxlab import tree
from jaxlab.rewrite import as_matrix, capture, from_matrix, substitute, uses

NAMES = (
    "scanned_decoder_with_remat", "unet_with_group_norm", "convnext",
    "mixture_with_top_k", "gru_with_fused_gates", "tied_autoencoder",
)  # fmt: skip
FEW = ("scanned_decoder_with_remat", "mixture_with_top_k")
SUMMED = {"wi", "wh"}  # in a loop that does not slice them: one row for all its steps
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
original = lambda x, w, s, op: op(x, w)


@pytest.fixture(autouse=True)
def as_users_write():
    """The models broadcast and promote as numpy does; all of it in double."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


def close(a, b):
    """Equal but for rounding, relative to the largest entry."""
    size = abs(np.asarray(b)).max()
    np.testing.assert_allclose(a / size, b / size, rtol=0, atol=1e-13)


def by_path(params):
    return dict(zip(tree.paths(params), jax.tree.leaves(params), strict=True))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape) / 4


@ft.cache
def model(name):
    """A model, and the first product that each of its weights is in."""
    apply, params, inputs, _ = MODELS[name]()
    found = uses(apply, params, *inputs)
    products = {p: u[0] for p, u in found.items() if u and u[0].contracted}
    several = {p for p in products if len(found[p]) > 1}
    return apply, params, inputs, products, several


def taken(apply, products, reduce, of="input"):
    """`capture` of the first use of each weight."""
    return capture(
        apply,
        where=lambda path, leaf: path in products,
        reduce=reduce,
        of=of,
        only=lambda use: use == products[use.path],
    )


def loss(out):
    return jnp.vdot(jnp.cos(jnp.arange(out.size)), out), out


@ft.cache
def slopes(name):
    """Outputs and slopes, for shifted weights and outputs, and for shifted weights."""
    apply, params, inputs, products, _ = model(name)
    leaves = by_path(params)
    delta = {p: normal(i, *leaves[p].shape) for i, p in enumerate(products)}
    moved = tree.path_map(lambda path, w: w + delta.get(path, 0), params)
    outputs = taken(apply, products, lambda y: y, "output")
    shapes = jax.eval_shape(outputs, params, *inputs)[1]
    extra = {p: np.zeros(s.shape) for p, s in shapes.items()}

    def rule(x, w, s, op):
        y = op(x, w + op.view(s[0]))
        return y + op.place(s[1]) if op.use == products[op.use.path] else y

    tuned = substitute(apply, dict.fromkeys(products, rule))
    ours = lambda s: loss(tuned(params, s, *inputs))
    theirs = lambda p: loss(apply(p, *inputs))
    state = {p: (delta[p], extra[p]) for p in products}
    got, out = jit(jax.grad(ours, has_aux=True))(state)
    want, expected = jit(jax.grad(theirs, has_aux=True))(moved)
    results = moved, got, out, by_path(want), expected
    return jax.tree.map(np.asarray, results)


def matrices(leaves, products):
    """The weights among leaves, as matrices."""
    return {p: as_matrix(leaves[p], use) for p, use in products.items()}


@ft.cache
def statistics(name):
    """The output; rows and Gram, products, matrix and its slope of each weight."""
    apply, _, inputs, products, _ = model(name)
    reduce = lambda x: {"rows": x, "gram": x.mT @ x}
    moved, _, _, slope, _ = slopes(name)

    def collect(p, slope):
        _, made = taken(apply, products, lambda y: y, "output")(p, *inputs)
        w, g = matrices(by_path(p), products), matrices(slope, products)
        return *taken(apply, products, reduce)(p, *inputs), made, w, g

    return jax.tree.map(np.asarray, jit(collect)(moved, slope))


@pytest.mark.parametrize("name", FEW)
def test_the_original_operation_changes_no_bit(name):
    apply, params, inputs, products, _ = model(name)
    same = substitute(apply, dict.fromkeys(products, original))
    want = jit(apply)(params, *inputs)
    np.testing.assert_array_equal(jit(same)(params, {}, *inputs), want)


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_a_weight_is_as_if_it_were_in_the_weight(name):
    """In the output and in the slope, of every use of every weight."""
    *_, products, _ = model(name)
    _, got, out, want, expected = slopes(name)
    close(out, expected)
    assert got.keys() == products.keys()
    for path, (slope, _) in got.items():
        assert abs(slope).max() > 1e-3, path
        close(slope, want[path])


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_of_a_weight_is_its_rows_times_that_of_its_output(name):
    *_, products, several = model(name)
    got = slopes(name)[1]
    _, seen, _, _, slope = statistics(name)
    alone = products.keys() - several - SUMMED
    assert alone or name == "tied_autoencoder"
    for path in alone:
        close(seen[path]["rows"].mT @ got[path][1], slope[path])


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_in_times_the_matrix_is_what_comes_out(name):
    """And the Gram matrix is that of the rows; the function is as it was."""
    *_, products, _ = model(name)
    out, seen, made, weights, _ = statistics(name)
    close(out, slopes(name)[-1])
    assert seen.keys() == made.keys() == products.keys()
    for path in products:
        rows = seen[path]["rows"]
        close(rows @ weights[path], made[path])
        if path not in SUMMED:
            close(seen[path]["gram"], rows.mT @ rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_of_a_weight_has_its_entries_and_goes_back(name):
    """Sizes are those of the axes of each kind; every entry returns to its place."""
    _, params, _, products, _ = model(name)
    for path, w in by_path(params).items():
        if path not in products:
            continue
        use, numbers = products[path], np.arange(w.size).reshape(w.shape)
        matrix = as_matrix(numbers, use)
        size = lambda axes, use=use: tuple(use.shape[a] for a in axes)
        assert matrix.shape == (
            *size(use.stacked),
            *size(use.batch),
            np.prod(size(use.contracted)),
            np.prod(size(use.free)),
        )
        assert sorted(matrix.ravel()) == list(range(w.size))
        np.testing.assert_array_equal(from_matrix(matrix, use, numbers), numbers)


def test_both_uses_of_a_tied_weight_add_up():
    """The slope of the weight is the sum of those of the encoder and of the decoder."""
    apply, params, inputs, products, several = model("tied_autoencoder")
    assert several == {"w", "v"}
    first = lambda x, w, s, op: op(
        x, w + op.view(s) * (op.use == products[op.use.path])
    )
    other = lambda x, w, s, op: op(
        x, w + op.view(s) * (op.use != products[op.use.path])
    )
    zero = {p: np.zeros(params[p].shape) for p in several}

    def slope(rule):
        tuned = substitute(apply, dict.fromkeys(several, rule))
        return jit(jax.grad(lambda s: loss(tuned(params, s, *inputs))[0]))(zero)

    one, two = slope(first), slope(other)
    want = jit(jax.grad(lambda p: loss(apply(p, *inputs))[0]))(params)
    for path in several:
        assert min(abs(one[path]).max(), abs(two[path]).max()) > 1e-3
        close(one[path] + two[path], want[path])
