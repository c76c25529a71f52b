"""PEFT's adapters that are no plain product: what defines each, and PEFT's numbers."""

import functools as ft
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import lowrank
from jaxlab.io import _peft_random as peft
from jaxlab.io._peft_defaults import DEFAULTS
from jaxlab.io._peft_kind import Layer
from jaxlab.lowrank import _structured, _waveft
from jaxlab.lowrank._torch_random import torch_random
from jaxlab.lowrank._vblora import topk_weights

GOLDEN = np.load(Path(__file__).parent / "numerics" / "peft_options.npz")
ABOUT = json.loads(str(GOLDEN["about"]))
KEY = jax.random.key(0)
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


zeros = ft.partial(np.zeros, dtype=np.float32)


def normal(seed, *shape):
    """Drawn by numpy, as all that is compared here: little is compiled."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def off(adapter, w, *more):
    """A state off its start, with what leaves of these and `more` sizes share."""
    shapes, s = jax.eval_shape(adapter.init, KEY, w), {}
    if adapter.fixed:
        s = jax.tree.map(np.asarray, adapter.shared(KEY, (w.shape, *more)))
    elif adapter.shared:
        shapes |= jax.eval_shape(lambda key: adapter.shared(key, (w.shape,)), KEY)
    return s | {n: 0.5 * normal(i, *v.shape) for i, (n, v) in enumerate(shapes.items())}


def merge(adapter, w, s):
    return np.asarray(jit(adapter.merge)(w, s))


def applied(adapter, x, w, s):
    return np.asarray(jit(adapter.apply)(x, w, s))


def slopes(adapter, w, s):
    loss = lambda s: jnp.sum(adapter.merge(w, s) ** 2)
    return jax.tree.map(np.asarray, jit(jax.grad(loss))(s))


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_torch_draws():
    """Numbers of torch 2.13.0, `torch.Generator().manual_seed(777)`, in this order."""
    draw = torch_random(777)
    assert draw.randperm(1000, 8).tolist() == [735, 819, 201, 799, 435, 497, 175, 590]
    assert draw.integers(0, 50, (6,)).tolist() == [42, 37, 20, 31, 21, 22]
    assert draw.integers(0, 2**40, (2,)).tolist() == [704321524834, 1055192672561]
    some = ["0x1.9e95ccp-1", "0x1.6ff568p-3", "0x1.912efp-3"]
    assert draw.uniform((3,)).tolist() == [float.fromhex(x) for x in some]
    some = ["0x1.d5455p-5", "0x1.c2947ep-1", "0x1.64add6p+0", "0x1.257cc4p+0"]
    drawn = draw.kaiming_uniform((2, 2)).ravel()
    assert drawn.tolist() == [float.fromhex(x) for x in some]
    some = ["-0x1.98a3a2p+0", "0x1.6dfed2p-1", "0x1.0b55a8p+0"]
    assert draw.normal((3,)).tolist() == [float.fromhex(x) for x in some]
    some = [-0.9665412902832031, -1.6611857414245605, -0.07315081, 1.0810327529907227]
    close(draw.normal((17,))[[0, 1, 8, 16]], np.array(some), 5e-7)
    assert draw.normal((2,)).tolist() == [1.3066574335098267, -0.5658637285232544]
    assert draw.randperm(5).tolist() == [3, 4, 1, 2, 0]
    with pytest.raises(ValueError, match="permutation of 300000000"):
        draw.randperm(300_000_000, 1)


def test_a_permutation_in_part_is_the_whole_ones_front():
    whole, part = torch_random(3), torch_random(3)
    np.testing.assert_array_equal(whole.randperm(50)[:7], part.randperm(50, 7))
    np.testing.assert_array_equal(whole.uniform((4,)), part.uniform((4,)))
    assert sorted(torch_random(-1).randperm(50)) == list(range(50))
    assert torch_random(2**32 + 5).randperm(9, 3).tolist() == (
        torch_random(5).randperm(9, 3).tolist()
    )


@pytest.mark.parametrize("name", ABOUT["configs"])
def test_as_in_peft(name):
    """Its tensors and fields -> the weight it merges, and back to them."""
    kind_name, options = ABOUT["configs"][name]
    kind, config = peft.KINDS[kind_name], DEFAULTS[kind_name] | options
    sizes = tuple(zip(ABOUT["sizes"], ABOUT["sizes"][1:], strict=False))
    peers = tuple((f"lin{i}", n, m) for i, (n, m) in enumerate(sizes))
    layer = Layer(*peers[0], peers)
    prefix, held = f"{name}/state/base_model.", {}
    for key in (k for k in GOLDEN.files if k.startswith(prefix)):
        held[key.removeprefix(prefix).removeprefix("model.lin0.")] = GOLDEN[key]
    adapter, s = kind.adapter(config, layer), kind.read(held, config, layer)
    whole = s if adapter.shared is None else adapter.shared(KEY, sizes) | s
    close(merge(adapter, GOLDEN["weight"].T, whole), GOLDEN[f"{name}/merged"].T)
    written = kind.write(whole, config, layer)
    assert written.keys() == held.keys()
    for key, x in held.items():
        assert written[key].dtype == x.dtype
        np.testing.assert_allclose(written[key], x, rtol=0, atol=1e-6)
    fields = kind.fields(adapter)
    assert fields.keys() <= kind.implements | {"r"}
    fields |= {"proportional_parameters": False}
    assert kind.adapter(config | fields, layer) == adapter


def test_a_missing_tensor_is_named():
    config, layer = DEFAULTS["LOKR"] | {"r": 2}, Layer("lin", 16, 40)
    with pytest.raises(KeyError, match="lokr_w1"):
        peft.KINDS["LOKR"].read({}, config, layer)
    config = DEFAULTS["WAVEFT"] | {"proportional_parameters": True}
    with pytest.raises(ValueError, match="proportional_parameters needs"):
        peft.KINDS["WAVEFT"].adapter(config, layer)


def test_logits_that_a_file_keeps_are_the_mixed_ones():
    """What only the largest say is mixed as the whole was."""
    config = DEFAULTS["VBLORA"] | {"num_vectors": 300, "topk": 3}
    short = config | {"save_only_topk_weights": True}
    layer, kind = Layer("lin", 8, 4), peft.KINDS["VBLORA"]
    bank, a = np.asarray(normal(0, 300, 4)), np.asarray(normal(1, 2, 2, 300))
    s = {"bank": bank, "logits_a": a, "logits_b": a[:, :1]}
    held = kind.write(s, short, layer)
    assert held["vblora_logits_A_topk_indices"].dtype == np.int16
    assert held["vblora_logits_A_topk_weights"].shape == (2, 2, 2)
    again = kind.read(held, short, layer)
    assert np.isneginf(again["logits_a"]).sum() == 2 * 2 * 297
    for x, y in zip(
        topk_weights(again["logits_a"], 3), topk_weights(a, 3), strict=True
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


ROTATIONS = {
    "oft": lambda: lowrank.oft(block_size=4),
    "oft/blocks": lambda: lowrank.oft(blocks=3, share=True),
    "oft/coft": lambda: lowrank.oft(block_size=6, eps=0.5),
    "boft": lambda: lowrank.boft(block_size=2, factors=2),
    "hra": lambda: lowrank.hra(rank=3),
    "hra/orthogonal": lambda: lowrank.hra(rank=3, orthogonal=True),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_keep_lengths_and_angles(name):
    """$W'^T W' = W^T W$: the columns turn together, and none of them changes length."""
    adapter, w = ROTATIONS[name](), normal(0, 12, 5)
    s = off(adapter, w)
    s |= {"scale": np.ones(5, np.float32)} if "scale" in s else {}
    merged = merge(adapter, w, s)
    close(merged.T @ merged, w.T @ w)
    assert np.abs(merged - w).max() > 0.1


def test_oft_turns_by_blocks():
    """Of two inputs, Cayley's transform of q is a turn by the angle 2 arctan q."""
    adapter, q = lowrank.oft(block_size=2), np.float32([[0.3], [-1.2]])
    turn = merge(adapter, np.eye(4, dtype=np.float32), {"q": q})
    for i, angle in enumerate(2 * np.arctan(q[:, 0])):
        block = turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]
        c, s = np.cos(angle), np.sin(angle)
        np.testing.assert_allclose(block, [[c, -s], [s, c]], atol=1e-6)
    assert (turn[:2, 2:] == 0).all()


