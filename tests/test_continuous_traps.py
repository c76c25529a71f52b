"""rewrite.continuous on programs that mislead: the whole fibre, and nothing else.

At a random point the null space of the Jacobian of all outputs, for more inputs than
there are params, is the tangent of all params with the same function. The symmetries
found must be tangent to it, and where a program hides nothing, span it.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_continuous import line

from jaxlab import rewrite

KEY = jax.random.key(3)
SEED = 8
RNG = np.random.default_rng(SEED)
relu, tanh, square = jax.nn.relu, jnp.tanh, jnp.square
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def as_users_write():
    """The programs broadcast and promote as numpy does."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def join(*xs):
    return jnp.concatenate(xs, -1)


def halves(x):
    return jnp.split(x, 2, -1)


def folded(x, count=2):
    return x.reshape(*x.shape[:-1], count, -1)


def beside(one, two):
    """Two activations of the same units, side by side."""
    return lambda p, x: join(one(x @ p["a"]), two(x @ p["a"])) @ p["b"]


def shared(one, two):
    """Two activations of two halves, read by the same weights."""

    def apply(p, x):
        left, right = halves(x @ p["a"])
        return folded(join(one(left), two(right))).sum(-2) @ p["b"]

    return apply


def windows(one, two):
    """Units of seven positions in one row, cut between positions, and joined."""

    def apply(p, x):
        row = (x[:, None] * jnp.sin(jnp.arange(7.0))[:, None] @ p["a"]).reshape(-1, 28)
        row = join(one(row[:, :8]), two(row[:, 8:]))
        return folded(row, 7).sum(-2) @ p["b"]

    return apply


def tail(p, x):
    """The last positions only: the cut begins within the row."""
    row = (x[:, None] * jnp.sin(jnp.arange(7.0))[:, None] @ p["a"]).reshape(-1, 28)
    return folded(relu(row[:, 8:]), 5).sum(-2) @ p["b"]


def turned(p, x):
    """A carry that a loop turns by one position: it is cut there, and is whole."""
    row = jnp.einsum("bi,if,t->btf", x, p["a"], jnp.sin(jnp.arange(1.0, 8)))
    turn = lambda h, _: (join(h[:, 4:], h[:, :4]), None)
    row = jax.lax.scan(turn, relu(row).reshape(-1, 28), None, length=2)[0]
    return jnp.einsum("btf,fo,t->bo", folded(row, 7), p["b"], jnp.arange(7.0))


def pairs(p, x):
    """All products of two units: each is on one axis twice, as major and as minor."""
    u = relu(x @ p["a"])
    return jnp.einsum("bf,bg->bfg", u, u**2).reshape(-1, 16) @ p["b"]


def swapped(p, x):
    """The halves change places in each layer, so that both are scaled alike."""

    def layer(h, w):
        left, right = halves(h)
        return join(right, relu(left) @ w), None

    return jax.lax.scan(layer, x @ p["a"], p["w"])[0] @ p["b"]


def stream(p, x):
    """A residual stream; one weight writes and reads with two activations."""
    h = x @ p["a"]
    for act in (relu, jnp.abs):
        h = h + act(h @ p["w"]) @ p["v"]
    return h @ p["b"]


def gated(p, x):
    left, right = halves(x @ p["a"])
    return join(left * relu(right), relu(right)) @ p["b"]


AB, WIDE = {"a": (3, 4), "b": (8, 2)}, {"a": (3, 8), "b": (4, 2)}
BOTH = "b:0:@0+4^{} b:0:@4+4^{}"
# name -> the program, its params, what is to be found
TRAPS = {
    "h beside its square": (
        beside(relu, square), AB, {"scale: a:1^1 " + BOTH.format(-1, -2)}),
    "sine beside tanh": (
        beside(jnp.sin, tanh), AB, {"sign: a:1^1 " + BOTH.format(1, 1)}),
    "relu beside tanh": (beside(relu, tanh), AB, set()),
    "sine beside cosine": (beside(jnp.sin, jnp.cos), AB, {"sign: a:1^1 b:0:@0+4^1"}),
    "halves: relu and tanh": (shared(relu, tanh), WIDE, set()),
    "halves: tanh and relu": (shared(tanh, relu), WIDE, set()),
    "halves: relu and cube": (
        shared(relu, lambda h: relu(h) ** 3), WIDE,
        {"scale: a:1:@0+4^3 a:1:@4+4^1 b:0^-3"}),
    "used twice": (
        lambda p, x: relu(x @ p["a"]) @ p["b"] + square(x @ p["a"]) @ p["c"],
        {"a": (3, 4), "b": (4, 2), "c": (4, 2)}, {"scale: a:1^1 b:0^-1 c:0^-2"}),
    "one scaled half, read as the other": (
        lambda p, x: folded(join(relu(x @ p["a"]) * p["g"], square(x @ p["a"])))
        .sum(-2) @ p["b"], {"a": (3, 4), "g": (4,), "b": (4, 2)},
        {"scale: a:1^1 b:0^-2 g:0^1"}),
    "gated": (
        gated, {"a": (3, 8), "b": (8, 2)},
        {"scale and sign: a:1:@0+4^1 b:0:@0+4^-1",
         "scale: a:1:@0+4^1 a:1:@4+4^-1 b:0:@4+4^1"}),
    "windows: relu and tanh": (windows(relu, tanh), {"a": (3, 4), "b": (4, 2)}, set()),
    "windows: tanh and relu": (windows(tanh, relu), {"a": (3, 4), "b": (4, 2)}, set()),
    "tail": (tail, {"a": (3, 4), "b": (4, 2)}, {"scale: a:1^1 b:0^-1"}),
    "turned in a loop": (turned, {"a": (3, 4), "b": (4, 2)}, {"scale: a:1^1 b:0^-1"}),
    "products of pairs": (
        pairs, {"a": (3, 4), "b": (16, 2)},
        {"scale: a:1^1 b:0:[4]x4^-1 b:0:4x[4]^-2"}),
    "halves that change places": (
        swapped, {"a": (3, 8), "w": (2, 4, 4), "b": (8, 2)},
        {"scale: a:1:@0+4^1 a:1:@4+4^1 b:0:@0+4^-1 b:0:@4+4^-1 w:1^-1 w:2^1"}),
    "tied and linear": (
        lambda p, x: x @ p["a"] @ p["a"].T, {"a": (3, 4)}, {"rotation: a:1^1"}),
    "a stream": (
        stream, {"a": (3, 4), "w": (4, 3), "v": (3, 4), "b": (4, 2)},
        {"general linear: a:1^1 b:0^-1 v:1^1 w:0^-1", "scale: v:0^1 w:1^-1"}),
}  # fmt: skip


