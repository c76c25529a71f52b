"""What adapters compute, in float64, against their papers' formulas spelt out.

The adapters from `mask_lora` to `psoft`. Each formula is written in numpy, from the
equation that the docstring cites, with loops where the paper has sums.
"""

import functools as ft
import itertools as it
import math

from adapter_values import (
    EVEN,
    ODD,
    Case,
    check_count,
    check_start,
    check_values,
    pair,
    relu,
    softmax,
    summed,
)
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank


def mask_lora(scale, w, s):
    out = w.copy()
    for i, j in zip(*np.nonzero(w), strict=True):
        out[i, j] += scale * sum(s["a"][i] * s["b"][:, j])
    return out


def mask_tuning(threshold, w, s):
    return np.where(s["mask"] > threshold, w, 0)


def mask_tuning_some(w, s):
    out = w.copy().ravel()
    for place, mask in zip(s["indices"], s["mask"], strict=True):
        out[place] *= float(mask > 0.005)
    return out.reshape(w.shape)


def low_rank(scale, w, s):
    return w + scale * summed(s["a"], s["b"])


def miss(w, s):
    """Row i of the update is row i mod r of D."""
    return w + np.stack([s["d"][i % len(s["d"])] for i in range(len(w))])


def miss_mini(w, s):
    r, width = s["d"].shape
    places = np.ndindex(*w.shape)
    shards = [s["d"][i % r, j % width] for i, j in places]
    return w + np.reshape(shards, w.shape)