def test_the_series_turns_the_other_way():
    q = {"q": np.float32(0.05) * normal(0, 2, 3)}
    w = normal(1, 6, 4)
    exact = merge(lowrank.oft(block_size=3), w, {"q": -q["q"]})
    errors = []
    for terms in (2, 3, 5):
        got = merge(lowrank.oft(block_size=3, terms=terms), w, q)
        errors.append(float(np.abs(got - exact).max()))
    assert errors[0] > 1e-3 > errors[1] > 1e-5 > errors[2]
    same = [merge(lowrank.oft(block_size=3, terms=k), w, q) for k in (3, 4)]
    np.testing.assert_array_equal(*same)


def test_coft_stays_near_the_identity():
    """No block is farther than the ball, and small ones are as they are."""
    free, held = lowrank.oft(block_size=3), lowrank.oft(block_size=3, eps=0.01)
    w = np.eye(6, dtype=np.float32)
    small, large = {"q": zeros((2, 3)) + 1e-3}, {"q": zeros((2, 3)) + 5}
    np.testing.assert_allclose(merge(held, w, small), merge(free, w, small), atol=1e-7)
    moved_by = np.linalg.norm(merge(held, w, large)[:3, :3] - np.eye(3))
    np.testing.assert_allclose(moved_by, 2 * 0.01 / np.sqrt(2), rtol=1e-3)
    slope = slopes(held, w, {"q": zeros((2, 3))})
    assert np.isfinite(slope["q"]).all()