PARTLY = {"halves that change places"}  # each layer has a fibre of its own


def weights(shapes):
    return {n: RNG.normal(size=s) for n, s in shapes.items()}


def directions(params, symmetry):
    """The tangents of a symmetry at the params, one row for each value of it."""
    n = symmetry.group.size
    still = np.ones(n) if "scale" in symmetry.kind else np.eye(n)
    moves = 1e-5 * np.eye(still.size).reshape(-1, *still.shape)
    if symmetry.kind == "rotation":
        moves = moves - moves.mT
    move = lambda values: flat(rewrite.transform(params, symmetry, values))
    return [(move(still + m) - move(still - m)) / 2e-5 for m in moves]


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def rank(rows):
    """Of rows whose singular values are zero or well away from it."""
    values = np.linalg.svd(rows, compute_uv=False)
    values = values / values.max(initial=0)
    assert not ((values > 1e-9) & (values < 1e-6)).any(), values
    return int((values > 1e-8).sum())


@pytest.mark.parametrize("name", TRAPS)
def test_the_symmetries_are_the_whole_fibre(name):
    apply, shapes, want = TRAPS[name]
    params, x = weights(shapes), RNG.normal(size=(150, 3))
    got = rewrite.continuous(apply, params, x)
    assert {line(s) for s in got} == want
    with jax.enable_x64(True):
        jacobian = jit(jax.jacfwd(apply))(params, x)
        jacobian = np.concatenate(
            [jacobian[n].reshape(-1, params[n].size) for n in sorted(params)], 1
        )
        smooth = [s for s in got if s.kind != "sign"]
        tangents = [d for s in smooth for d in directions(params, s)]
    tangents = np.reshape(tangents, (-1, jacobian.shape[1]))
    moved = np.linalg.norm(tangents @ jacobian.T, axis=1)
    size = np.linalg.norm(jacobian) * np.linalg.norm(tangents, axis=1)
    assert (moved <= 1e-9 * size).all()
    free = jacobian.shape[1] - rank(jacobian)
    assert rank(tangents) < free if name in PARTLY else rank(tangents) == free


def left_sum(p, x):
    t = tanh(x @ p["a"]).reshape(-1, 2, 4)
    return (t @ p["w"] + t).reshape(-1, 8) @ p["b"]


def right_sum(p, x):
    t = tanh(x @ p["a"]).sum(0).reshape(4, 2)
    return ((p["w"] @ t + t).reshape(8) @ p["b"]) * x[:, :2]


def pixels(x, w):
    return jax.lax.conv_general_dilated(
        x, w[None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_of_pixels(p, x):
    t = jnp.einsum("bi,ikf->kbf", x, p["a"].reshape(3, 2, 4))[:, :, None]
    return jnp.einsum("kbhf,kfo->bo", pixels(t, p["w"]) + t, p["b"].reshape(2, 4, 2))


def kernel_of_pixels(p, x):
    t = tanh(x @ p["a"]).sum(0).reshape(4, 2)
    y = pixels(p["w"][:, None, None], t)[:, 0, 0] + t
    return (y.reshape(8) @ p["b"]) * x[:, :2]


@pytest.mark.parametrize(
    "apply", [left_sum, right_sum, batch_of_pixels, kernel_of_pixels],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_nothing_depends_on_units_that_a_weight_mixes(apply):
    """Not even where a residual stream says that what comes out is what went in."""
    params, x = (
        weights({"a": (3, 8), "w": (4, 4), "b": (8, 2)}),
        RNG.normal(size=(5, 3)),
    )
    found = rewrite.symmetries(apply, params, x)
    assert sorted((g.size, g.per) for g in found.groups) == [(2, ()), (4, ())]
    change = rewrite.verify(apply, params, found, x, key=KEY, trials=2)
    assert max(change.values()) < 1e-13
