"""What rewrite.symmetries and continuous find in random programs is true of them."""

import functools as ft

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from test_permute import coordinates, entries, reference

from jaxlab import rewrite
from jaxlab.rewrite._transform import drawn


def halves(h, xp):
    return xp.concatenate([h[:, h.shape[1] // 2 :], h[:, : h.shape[1] // 2]], 1)


def pairs(h, xp):
    return h.reshape(2, -1, 2) if h.shape[1] % 2 == 0 else h[:, :, None]


MOVES = {
    "tanh": lambda h, xp: xp.tanh(h),
    "halves": halves,
    "flip": lambda h, xp: xp.flip(h, 1),
    "plus flip": lambda h, xp: h + xp.flip(h, 1),
    "roll": lambda h, xp: xp.roll(h, 2, 1),
    "plus roll": lambda h, xp: h + xp.roll(h, 2, 1),
    "pairs max": lambda h, xp: pairs(h, xp).max(2),
    "pairs sum of squares": lambda h, xp: (pairs(h, xp) ** 2).sum(2),
    "shuffle": lambda h, xp: pairs(h, xp).swapaxes(1, 2).reshape(2, -1),
    "group norm": lambda h, xp: (
        pairs(h, xp) - pairs(h, xp).mean(1, keepdims=True)).reshape(2, -1),
    "repeat": lambda h, xp: xp.repeat(h, 2, 1),
    "tile": lambda h, xp: xp.concatenate([h, xp.tanh(h)], 1),
    "first": lambda h, xp: h[:, : (h.shape[1] + 1) // 2],
    "last": lambda h, xp: h[:, 1:] if h.shape[1] > 1 else h,
    "odd": lambda h, xp: h[:, 1::2] if h.shape[1] > 1 else h,
    "mask": lambda h, xp: h * (np.arange(h.shape[1]) < 3),
    "count": lambda h, xp: h * np.arange(h.shape[1]),
    "sum": lambda h, xp: h + h.sum(1, keepdims=True),
    "cumsum": lambda h, xp: xp.cumsum(h, 1),
    "sort": lambda h, xp: xp.sort(h, 1),
    "pad": lambda h, xp: xp.pad(h, ((0, 0), (1, 2))),
    "order": lambda h, xp: h[:, np.random.default_rng(1).permutation(h.shape[1])],
    "gram": lambda h, xp: (h[:, :, None] * h[:, None, :]).sum(2),
    "outer": lambda h, xp: (h[:, :, None] * h[:, None, :])[:, :, :2].reshape(2, -1),
}  # fmt: skip


class Weights:
    """The weights of a program, drawn as it asks for them, or those it got before."""

    def __init__(self, values, x, rng=None):
        self.values, self.x, self.rng, self.count = values, x, rng, 0

    def __call__(self, *shape, tied=False):
        name = f"tied {shape}" if tied else f"{self.count:02d}"
        self.count += not tied
        if self.rng is not None and name not in self.values:
            self.values[name] = self.rng.normal(size=shape)
        return self.values[name]


def width(h):
    return h.shape[1]


def attend(h, xp, w):
    q, k = h @ w(width(h), 4), h @ w(width(h), 4)
    return xp.exp(0.1 * q @ k.T) @ h


def weight_norm(h, xp, w):
    m = w(width(h), 6)
    return h @ (m / xp.sqrt((m * m).sum(0, keepdims=True)))


def swapped(h, xp, w):
    both = xp.concatenate([h, h * w(width(h))], 1)
    return xp.roll(both, width(h), 1)


LAYERS = {
    "relu": lambda h, xp, w: xp.maximum(h, 0),
    "leaky": lambda h, xp, w: xp.where(h > 0, h, 0.5 * h),
    "abs": lambda h, xp, w: xp.abs(h),
    "square": lambda h, xp, w: h**2,
    "root": lambda h, xp, w: xp.sqrt(xp.abs(h)),
    "cos": lambda h, xp, w: xp.cos(h),
    "add one": lambda h, xp, w: h + 1.0,
    "rms": lambda h, xp, w: h / xp.sqrt((h * h).mean(1, keepdims=True) + 1e-3),
    "unit": lambda h, xp, w: h / xp.sqrt((h * h).sum(1, keepdims=True)),
    "batch unit": lambda h, xp, w: h / xp.sqrt((h * h).sum(0, keepdims=True)),
    "centre": lambda h, xp, w: h - h.mean(1, keepdims=True),
    "largest": lambda h, xp, w: h - h.max(1, keepdims=True),
    "gain": lambda h, xp, w: h * w(width(h)),
    "bias": lambda h, xp, w: h + w(width(h)),
    "gate": lambda h, xp, w: h * (w.x @ w(3, width(h))),
    "divide": lambda h, xp, w: h / (w.x @ w(3, width(h))),
    "where": lambda h, xp, w: xp.where(w.x @ w(3, width(h)) > 0, h, 0.0),
    "mix": lambda h, xp, w: h @ w(width(h), 6),
    "larger": lambda h, xp, w: xp.maximum(h, h @ w(width(h), width(h))),
    "residual": lambda h, xp, w: h + xp.tanh(h @ w(width(h), 4)) @ w(4, width(h)),
    "glu": lambda h, xp, w: (
        xp.tanh(h @ w(width(h), 4)) * (h @ w(width(h), 4))) @ w(4, width(h)),
    "attend": attend,
    "self": lambda h, xp, w: h @ h.T @ h,
    "tied": lambda h, xp, w: (
        xp.tanh(h @ w(width(h), 4, tied=True)) @ w(width(h), 4, tied=True).T),
    "heads": lambda h, xp, w: (
        h.reshape(2, 2, -1) * w(2)[:, None]).reshape(2, -1) if width(h) % 2 == 0 else h,
    "beside": lambda h, xp, w: xp.concatenate([h, w.x @ w(3, 3)], 1),
    "beside ones": lambda h, xp, w: xp.concatenate([h * 0 + 1.0, h], 1),
    "behind zeros": lambda h, xp, w: xp.pad(h, ((0, 0), (width(h), 0))),
    "swapped": swapped,
    "outer gain": lambda h, xp, w: xp.einsum(
        "bi,bj,ij->bj", h, h, w(width(h), width(h))),
    "diagonal": lambda h, xp, w: h @ (w(width(h), width(h)) * np.eye(width(h))),
    "identity": lambda h, xp, w: h @ (w(width(h), width(h)) + np.eye(width(h))),
    "weight norm": weight_norm,
    "of squares": lambda h, xp, w: h * (
        h**2 + (h * w(width(h))) ** 2).sum(1, keepdims=True),
    "gained squares": lambda h, xp, w: h * (h**2 @ w(width(h)))[:, None],
}  # fmt: skip


def program(names, first):
    def apply(w, xp):
        h = w.x @ w(3, first)
        for name in names:
            h = LAYERS[name](h, xp, w) if name in LAYERS else MOVES[name](h, xp)
            h = h[:, :24]
        return h * w(width(h)) @ w(width(h), 2)

    return apply


def acted(x, *, member, exponent, values, kind):
    """The leaf with a member scaled or mixed, entry by entry."""
    at, out = coordinates(x, member), x.copy()
    for index, (unit, rest), by in entries(x, member):
        s = values[by]
        if s.ndim == 1:
            out[index] *= s[unit] ** float(exponent)
            continue
        if exponent < 0 and kind != "rotation":
            s = np.linalg.inv(s).T
        column = [list(index) for _ in s]
        for g, old in enumerate(column):
            old[member.place.axis] = at.index((g, rest))
        out[index] = sum(s[unit, g] * x[tuple(old)] for g, old in enumerate(column))
    return out


def check(names, first):
    """Permuted, scaled and mixed entry by entry and run by numpy, in float64."""
    rng, apply = np.random.default_rng(0), program(names, first)
    x, p = rng.normal(size=(2, 3)), {}
    with np.errstate(all="ignore"):
        want = apply(Weights(p, x, rng), np)
    if not (np.abs(want) < 1e9).all():
        return
    model = lambda p, x: apply(Weights(p, x), jnp)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        groups = rewrite.symmetries(model, p, x)
        found = rewrite.continuous(model, p, x)
    assert groups.refused == ()
    cases = []
    for group in groups.groups:
        still = np.broadcast_to(np.arange(group.size), (*group.counts, group.size))
        table = rng.permuted(still, axis=-1)
        moves = [ft.partial(reference, member=m, table=table) for m in group.members]
        cases.append((p, group, moves))
    for s in found:
        move = ft.partial(acted, values=drawn(s, rng), kind=s.kind)
        pairs = zip(s.group.members, s.exponents, strict=True)
        moves = [ft.partial(move, member=m, exponent=e) for m, e in pairs]
        folded = {n: np.ones_like(v) if n in s.ones else v for n, v in p.items()}
        cases.append((folded, s.group, moves))
    for start, group, moves in cases:
        moved = dict(start)
        for member, move in zip(group.members, moves, strict=True):
            moved[member.path] = move(moved[member.path])
        want = apply(Weights(start, x), np)
        blur = {n: v * (1 + 1e-13 * rng.normal(size=v.shape)) for n, v in start.items()}
        rounding = np.abs(apply(Weights(blur, x), np) - want).max()
        room = 1e4 * rounding + 1e-11 * np.abs(want).max() + 1e-12
        np.testing.assert_allclose(apply(Weights(moved, x), np), want, 0, room)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([*MOVES, *LAYERS]), max_size=5),
    st.sampled_from([4, 6, 12]),
)
def test_what_is_found_in_any_program_is_true_of_it(names, first):
    check(names, first)


def test_programs_that_were_misread_once():
    check(["pairs max", "plus roll", "last"], 4)  # an empty slice of pieces
    check(["outer gain", "pairs max", "last"], 6)  # a weight between blocks of itself
    check(["behind zeros", "heads", "swapped"], 4)  # sizes that are numpy's