def test_butterfly_factors_reach_further():
    """One factor mixes b inputs, f of them 2^(f-1) b."""
    one = np.eye(8, dtype=np.float32)
    for factors, reach in ((1, 2), (2, 4), (3, 8)):
        adapter = lowrank.boft(block_size=2, factors=factors)
        turn = merge(adapter, one, off(adapter, one))
        assert ((np.abs(turn) > 1e-6).sum(1) <= reach).all()
        assert (np.abs(turn) > 1e-6).sum() == 8 * reach


def test_boft_scales_outputs():
    adapter, w = lowrank.boft(blocks=2), normal(0, 4, 3)
    s = {"a": zeros((1, 2, 2, 2)), "scale": np.float32([2, 0, -1])}
    np.testing.assert_allclose(merge(adapter, w, s), w * s["scale"][None], atol=1e-6)


def test_hra_reflects_one_after_another():
    """The triangular form is the product of reflections; a zero column is none."""
    u, w = normal(0, 6, 3) * np.float32([1, 0, 1]), normal(1, 6, 4)
    want = w
    for i in (0, 2):
        v = u[:, i] / np.linalg.norm(u[:, i])
        want = want - 2 * np.outer(v, v @ want)
    close(merge(lowrank.hra(rank=3), w, {"u": u}), want)
    basis = np.linalg.qr(u[:, ::2])[0]
    want = w - 2 * basis @ (basis.T @ w)
    close(merge(lowrank.hra(rank=3, orthogonal=True), w, {"u": u}), want)
    slope = slopes(lowrank.hra(rank=3), w, {"u": u})
    assert np.isfinite(slope["u"]).all()


def test_hra_of_an_odd_rank_does_not_start_at_the_weight():
    w = normal(0, 6, 4)
    for rank, same in ((2, True), (3, False)):
        adapter = lowrank.hra(rank=rank)
        assert (
            np.allclose(merge(adapter, w, adapter.init(KEY, w)), w, atol=1e-5) == same
        )


def test_lokr_multiplies_by_a_kronecker_product():
    for shape in ((12, 20), (20, 12)):
        w, x = normal(0, *shape), normal(1, 2, 3, shape[0])
        adapter = lowrank.lokr(rank=2, alpha=3)
        s = off(adapter, w)
        d = s["d"] if "d" in s else s["d_a"] @ s["d_b"]
        update = 1.5 * np.kron(s["c"], d)
        close(merge(adapter, w, s), w + update)
        close(applied(adapter, x, w, s), x @ w + x @ update)