def miss_bat(w, s):
    """Block by block: W_io + B_o^T W_io + B_o^T."""
    out, r = w.copy(), s["d"].shape[-1]
    for i, o in it.product(range(len(w) // r), range(len(s["d"]))):
        at = np.ix_(range(i * r, i * r + r), range(o * r, o * r + r))
        out[at] += s["d"][o].T @ w[at] + s["d"][o].T
    return out


def skew(entries, size):
    q = np.zeros((size, size))
    for (i, j), v in zip(it.combinations(range(size), 2), entries, strict=True):
        q[i, j], q[j, i] = v, -v
    return q


def capped(q, bound):
    """Q scaled down to a Frobenius norm, where it is above."""
    return q * min(1.0, bound / max(np.linalg.norm(q), 1e-30))


def series(q, terms):
    """Cayley's transform by powers of Q, as the papers' implementations cut it off."""
    power = np.linalg.matrix_power
    out, count = np.eye(len(q)), max(terms, 4)
    if terms == 1:
        return out
    if terms == 2:
        return out + 2 * q
    for k in range(1, count - 1):
        out = out + 2 * power(q, k)
    return out + power(q, count - 1)


def oft(w, s, terms=None, eps=None):
    """The rotated rows of each block of inputs, one block after another."""
    n, count = len(w), len(s["q"])
    b = next(b for b in range(2, n + 1) if b * (b - 1) // 2 == s["q"].shape[1])
    out = np.zeros_like(w)
    for i in range(n // b):
        q = skew(s["q"][i % count], b)
        q = q if eps is None else capped(q, eps / math.sqrt(count))
        if terms is None:
            r = (np.eye(b) - q) @ np.linalg.inv(np.eye(b) + q)
        else:
            r = series(q, terms)
        out[i * b : i * b + b] = r @ w[i * b : i * b + b]
    return out


def shifted(scale, w, s):
    return w + scale * (summed(s["a"], s["b"]) - summed(s["a0"], s["b0"]))


def osf(w, s):
    out = w.copy()
    for q in range(len(s["d"])):
        out += s["d"][q] * np.outer(s["a"][:, q], s["b"][q])
        out -= s["d0"][q] * np.outer(s["a0"][:, q], s["b0"][q])
    return out


def bottleneck(f, scale, x, w, s):
    h = f(x @ s["down"] + s["down_bias"][None])
    return x @ w + scale * (h @ s["up"] + s["up_bias"][None])


def psoft(w, s, orthogonal=True, terms=None, bound=None):
    a, b = s["a"], s["b"]
    one = np.eye(a.shape[1])
    if orthogonal:
        q = skew(s["q"], len(one))
        q = q if bound is None else capped(q, bound)
        exact = (one + q) @ np.linalg.inv(one - q)
        r = exact if terms is None else series(q, terms)
    else:
        r = s["q"]
    r = np.diag(s.get("beta", np.ones(len(one)))) @ r
    r = r @ np.diag(s.get("alpha", np.ones(len(one))))
    return w + a @ (r.T - one) @ b


def beside(r):
    return lambda n, m: r * (n + m) + r + m


p = ft.partial
DOWN = "up up_bias down_bias"
CASES = {
    "mask_lora": Case(
        p(lowrank.mask_lora, rank=2, alpha=3),
        pair(2), p(mask_lora, 1.5), zero="b", random=True,
    ),
    "mask_tuning": Case(
        p(lowrank.mask_tuning, threshold=0.1, start=0.2),
        lambda n, m: n * m, p(mask_tuning, 0.1),
    ),
    "mask_tuning/some": Case(
        p(lowrank.mask_tuning, density=0.5),
        lambda n, m: n * m // 2, mask_tuning_some,
        shapes=(EVEN,), statistic=lambda w: jnp.sin(9 * w),
    ),
    "mica": Case(
        p(lowrank.mica, rank=2, alpha=3),
        lambda n, m: 2 * n, p(low_rank, 1.5), zero="a",
    ),
    "mica/rslora": Case(
        p(lowrank.mica, rank=3, alpha=2, rslora=True),
        lambda n, m: 3 * n, p(low_rank, 2 / 3**0.5), zero="a", shapes=(EVEN,),
    ),
    "miss": Case(p(lowrank.miss, rank=4), lambda n, m: 4 * m, miss, zero="d",
                 shapes=(EVEN, ODD)),
    "miss/mini": Case(
        p(lowrank.miss, rank=3, mode="mini", width=2),
        lambda n, m: 6, miss_mini, zero="d", shapes=(EVEN, (5, 4)),
    ),
    "miss/bat": Case(
        p(lowrank.miss, rank=2, mode="bat"),
        lambda n, m: m // 2 * 4, miss_bat, zero="d", shapes=(EVEN,),
    ),
    "oft": Case(
        p(lowrank.oft, block_size=3), lambda n, m: n, oft, zero="q", shapes=(EVEN,)
    ),
    "oft/blocks": Case(p(lowrank.oft, blocks=1), lambda n, m: n * (n - 1) // 2, oft,
                       zero="q"),
    "oft/share": Case(p(lowrank.oft, block_size=3, share=True), lambda n, m: 3, oft,
                      zero="q", shapes=(EVEN,)),
    **{
        f"oft/{terms} terms": Case(
            p(lowrank.oft, block_size=3, terms=terms), lambda n, m: n,
            p(oft, terms=terms), zero="q", shapes=(EVEN,),
        )
        for terms in (2, 3, 4, 6)
    },
    "oft/eps": Case(p(lowrank.oft, block_size=3, eps=0.3), lambda n, m: n,
                    p(oft, eps=0.3), zero="q", shapes=(EVEN,)),
    "oft/eps shared": Case(
        p(lowrank.oft, blocks=2, eps=0.3, share=True, terms=5),
        lambda n, m: n // 2 * (n // 2 - 1) // 2,
        p(oft, eps=0.3, terms=5), zero="q", shapes=(EVEN,),
    ),
    "olora": Case(p(lowrank.olora, rank=2, alpha=3), pair(2), p(shifted, 1.5),
                  also="a0 b0"),
    "olora/rslora": Case(p(lowrank.olora, rank=2, alpha=3, rslora=True), pair(2),
                         p(shifted, 3 / 2**0.5), also="a0 b0", shapes=(EVEN,)),
    "orthogonal_adaptation": Case(
        p(lowrank.orthogonal_adaptation, rank=2, concept=1),
        lambda n, m: 2 * m, p(low_rank, 1), zero="b",
    ),
    "osf": Case(lowrank.osf, lambda n, m: (min(n, m) + 1) // 2 * (n + m + 1), osf,
                also="a0 d0 b0", shapes=(EVEN, ODD)),
    "osf/keep": Case(p(lowrank.osf, keep=3), lambda n, m: (min(n, m) - 3) * (n + m + 1),
                     osf, shapes=(EVEN,)),
    "parallel": Case(p(lowrank.parallel, rank=3), beside(3), zero=DOWN, random=True,
                     output=p(bottleneck, relu, 1), shapes=(EVEN,)),
    "parallel/softmax": Case(
        p(lowrank.parallel, rank=3, form="softmax"), beside(3), starts=True,
        output=p(bottleneck, softmax, 1), zero=DOWN, random=True,
    ),
    "scaled_parallel": Case(
        p(lowrank.scaled_parallel, rank=2), beside(2), output=p(bottleneck, relu, 4),
        zero=DOWN, random=True, shapes=(EVEN,),
    ),
    "scaled_parallel/linear": Case(
        p(lowrank.scaled_parallel, rank=2, form="linear", scale=0.3), beside(2),
        output=p(bottleneck, lambda z: z, 0.3), zero=DOWN, random=True,
    ),
    "pela": Case(p(lowrank.pela, rank=2), pair(2),
                 lambda w, s: summed(s["a"], s["b"]), starts=False),
    "pissa": Case(p(lowrank.pissa, rank=2, alpha=3), pair(2), p(shifted, 1.5),
                  also="a0 b0"),
    "pissa/niter": Case(
        p(lowrank.pissa, rank=2, niter=4, alpha=3, rslora=True), pair(2),
        p(shifted, 3 / 2**0.5), random=True, shapes=(EVEN,),
    ),
    "psoft": Case(p(lowrank.psoft, rank=3), lambda n, m: 3 + 3 + 3, psoft, zero="q",
                  shapes=(EVEN, ODD)),
    "psoft/split": Case(
        p(lowrank.psoft, rank=3, split=True, scale_in=False), lambda n, m: 6, psoft,
        zero="q", shapes=(EVEN,),
    ),
    "psoft/full": Case(
        p(lowrank.psoft, rank=3, orthogonal=False, scale_out=False),
        lambda n, m: 9 + 3, p(psoft, orthogonal=False),
    ),
    **{
        f"psoft/{terms} terms": Case(
            p(lowrank.psoft, rank=3, terms=terms, scale_in=False, scale_out=False),
            lambda n, m: 3, p(psoft, terms=terms), zero="q", shapes=(EVEN,),
        )
        for terms in (2, 3, 5)
    },
    "psoft/bound": Case(
        p(lowrank.psoft, rank=3, terms=5, bound=0.2), lambda n, m: 9,
        p(psoft, terms=5, bound=0.2), zero="q", shapes=(EVEN,),
    ),
}  # fmt: skip
names = pytest.mark.parametrize("name", CASES)


@names
def test_values_are_those_of_the_formula(name):
    check_values(CASES[name])


@names
def test_the_number_of_trained_values(name):
    check_count(CASES[name])


@names
def test_the_first_state(name):
    check_start(CASES[name])
