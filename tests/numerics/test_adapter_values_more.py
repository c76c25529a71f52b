"""What adapters compute, in float64, against their papers' formulas spelt out.

The adapters from `pst` to `waveft`, as `test_adapter_values.py` has the others.
"""

import functools as ft
import itertools as it
import math

from adapter_values import (
    EVEN,
    KEYS,
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
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank


def pst(w, s, scale=1.0, low_rank=1.0, structure=1.0, sparsity=0.0):
    """The least important of all entries dropped, one by one."""
    new = w + scale * summed(s["u"], s["v"])
    importance = np.abs(new) + low_rank * summed(s["score_a"], s["score_b"])
    for i, j in np.ndindex(*w.shape):
        importance[i, j] += structure * (s["score_in"][i] + s["score_out"][j])
    for place in np.argsort(importance, None)[: math.floor(sparsity * w.size)]:
        new.flat[place] = 0
    return new


def randlora(scale, w, s):
    """Columns of B by (basis, rank) meet rows of A by (rank, basis)."""
    (r, count), sides = s["lambda"].shape, sorted(w.shape)  # a square one is turned
    b = [(j, q) for j in range(count) for q in range(r)]
    a = [(q, j) for q in range(r) for j in range(count)]
    total = np.zeros(sides[::-1])
    for (j, q), (p, i) in zip(b, a, strict=True):
        row = s["lambda"][p, i] * s["basis_a"][p, : sides[0]] * s["gamma"][i]
        total += np.outer(s["basis_b"][: sides[1], j, q], row)
    return w + scale * (total if w.shape[0] > w.shape[1] else total.T)


def rotation(s, m, variant, group):
    """The matrix R of y = R h, two by two."""
    out, half = np.zeros((m, m)), group // 2
    for number in range(m // 2):
        g, i = divmod(number, half)
        first, second = g * group + i, g * group + i + half
        # One, two or four places of each pair: (row 1 cos, sin; row 2 sin, cos).
        four = 2 * g * group
        places = {
            1: (number,) * 4,
            2: (first, first, second, second),
            4: (four + i, four + group + i, four + group + half + i, four + half + i),
        }[variant]
        cos, sin, sin_, cos_ = (
            s["alpha"][p] * f(s["theta"][p])
            for p, f in zip(places, (np.cos, np.sin, np.sin, np.cos), strict=True)
        )
        out[first, first], out[first, second] = cos, -sin
        out[second, first], out[second, second] = sin_, cos_
    return out


def road(variant, group, w, s):
    return w @ rotation(s, w.shape[1], variant, group).T


def sara(w, s):
    out = w.copy()
    out.flat[s["indices"]] = s["values"]
    return out


def scale_lora(w, s):
    return np.array([[w[i, j] * (s["a"][i] @ s["b"][:, j]) for j in range(w.shape[1])]
                     for i in range(len(w))])  # fmt: skip


def omega(s, m):
    return s[next(k for k in s if k in ("omega", f"omega_{m}"))]


def scalearn(w, s):
    """Sources are LoRAs of scale 3 / 2."""
    out = w.copy()
    for t, scale in enumerate(omega(s, w.shape[1])):
        out += 1.5 * scale[None] * summed(s["sources"]["a"][t], s["sources"]["b"][t])
    return out


def scalearn_output(x, w, s):
    out = x @ w
    for t, scale in enumerate(omega(s, w.shape[1])):
        own = {name: v[t] for name, v in s["sources"].items()}
        h = relu(x @ w @ own["down"] + own["down_bias"][None])
        out += scale[None] * 0.5 * (h @ own["up"] + own["up_bias"][None])
    return out


def shira(w, s):
    out = w.copy()
    for v, i, j in zip(s["values"], s["rows"], s["columns"], strict=True):
        out[i, j] += v
    return out


def tinylora(w, s):
    v = s["v"][s["group"]] if "group" in s else s["v"]
    r = np.zeros(s["p"].shape[1:])
    for i, p in enumerate(s["p"]):
        r += v[i] * p
    return w + s["a"] @ r.T @ s["b"]


def digits(cores):
    """Every index of a chain of cores, the first digit the slowest."""
    return it.product(*(range(len(c)) for c in cores))


def chain(matrices):
    return ft.reduce(np.matmul, matrices)


def tlora(w, s):
    """Entry by entry, the trace of a product of slices."""
    t, b, c = ([s[k] for k in sorted(s) if k[0] == kind] for kind in "tbc")
    turn, rest = np.zeros((len(w),) * 2), np.zeros(w.shape)
    for i, at in enumerate(digits(t)):
        for j, to in enumerate(digits(t)):
            slices = [core[p, q] for core, p, q in zip(t, at, to, strict=True)]
            turn[i, j] = np.trace(chain(slices))
        left = chain([core[p] for core, p in zip(b, at, strict=True)])
        for j, to in enumerate(digits(c)):
            right = chain([core[q] for core, q in zip(c, to, strict=True)])
            rest[i, j] = np.trace(left @ right)
    return turn @ w + rest


def divisors(size, order):
    """The digits of a side: as even as its divisors allow."""
    out = []
    for left in range(order, 1, -1):
        root = size ** (1 / left) + 1e-9
        out.append(max(d for d in range(1, int(root) + 1) if size % d == 0))
        size //= out[-1]
    return [*out, size]


def tlora_count(n, m, order, r, t, train=False):
    ends = [1 if train else t, *[t] * (order - 1), 1 if train else t]
    ins, outs = divisors(n, order), divisors(m, order)
    turn = sum(d * d * ends[i] * ends[i + 1] for i, d in enumerate(ins))
    return turn + r * r * (sum(ins) + sum(outs))


def trainable_tokens(indices, w, s):
    return np.stack(
        [s["rows"][indices.index(i)] if i in indices else w[i] for i in range(len(w))]
    )


def unilora(w, s):
    a = s["theta"][s["index_a"]] * s["scale_a"] * s["norm"]
    b = s["theta"][s["index_b"]] * s["scale_b"] * s["norm"]
    return w + summed(a, b)


def mixture(logits, bank, k):
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    weights = softmax(logits[best])
    return sum(v * bank[i] for v, i in zip(weights, best, strict=True))


def vblora(k, w, s):
    """Columns of A and rows of B, run after run."""
    factor = lambda logits: np.stack(
        [np.concatenate([mixture(run, s["bank"], k) for run in row]) for row in logits]
    )
    return w + summed(factor(s["logits_a"]).T, factor(s["logits_b"]))


def vera(w, s):
    (n, m), out = w.shape, w.copy()
    for q, d in enumerate(s["d"]):
        out += d * np.outer(s["proj_a"][:n, q], s["proj_b"][q, :m] * s["b"])
    return out


ROOT = math.sqrt(3)
DB2 = np.array([1 + ROOT, 3 + ROOT, 3 - ROOT, 1 - ROOT]) / (4 * math.sqrt(2))
HAAR = np.array([1, 1]) / math.sqrt(2)
LOW = {  # low filters of analysis and synthesis, as {place: tap}
    "haar": (dict(enumerate(HAAR)),) * 2,
    "db2": (dict(enumerate(DB2)),) * 2,
    "bior2.2": (
        dict(zip(range(-2, 3), np.array([-1, 2, 6, 2, -1]) / 32**0.5, strict=True)),
        dict(zip(range(-1, 2), np.array([1, 2, 1]) / 8**0.5, strict=True)),
    ),
}


def analysis(size, wavelet):
    """Low and high halves of a periodic signal: two matrices `[ceil(size / 2), size]`.

    Also the two of their inverse, `[size, ceil(size / 2)]`.
    """
    even = size + size % 2
    down, up = LOW[wavelet]
    high = {1 - k: (-1.0) ** (1 - k) * v for k, v in up.items()}
    whole = np.zeros((even, even))
    for (band, taps), j in it.product(enumerate((down, high)), range(even // 2)):
        for k, v in taps.items():
            whole[band * even // 2 + j, (2 * j + k) % even] += v
    back = np.linalg.inv(whole)[:size]
    if even > size:  # an odd signal repeats its last value
        whole[:, -2] += whole[:, -1]
        whole = whole[:, :-1]
    return np.split(whole, 2), np.split(back, 2, axis=1)


def wara(scale, wavelet, levels, w, s):
    total, (low_n, low_m) = np.zeros(w.shape), (np.eye(v) for v in w.shape)
    for level in range(levels):
        n, m = (analysis(v.shape[1], wavelet)[1] for v in (low_n, low_m))
        for rows, columns in it.product("lh", repeat=2):
            name = f"{level}_{rows}{columns}"
            if name.endswith("ll") and level + 1 < levels:
                assert f"a_{name}" not in s
                continue
            left, right = (v["lh".index(c)] for v, c in ((n, rows), (m, columns)))
            band = summed(s[f"a_{name}"], s[f"b_{name}"])
            total += low_n @ left @ band @ (low_m @ right).T
        low_n, low_m = low_n @ n[0], low_m @ m[0]
    return w + scale * total


def wara_shared(wavelet, levels, w, s):
    """One pair for the bands "ll" and "hh", and none for those that mix."""
    own = {}
    for level in range(levels):
        kinds = ("hh", "ll") if level + 1 == levels else ("hh",)
        for kind, factor in it.product(("lh", "hl", *kinds), "ab"):
            used = s[f"{factor}_{level}"] * (kind in kinds)
            own[f"{factor}_{level}_{kind}"] = used
    return wara(1, wavelet, levels, w, own)


def wara_features(wavelet, w, s):
    """For orthonormal wavelets: the features' transform, a pair, and its inverse."""
    down, up = analysis(len(w), wavelet)[0], analysis(w.shape[1], wavelet)[1]
    update = summed(s["a_0"], s["b_0"])
    return w + sum(d.T @ update @ u.T for d, u in zip(down, up, strict=True))


def bands(n, m, levels):
    """Both sides of each level, added."""
    sides = [(-(-n // 2 ** (l + 1)), -(-m // 2 ** (l + 1))) for l in range(levels)]
    return [sum(v) for v in sides]


def permutation(seed, n):
    """`torch.randperm`: swaps from the front by a Mersenne twister's words."""
    draw, out = np.random.RandomState(seed), list(range(n))
    for i in range(n - 1):
        word = draw.randint(0, 2**32, dtype=np.uint32)
        j = i + int(word) % (n - i)
        out[i], out[j] = out[j], out[i]
    return out


def waveft(w, s, low=HAAR, scale=25.0, seed=777):
    """One coefficient after another, of a weight [out, in] in PEFT's order."""
    n, m = w.shape
    total, taps = np.zeros((m, n)), len(low)
    high = np.array([(-1) ** k * low[-1 - k] for k in range(taps)])
    sides = [v + taps - 2 + (v + taps - 2) % 2 for v in (m, n)]
    edges = [(side - v) // 2 for side, v in zip(sides, (m, n), strict=True)]
    for place, c in zip(permutation(seed, m * n), s["c"], strict=False):
        at = [p + e for p, e in zip(divmod(place, n), edges, strict=True)]
        parts = [divmod(p, side // 2) for p, side in zip(at, sides, strict=True)]
        waves = []
        for axis, size in enumerate((m, n)):
            (_, j), (band, _) = parts[axis], parts[1 - axis]  # bands exchanged
            wave = np.zeros(sides[axis] + 2 * taps)
            wave[2 * j : 2 * j + taps] = (low, high)[band]
            waves.append(wave[taps - 2 :][:size])
        total += c * np.outer(*waves)
    return w + scale * total.T


def sparse(w, s, scale, seed):
    out = w.T.copy()
    for place, c in zip(permutation(seed, w.size), s["c"], strict=False):
        out.flat[place] += scale * c
    return out.T


def two(adapter):
    """Two states of a source."""
    return lambda w: jax.vmap(adapter.init, (0, None))(KEYS, w)


p = ft.partial
LORA, AFTER = lowrank.lora(rank=2, alpha=3), lowrank.bottleneck(rank=2, scale=0.5)
B_0 = "b_0_ll b_0_lh b_0_hl b_0_hh"
CASES = {
    "pst": Case(
        p(lowrank.pst, rank=2, score_rank=1, sparsity=0.4),
        lambda n, m: 3 * (n + m) + n + m, p(pst, sparsity=0.4),
        zero="v score_b score_in score_out", starts=False, random=True,
    ),
    "pst/weights": Case(
        p(lowrank.pst, rank=1, scale=2.0, low_rank=0.3, structure=1.7),
        lambda n, m: 3 * (n + m), p(pst, scale=2.0), shapes=(EVEN,),
        zero="v score_b score_in score_out", random=True,
    ),
    "pst/weights pruned": Case(
        p(lowrank.pst, rank=1, scale=2.0, low_rank=0.3, structure=1.7, sparsity=0.7),
        lambda n, m: 3 * (n + m),
        p(pst, scale=2.0, low_rank=0.3, structure=1.7, sparsity=0.7), starts=False,
        zero="v score_b score_in score_out", random=True, shapes=(ODD,),
    ),
    **{
        f"randlora/{bases}": Case(
            p(lowrank.randlora, rank=3, alpha=4, bases=bases),
            lambda n, m: math.ceil(min(n, m) / 3) * (3 + min(n, m)),
            p(randlora, 4 / 3), zero="lambda", shapes=shapes,
        )
        for bases, shapes in (
            ("dense", (EVEN, ODD, (4, 4))), ("sparse", (ODD,)), ("very_sparse", (EVEN,))
        )
    },
    **{
        f"road/{variant}": Case(
            p(lowrank.road, variant=variant, group=group),
            lambda n, m, variant=variant: variant * m, p(road, variant, group),
            zero="theta", shapes=((5, 8),),
        )
        for variant, group in ((1, 4), (2, 4), (4, 2), (4, 4))
    },
    "sara": Case(p(lowrank.sara, density=0.25), lambda n, m: n * m // 4, sara,
                 shapes=(EVEN, (4, 7))),
    "scale_lora": Case(p(lowrank.scale_lora, rank=3), pair(3), scale_lora),
    **{
        f"scalearn/{uniform:d}{shared:d}": Case(
            p(lowrank.scalearn, LORA, sources=2, uniform=uniform, shared=shared),
            lambda n, m, uniform=uniform: 2 * (1 if uniform else m), scalearn,
            statistic=two(LORA), random=True, also="sources", shapes=(shape,),
        )
        for uniform, shared, shape in (
            (False, False, EVEN), (False, True, ODD), (True, False, ODD),
            (True, True, EVEN),
        )
    },
    "scalearn/bottleneck": Case(
        p(lowrank.scalearn, AFTER, sources=2, initial=1.0), lambda n, m: 2 * m,
        output=scalearn_output, statistic=two(AFTER), random=True, also="sources",
        shapes=(EVEN,),
    ),
    "shira": Case(p(lowrank.shira, rank=1), pair(1), shira, zero="values"),
    "shira/magnitude": Case(p(lowrank.shira, rank=2, mask="magnitude"), pair(2), shira,
                            zero="values", shapes=(EVEN,)),
    "shira/statistic": Case(
        p(lowrank.shira, rank=1, mask="statistic"), pair(1), shira, zero="values",
        shapes=(ODD,), statistic=lambda w: jnp.abs(jnp.sin(9 * w)),
    ),
    "tinylora": Case(p(lowrank.tinylora, rank=3, size=5), lambda n, m: 5, tinylora,
                     zero="v", random=True, shapes=(ODD,)),
    "tinylora/groups": Case(
        p(lowrank.tinylora, rank=2, size=5, groups=3), lambda n, m: 15, tinylora,
        zero="v", random=True, shapes=(EVEN,),
    ),
    **{
        f"tlora/{order}{train:d}": Case(
            p(lowrank.tlora, rank=2, transform_rank=3, order=order, train=train),
            p(tlora_count, order=order, r=2, t=3, train=train), tlora, zero="b0",
            random=True, shapes=(shape,),
        )
        for order, train, shape in
        ((2, False, EVEN), (1, False, ODD), (3, True, (8, 6)))
    },
    "trainable_tokens": Case(
        p(lowrank.trainable_tokens, indices=(4, 1)),
        lambda n, m: 2 * m, p(trainable_tokens, (4, 1)),
    ),
    "unilora": Case(
        p(lowrank.unilora, rank=2, size=5, bound=0.3), lambda n, m: 5, unilora,
        starts=False, random=True, also="scale_a scale_b norm",
        shapes=(ODD,),
    ),
    **{
        f"vblora/{k}": Case(
            p(lowrank.vblora, rank=2, num_vectors=6, vector_length=2, topk=k),
            lambda n, m: 2 * 6 * (n + m) // 2 + 6 * 2, p(vblora, k), starts=False,
            random=True, shapes=(EVEN,),
        )
        for k in (1, 3)
    },
    "vera": Case(p(lowrank.vera, rank=5, d_initial=0.3, seed=4),
                 lambda n, m: 5 + m, vera, zero="b"),
    **{
        f"wara/{wavelet}": Case(
            p(lowrank.wara, rank=1, wavelet=wavelet, levels=levels, alpha=2),
            lambda n, m, levels=levels: 3 * sum(bands(n, m, levels))
            + bands(n, m, levels)[-1],
            p(wara, 2, wavelet, levels), random=True, shapes=(shape,),
            zero=B_0 if levels == 1 else "b_0_lh b_0_hl b_0_hh b_1_ll b_1_lh b_1_hl "
            "b_1_hh",
        )
        for wavelet, levels, shape in
        (("haar", 1, EVEN), ("db2", 2, ODD), ("bior2.2", 2, EVEN))
    },
    **{
        f"wara/{wavelet} shared": Case(
            p(lowrank.wara, rank=1, wavelet=wavelet, levels=2, shared=True),
            lambda n, m: sum(bands(n, m, 2)), p(wara_shared, wavelet, 2),
            zero="b_0 b_1", random=True, shapes=(shape,),
        )
        for wavelet, shape in (("haar", ODD), ("bior2.2", EVEN))
    },
    "wara/features": Case(
        p(lowrank.wara, rank=2, wavelet="db2", shared=True),
        lambda n, m: n + m, p(wara_features, "db2"),
        zero="b_0", random=True, shapes=(EVEN,),
    ),
    "waveft": Case(p(lowrank.waveft, frequencies=9), lambda n, m: 9, waveft, zero="c",
                   shapes=(EVEN, ODD)),
    "waveft/db2": Case(
        p(lowrank.waveft, frequencies=12, wavelet="db2", scale=2, seed=3),
        lambda n, m: 12, p(waveft, low=DB2, scale=2, seed=3), zero="c",
    ),
    "waveft/sym2": Case(p(lowrank.waveft, frequencies=12, wavelet="sym2", scale=2),
                        lambda n, m: 12, p(waveft, low=DB2, scale=2), zero="c",
                        shapes=(ODD,)),
    "waveft/sparse": Case(p(lowrank.waveft, frequencies=7, wavelet=None, scale=3),
                          lambda n, m: 7, p(sparse, scale=3, seed=777), zero="c",
                          shapes=(ODD,)),
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