def test_lokr_factors_sides():
    """The largest divisor below the root, or below what is wanted."""
    of = lambda n, m, **options: {
        name: v.shape
        for name, v in lowrank.lokr(rank=1, **options).init(KEY, zeros((n, m))).items()
    }
    assert of(64, 6) == {"c": (8, 2), "d_a": (8, 1), "d_b": (1, 3)}
    assert of(12, 7, factor=6) == {"c": (6, 1), "d_a": (2, 1), "d_b": (1, 7)}
    assert of(12, 15, factor=5)["c"] == (3, 5)
    both = of(64, 64, decompose_both=True)
    assert both["c_a"] == both["d_a"] == (8, 1)


def test_loha_of_large_rank_is_the_same():
    """Past the rank where its factors cost more, the update is formed."""
    w, x = normal(0, 6, 8), normal(1, 3, 6)
    for rank in (1, 2, 4):
        adapter = lowrank.loha(rank=rank)
        s = off(adapter, w)
        update = (s["a1"] @ s["b1"]) * (s["a2"] @ s["b2"])
        close(applied(adapter, x, w, s), x @ (w + update))
        assert np.linalg.matrix_rank(update) == min(rank**2, 6)


def test_vera_and_randlora_share_their_projections():
    """Each leaf reads the front of what was drawn for the largest sides."""
    sizes = ((4, 9), (7, 3))
    for adapter in (lowrank.vera(rank=3), lowrank.randlora(rank=2)):
        drawn, again = (adapter.shared(jax.random.key(k), sizes) for k in (0, 1))
        assert drawn.keys() == set(adapter.fixed)
        jax.tree.map(np.testing.assert_array_equal, drawn, again)
        for n, m in sizes:
            own = off(adapter, normal(0, n, m)) | drawn
            assert merge(adapter, normal(0, n, m), own).shape == (n, m)
    vera = lowrank.vera(rank=3)
    w, s = zeros((7, 3)), {"d": normal(1, 3), "b": normal(2, 3)}
    shared = vera.shared(KEY, sizes)
    want = (shared["proj_a"][:7] * s["d"][None]) @ shared["proj_b"][:, :3]
    close(merge(vera, w, s | shared), want * s["b"][None])


