"""Adapters (adalora to lora_prune) against the papers' formulas, in numpy, float64.

The formulas are written with explicit sums, Kronecker products and decompositions,
from what the papers say; fixed entries of a state are derived anew from the weight.
"""

from collections.abc import Callable
import functools as ft
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxlab import lowrank
from jaxlab.types import Adapter

SHAPES = ((6, 4), (5, 7))
TALL, ODD = SHAPES[:1], SHAPES[1:]
BLOCKS = ((6, 4), (4, 6))
outer = np.multiply.outer
# Halves the compile time, where the point is not what optimised code computes.
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Case(NamedTuple):
    """An adapter, and what its paper says of `(w, s)` or of `(w, s, statistic)`."""

    make: Callable[[], Adapter]
    formula: Callable[..., np.ndarray]
    shapes: tuple[tuple[int, int], ...] = SHAPES
    statistic: Callable[[Any, tuple[int, int]], np.ndarray] | None = None


def gram(rng, shape):
    """X^T X of more inputs than there are directions."""
    x = rng.standard_normal((3 * shape[0], shape[0])) * np.arange(1, shape[0] + 1)
    return x.T @ x


def slope(rng, shape):
    return rng.standard_normal(shape)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def low_rank(a, b):
    """The sum of the outer products of the columns of A and the rows of B."""
    return sum(outer(a[:, k], b[k]) for k in range(len(b)))


def added(scale):
    """LoRA: W + s A B."""
    return lambda w, s, *_: w + scale * low_rank(s["a"], s["b"])


def adalora(scale):
    """W + s sum_k lambda_k p_k q_k."""

    def formula(w, s):
        p, values, q = s["a"], s["diag"], s["b"]
        return w + scale * sum(
            values[k] * outer(p[:, k], q[k]) for k in range(len(values))
        )

    return formula