def test_randlora_is_of_full_rank():
    w = zeros((6, 10))
    for bases in ("dense", "sparse", "very_sparse"):
        adapter = lowrank.randlora(rank=4, alpha=8, bases=bases, seed=3)
        s = off(adapter, w, (50, 40))
        assert s["lambda"].shape == (4, 2)
        a, b = s["basis_a"], s["basis_b"]
        np.testing.assert_allclose([a.std(), b.std()], 1, atol=0.02)
        if bases == "dense":
            want = 2 * sum(
                s["lambda"][p // 2, p % 2]
                * np.outer(b[:10, p // 4, p % 4], a[p // 2, :6] * s["gamma"][p % 2])
                for p in range(8)
            )
            close(merge(adapter, w, s), want.T)
            assert np.linalg.matrix_rank(want) == 6
        else:
            assert len(np.unique(b)) == 3


def test_vblora_mixes_k_vectors():
    """Exactly k weights, which sum to one, of the largest logits."""
    logits = normal(0, 2, 3, 7)
    weights, chosen = topk_weights(logits, 2)
    assert weights.shape == (2, 3, 2)
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(
        np.sort(chosen, -1), np.sort(np.argsort(logits, -1)[..., -2:], -1)
    )
    adapter = lowrank.vblora(rank=2, num_vectors=7, vector_length=2, topk=1)
    w = zeros((6, 4))
    s = off(adapter, w)
    of = lambda x: np.asarray(s["bank"])[np.argmax(x, -1)].reshape(2, -1)
    close(merge(adapter, w, s), of(s["logits_a"]).T @ of(s["logits_b"]))
    slope = slopes(adapter, w, s)
    assert (np.abs(slope["logits_a"]) == 0).all()  # of one vector, nothing is weighed
    assert np.abs(slope["bank"]).max() > 0


def test_fourierft_is_the_inverse_transform_of_a_sparse_spectrum():
    adapter, w = lowrank.fourierft(frequencies=5, scale=2.0), zeros((6, 4))
    s = {"c": normal(0, 5)}
    update = merge(adapter, w, s)
    spectrum = np.fft.fft2(update) / 2
    found = np.unique(np.abs(spectrum).round(5))
    assert (np.abs(spectrum) > 1e-5).sum() <= 10  # each, and its mirror image
    assert len(found) > 3
    rows, columns = np.divmod(torch_random(777).randperm(24, 5), 6)[::-1]
    full = np.zeros((6, 4))
    full[rows, columns] = s["c"]
    close(update, 2 * np.fft.ifft2(full).real)


@pytest.mark.parametrize("name", ["db1", "db2", "db5", "db10", "sym4", "sym9"])
def test_wavelets_are_orthogonal(name):
    """Even shifts of the two filters are an orthonormal basis; high ones vanish."""
    low, high = _waveft.synthesis_filters(name)
    order = int(name.strip("dbsym"))
    assert len(low) == 2 * order
    for shift in range(order):
        pair = lambda a, b, k=2 * shift: np.dot(a[k:], b[: len(b) - k])
        wanted = float(shift == 0)
        np.testing.assert_allclose(pair(low, low), wanted, atol=1e-10)
        np.testing.assert_allclose(pair(high, high), wanted, atol=1e-10)
        np.testing.assert_allclose(pair(low, high), 0, atol=1e-10)
    powers = np.arange(2 * order) / order
    for k in range(min(order, 4)):
        np.testing.assert_allclose(np.dot(high, powers**k), 0, atol=1e-7)


def test_haar_halves_of_one_coefficient():
    """One low coefficient is a square of four equal entries."""
    adapter, w = lowrank.waveft(frequencies=1, scale=1.0, seed=0), zeros((4, 4))
    update = np.asarray(merge(adapter, w, {"c": np.ones(1, np.float32)}))
    np.testing.assert_allclose(np.abs(update)[np.abs(update) > 0], 0.5, atol=1e-6)
    assert (np.abs(update) > 0).sum() == 4
    np.testing.assert_allclose(np.sum(update**2), 1, atol=1e-6)


def test_turned_blocks():
    x, blocks = normal(0, 3, 6), normal(1, 2, 3, 3)
    dense = jax.scipy.linalg.block_diag(*blocks)
    close(_structured.turned(x, blocks), x @ dense)
    shared = jax.scipy.linalg.block_diag(blocks[0], blocks[0])
    close(_structured.turned(x, blocks[:1]), x @ shared)


BAD = {
    "block_size=5 does not divide 12": lambda: lowrank.oft(block_size=5),
    "blocks=12 does not": lambda: lowrank.oft(blocks=12),
    "either block_size or blocks": lowrank.oft,
    "block_size=-1 and blocks=None": lambda: lowrank.boft(block_size=-1),
    "eps must be positive": lambda: lowrank.oft(blocks=2, eps=0.0),
    "factor must be positive": lambda: lowrank.lokr(rank=1, factor=0),
    "factors must be at least 1": lambda: lowrank.boft(blocks=2, factors=0),
    "factors=3 needs even blocks": lambda: lowrank.boft(block_size=2, factors=3),
    "frequencies must be at least 1": lambda: lowrank.fourierft(frequencies=0),
    "frequencies=99 is above": lambda: lowrank.waveft(frequencies=99),
    "rank 13 is above n": lambda: lowrank.hra(rank=13),
    "rank 9 is above min": lambda: lowrank.loha(rank=9),
    "terms must be at least 1": lambda: lowrank.oft(blocks=2, terms=0),
    "topk must be from 1 to 3": lambda: lowrank.vblora(rank=1, num_vectors=3, topk=4),
    "vector_length=5 does not": lambda: lowrank.vblora(rank=1, vector_length=5),
    "'odd' is none of dense": lambda: lowrank.randlora(rank=1, bases="odd"),
    "wavelet 'db11' is none": lambda: lowrank.waveft(frequencies=1, wavelet="db11"),
    "wavelet 'coif1' is none": lambda: lowrank.waveft(frequencies=1, wavelet="coif1"),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_option(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]().init(KEY, zeros((12, 8)))