def boft(w, s):
    """(R W) s, R = B_{f-1} ... B_0: each a matrix of scattered blocks."""
    n, size = len(w), s["a"].shape[-1]
    r, one = np.eye(n), np.eye(size)
    for i, blocks in enumerate(s["a"]):
        b = np.zeros((n, n))
        for j, a in enumerate(blocks):
            q = (a - a.T) / 2
            # Halves `place` and `place + 2^i` of a stretch of 2^(i + 1) halves.
            stretch, place = divmod(j, 2**i)
            first = (stretch * 2 ** (i + 1) + place) * size / 2
            inputs = [int(first + k) for k in range(size)]
            if i > 0:
                h = size // 2
                inputs = [int(first + k % h + k // h * 2**i * h) for k in range(size)]
            b[np.ix_(inputs, inputs)] = (one - q) @ np.linalg.inv(one + q)
        assert np.allclose(b.T @ b, np.eye(n))
        r = b @ r
    return r @ w * s["scale"]


def bone(form):
    """Each block of the weight, one by one: W + C W + C."""

    def formula(w, s):
        r, out = s["c"].shape[-1], np.array(w)
        for b in range(w.shape[0] // r):
            for a in range(w.shape[1] // r):
                here = np.ix_(range(b * r, b * r + r), range(a * r, a * r + r))
                c = s["c"][b if form == "row" else a]
                out[here] = w[here] + c @ w[here] + c
        return out

    return formula


def c3a(w, s):
    """The circular correlations of every unit vector with the kernels, by FFT."""
    outs, ins, b = s["kernel"].shape
    update = np.zeros(w.shape)
    for row, x in enumerate(np.eye(ins * b)):
        for i in range(outs):
            for j in range(ins):
                spectrum = np.fft.fft(x[j * b : j * b + b])
                waves = spectrum * np.conj(np.fft.fft(s["kernel"][i, j]))
                update[row, i * b : i * b + b] += np.fft.ifft(waves).real / (ins * b)
    return w + update


def contracon(dilation):
    """The image of each head: correlated, shifted, and let through by a gate."""

    def formula(w, s):
        heads, k = s["kernel"].shape[:2]
        n, width = len(w), w.shape[1] // heads
        out = np.zeros(w.shape)
        for h in range(heads):
            image = w[:, h * width : h * width + width]
            for i in range(n):
                for j in range(width):
                    total = s["shift"][h] + sigmoid(s["gate"][h]) * image[i, j]
                    for p in range(k):
                        for q in range(k):
                            y = i + dilation * (p - k // 2)
                            x = j + dilation * (q - k // 2)
                            if 0 <= y < n and 0 <= x < width:
                                total += s["kernel"][h, p, q] * image[y, x]
                    out[i, h * width + j] = total
        return out

    return formula


def corda(scale, rank, mode):
    """C W = P S Q^T; r of the components C^-1 P S Q^T give way to s A B."""

    def formula(w, s, g):
        n = len(w)
        c = g / (np.trace(g) / n) + 0.01 * np.eye(n)
        p, sigma, qt = np.linalg.svd(c @ w, full_matrices=False)
        parts = [
            sigma[k] * np.linalg.inv(c) @ outer(p[:, k], qt[k])
            for k in range(len(sigma))
        ]
        assert np.allclose(sum(parts), w)
        mine = parts[:rank] if mode == "ipm" else parts[-rank:]
        return w - sum(mine) + scale * low_rank(s["a"], s["b"])

    return formula


def delora(w, s):
    """Directions of norm lambda / r, by the lengths of the weight's rows."""
    a, b, out = s["a"], s["b"], np.array(w)
    rank = len(b)
    for k in range(rank):
        size = s["bound"] / rank / np.linalg.norm(a[:, k]) / np.linalg.norm(b[k])
        for i in range(len(w)):
            out[i] += np.linalg.norm(w[i]) * size * a[i, k] * b[k]
    return out


def dora(scale):
    """Column by column: a trained length times the direction of W + s A B."""

    def formula(w, s):
        v = w + scale * low_rank(s["a"], s["b"])
        columns = [
            s["magnitude"][j] * v[:, j] / np.linalg.norm(v[:, j])
            for j in range(v.shape[1])
        ]
        return np.stack(columns, 1)

    return formula


def shuffled(size, seed):
    """torch.randperm: Fisher and Yates from the front, by a Mersenne twister."""
    words, out = np.random.RandomState(seed), list(range(size))
    for i in range(size - 1):
        word = int(words.randint(0, 2**32, dtype=np.uint32))
        other = i + word % (size - i)
        out[i], out[other] = out[other], out[i]
    return out


def fourierft(scale, seed):
    """Waves at the places that are first in a shuffled weight `[m, n]`."""

    def formula(w, s):
        (n, m), update = w.shape, np.zeros(w.shape)
        places = shuffled(n * m, seed)
        for c, place in zip(s["c"], places, strict=False):
            k, l = place % n, place // n
            p, q = np.arange(n)[:, None], np.arange(m)[None]
            update += c * np.cos(2 * np.pi * (k * p / n + l * q / m)) / (n * m)
        return w + scale * update

    return formula


def gralora(scale, k):
    """Block by block, a product of rank r / k each; and one of the whole weight."""

    def formula(w, s):
        (n, m), rank = w.shape, s["a"].shape[-1]
        rows, columns, part = n // k, m // k, rank // k
        update = np.zeros(w.shape)
        for i in range(k):
            for o in range(k):
                a = s["a"][i][:, o * part : o * part + part]
                b = s["b"][o][i * part : i * part + part]
                here = np.ix_(
                    range(i * rows, i * rows + rows),
                    range(o * columns, o * columns + columns),
                )
                update[here] = low_rank(a, b)
        if "a_whole" in s:
            update += low_rank(s["a_whole"], s["b_whole"])
        return w + scale * update

    return formula


def hira(w, s):
    """Every entry times one plus the entry of A B."""
    out = np.array(w)
    for i, j in np.ndindex(w.shape):
        out[i, j] *= 1 + s["a"][i] @ s["b"][:, j]
    return out


def hra(w, s):
    """H_{r-1} ... H_0 W, the first reflection next to the weight."""
    for u in s["u"].T:
        w = w - 2 * outer(u, u @ w) / (u @ u)
    return w


def hra_orthogonal(w, s):
    """Reflections at what Gram and Schmidt leave of each column."""
    basis = []
    for u in s["u"].T:
        for v in basis:
            u = u - (v @ u) * v
        basis.append(u / np.linalg.norm(u))
    return hra(w, {"u": np.stack(basis, 1)})


def hydra(scale):
    """One branch reads the input, one the output."""

    def formula(w, s):
        after = w @ low_rank(s["a_out"], s["b_out"])
        return w + scale * low_rank(s["a"], s["b"]) + scale * after

    return formula


def kasa(scale, rank):
    """Without the r least singular components, and with a diagonal update."""

    def formula(w, s):
        u, sigma, vt = np.linalg.svd(w)
        kept = range(len(sigma) - rank)
        base = sum(sigma[k] * outer(u[:, k], vt[k]) for k in kept)
        return base + scale * s["a"] @ np.diag(s["diag"]) @ s["b"]

    return formula


def loha(scale):
    """Entry by entry, the product of two products."""

    def formula(w, s):
        out = np.array(w)
        for i, j in np.ndindex(w.shape):
            first, second = s["a1"][i] @ s["b1"][:, j], s["a2"][i] @ s["b2"][:, j]
            out[i, j] += scale * first * second
        return out

    return formula


def lokr(scale, first, second):
    """Every block of the update is an entry of C times D, of the sides given."""

    def formula(w, s):
        c = s["c"] if "c" in s else s["c_a"] @ s["c_b"]
        d = s["d"] if "d" in s else s["d_a"] @ s["d_b"]
        assert (c.shape, d.shape) == (first, second)
        out = np.array(w)
        for i, j in np.ndindex(c.shape):
            (p, q), (y, x) = second, (i * second[0], j * second[1])
            out[y : y + p, x : x + q] += scale * c[i, j] * d
        return out

    return formula


def lora_ga(scale, pick, gamma):
    """s (A B - A0 B0), of singular vectors of the gradient, times sqrt(m) / gamma.

    A decomposition leaves the sign of each pair open: that is the state's.
    """

    def formula(w, s, g):
        rank = len(s["b"])
        u, _, vt = np.linalg.svd(g)
        length = 1 if gamma is None else (w.shape[1] / gamma**2) ** 0.25
        first = np.zeros(w.shape)
        for k, (i, j) in enumerate(pick(rank)):
            a0, b0 = length * u[:, i], length * vt[j]
            a0 = a0 * np.sign(a0 @ s["a0"][:, k])
            b0 = b0 * np.sign(b0 @ s["b0"][k])
            first += outer(a0, b0)
        return w + scale * (low_rank(s["a"], s["b"]) - first)

    return formula


def lora_gain(w, s):
    """Columns of W, each times one plus its gain, and a low rank."""
    return w @ np.diag(1 + s["gain"]) + low_rank(s["a"], s["b"])


far = lambda r: [(k, r + k) for k in range(r)]
near = lambda r: [(r + k, k) for k in range(r)]
turns = lambda r: [(2 * k + 1, 2 * k) for k in range(r)]

CASES = {
    "adalora": Case(lambda: lowrank.adalora(rank=2, alpha=3), adalora(1.5)),
    "adalora/plain": Case(lambda: lowrank.adalora(rank=3), adalora(1), TALL),
    "boft": Case(lambda: lowrank.boft(block_size=5), boft, ODD),
    "boft/three": Case(lambda: lowrank.boft(block_size=2, factors=3), boft, ((8, 4),)),
    "bone": Case(lambda: lowrank.bone(block=2), bone("column"), BLOCKS),
    "bone/odd": Case(lambda: lowrank.bone(block=3), bone("column"), ((3, 9),)),
    "bone/row": Case(lambda: lowrank.bone(block=2, form="row"), bone("row"), BLOCKS),
    "bone/one": Case(lambda: lowrank.bone(block=1, form="row"), bone("row"), ODD),
    "c3a": Case(lambda: lowrank.c3a(block=2), c3a, BLOCKS),
    "c3a/odd": Case(lambda: lowrank.c3a(block=3), c3a, ((3, 9),)),
    "contracon": Case(
        lambda: lowrank.contracon(heads=2, kernel=3), contracon(1), BLOCKS
    ),
    "contracon/dilation": Case(
        lambda: lowrank.contracon(heads=1, kernel=5, dilation=2), contracon(2), ODD
    ),
    "corda": Case(
        lambda: lowrank.corda(rank=2, alpha=3), corda(1.5, 2, "ipm"), TALL, gram
    ),
    "corda/kpm": Case(
        lambda: lowrank.corda(rank=2, alpha=2, rslora=True, mode="kpm"),
        corda(2**0.5, 2, "kpm"),
        ODD,
        gram,
    ),
    "delora": Case(lambda: lowrank.delora(rank=3), delora),
    "dora": Case(lambda: lowrank.dora(rank=2, alpha=3), dora(1.5)),
    "dora/rslora": Case(
        lambda: lowrank.dora(rank=2, alpha=2, rslora=True, detach=False),
        dora(2**0.5),
        ODD,
    ),
    "eva": Case(lambda: lowrank.eva(rank=2, whiten=True), added(1), ODD, gram),
    "eva/rslora": Case(
        lambda: lowrank.eva(rank=2, alpha=4, rslora=True), added(8**0.5), ODD, gram
    ),
    "fourierft": Case(
        lambda: lowrank.fourierft(frequencies=9, scale=4), fourierft(4, 777)
    ),
    "fourierft/all": Case(
        lambda: lowrank.fourierft(frequencies=35, seed=5), fourierft(150, 5), ODD
    ),
    "full": Case(lowrank.full, lambda w, s: s["w"], ODD),
    "gralora": Case(lambda: lowrank.gralora(rank=4, alpha=6), gralora(1.5, 2), BLOCKS),
    "gralora/hybrid": Case(
        lambda: lowrank.gralora(rank=3, blocks=3, hybrid=1, alpha=6),
        gralora(1.5, 3),
        ((9, 6),),
    ),
    "gralora/one": Case(
        lambda: lowrank.gralora(rank=2, blocks=1, hybrid=2), gralora(1, 1), ODD
    ),
    "hira": Case(lambda: lowrank.hira(rank=2), hira),
    "hra": Case(lambda: lowrank.hra(rank=4), hra, TALL),
    "hra/odd": Case(lambda: lowrank.hra(rank=3), hra, ODD),
    "hra/orthogonal": Case(
        lambda: lowrank.hra(rank=3, orthogonal=True), hra_orthogonal, ODD
    ),
    "hydra": Case(lambda: lowrank.hydra(rank=2), hydra(1), TALL),
    "hydra/ranks": Case(
        lambda: lowrank.hydra(rank=1, sequential_rank=3, scale=0.7), hydra(0.7), ODD
    ),
    "ia3": Case(lowrank.ia3, lambda w, s: w @ np.diag(s["scale"])),
    "ia3/feedforward": Case(
        lambda: lowrank.ia3(feedforward=True), lambda w, s: np.diag(s["scale"]) @ w
    ),
    "kasa": Case(lambda: lowrank.kasa(rank=2, alpha=3), kasa(1.5, 2), TALL),
    "kasa/rslora": Case(
        lambda: lowrank.kasa(rank=3, alpha=3, rslora=True), kasa(3**0.5, 3), ODD
    ),
    "loha": Case(lambda: lowrank.loha(rank=2, alpha=3), loha(1.5), TALL),
    "loha/factors": Case(lambda: lowrank.loha(rank=2), loha(1), ((9, 10),)),
    "lokr": Case(lambda: lowrank.lokr(rank=1, alpha=3), lokr(3, (2, 2), (3, 2)), TALL),
    "lokr/prime": Case(lambda: lowrank.lokr(rank=2), lokr(1, (1, 1), (5, 7)), ODD),
    "lokr/whole": Case(
        lambda: lowrank.lokr(rank=4, alpha=2), lokr(0.5, (2, 3), (2, 3)), ((4, 9),)
    ),
    "lokr/both": Case(
        lambda: lowrank.lokr(rank=1, alpha=2, factor=3, decompose_both=True),
        lokr(2, (3, 3), (3, 2)),
        ((9, 6),),
    ),
    "lokr/large": Case(  # 4 does not divide 6, whose root is 2.4
        lambda: lowrank.lokr(rank=1, factor=4), lokr(1, (4, 2), (2, 3)), ((8, 6),)
    ),
    "lora": Case(lambda: lowrank.lora(rank=2, alpha=3), added(1.5)),
    "lora/plain": Case(lambda: lowrank.lora(rank=3, frozen_a=True), added(1), TALL),
    "lora/rslora": Case(
        lambda: lowrank.lora(rank=4, alpha=3, rslora=True, bias=True), added(1.5), ODD
    ),
    "lora/orthogonal": Case(
        lambda: lowrank.lora(rank=4, alpha=3, start="orthogonal"), added(0.75), ODD
    ),
    "lora_ga": Case(
        lambda: lowrank.lora_ga(rank=2, alpha=3), lora_ga(1.5, far, 16), TALL, slope
    ),
    "lora_ga/A2rBr": Case(
        lambda: lowrank.lora_ga(rank=2, direction="A2rBr", gamma=2),
        lora_ga(1, near, 2),
        ODD,
        slope,
    ),
    "lora_ga/ArBr": Case(
        lambda: lowrank.lora_ga(
            rank=2, alpha=2, rslora=True, direction="ArBr", gamma=None
        ),
        lora_ga(2**0.5, turns, None),
        ODD,
        slope,
    ),
    "lora_ga/niter": Case(
        lambda: lowrank.lora_ga(rank=1, niter=2), lora_ga(1, far, 16), ODD, slope
    ),
    "lora_gain": Case(lambda: lowrank.lora_gain(rank=2), lora_gain, ODD),
    "lora_prune": Case(lambda: lowrank.lora_prune(rank=2, alpha=3), added(1.5), ODD),
}
PAIRS = [
    pytest.param(case, shape, id=f"{name}-{shape[0]}x{shape[1]}")
    for name, case in CASES.items()
    for shape in case.shapes
]


def drawn(adapter, rng, w, *statistic):
    """A state off its start: its fixed entries as `init` has them, all others drawn."""
    key = jax.random.key(0)
    start = (
        jit(adapter.init) if adapter.fixed else ft.partial(jax.eval_shape, adapter.init)
    )
    s = start(key, w, *statistic)
    return {
        name: np.asarray(v)
        if name in adapter.fixed
        else 0.2 + rng.standard_normal(v.shape)
        for name, v in s.items()
    }


def close(got, want):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())


@pytest.mark.parametrize(("case", "shape"), PAIRS)
def test_merged_and_applied_as_the_paper_has_it(case, shape):
    rng = np.random.default_rng(sum(shape))
    w, x = rng.standard_normal(shape), rng.standard_normal((2, 3, shape[0]))
    statistic = () if case.statistic is None else (case.statistic(rng, shape),)
    with jax.enable_x64(True):
        adapter = case.make()
        s = drawn(adapter, rng, w, *statistic)
        want = case.formula(w, s, *statistic)
        assert np.abs(want - w).max() > 0.01
        apply = adapter.apply or (lambda x, w, s: x @ adapter.merge(w, s))
        both = lambda x, w, s: (adapter.merge(w, s), apply(x, w, s))
        for got, wanted in zip(jit(both)(x, w, s), (want, x @ want), strict=True):
            close(got, wanted)
