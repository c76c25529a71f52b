"""`inspect` and `diff` against numpy and closed forms."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxlab.io import _diff, _rank, _report
from jaxlab.io._checkpoint import Checkpoint, Tensor


def checkpoint(name="a", **arrays) -> Checkpoint:
    """A checkpoint of arrays in memory."""

    def tensor(key, x):
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)

        def fill(buffer, first):
            buffer[:] = raw[first : first + buffer.size]

        return Tensor(key, x.shape, x.dtype, Path(name), fill)

    tensors = {k: tensor(k, np.asarray(x)) for k, x in arrays.items()}
    return Checkpoint(Path(name), "npz", tensors, {})


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that every test crosses several."""
    monkeypatch.setattr(_report, "BLOCK", 7)
    monkeypatch.setattr(_diff, "BLOCK", 7)
    monkeypatch.setattr(_rank, "BLOCK", 40)


@pytest.mark.parametrize(
    "dtype",
    [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn],
)
def test_inspect_agrees_with_numpy(dtype):
    w, b = draw(11, 9, dtype=dtype), draw(5, seed=1, dtype=dtype)
    w[0, :3] = 0
    got = _report.inspect(checkpoint(w=w, b=b))
    wide = w.astype(np.float64)
    assert [t.name for t in got.tensors] == ["b", "w"]
    first = got.tensors[1]
    assert first.shape == (11, 9)
    assert first.dtype == np.dtype(dtype).name
    np.testing.assert_allclose(first.norm, np.linalg.norm(wide), rtol=1e-14)
    assert (first.min, first.max) == (wide.min(), wide.max())
    assert first.zeros == (wide == 0).sum()
    assert got.parameters == 104
    assert got.bytes == 104 * np.dtype(dtype).itemsize
    assert got.dtypes == {np.dtype(dtype).name: 104}
    both = np.concatenate([wide.ravel(), b.astype(np.float64)])
    np.testing.assert_allclose(got.norm, np.linalg.norm(both), rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_inspect_counts_nan_and_infinity(dtype):
    x = np.ones(50, dtype)
    x[[3, 20, 49]] = np.nan
    x[[4, 30]] = np.inf
    x[5] = -np.inf
    t = _report.inspect(checkpoint(x=x)).tensors[0]
    assert (t.nan, t.inf) == (3, 3)
    np.testing.assert_allclose(t.norm, np.sqrt(44), rtol=1e-14)
    assert (t.min, t.max) == (1.0, 1.0)


def test_inspect_of_integers_bools_complex_and_empty():
    got = _report.inspect(
        checkpoint(
            i=np.array([3, -4]),
            t=np.array([True, False]),
            c=np.array([3 + 4j], np.complex64),
            e=np.zeros((0, 3), np.float32),
            s=np.float32(-2.0),
            n=np.full(2, np.nan, np.float32),
        )
    )
    c, e, i, n, s, t = got.tensors
    assert (i.norm, i.min, i.max) == (5.0, -4.0, 3.0)
    assert (t.norm, t.zeros) == (1.0, 1)
    assert c.norm == 5.0
    assert (e.norm, e.min, e.max) == (0.0, 0.0, 0.0)
    assert (s.norm, s.shape) == (2.0, ())
    assert (n.norm, n.min, n.max, n.nan) == (0.0, 0.0, 0.0, 2)


def test_layer_ten_comes_after_layer_two():
    names = ["layers.10.w", "layers.2.w", "layers.2.b", "head"]
    got = _report.inspect(checkpoint(**{n: draw(1) for n in names}))
    want = ["head", "layers.2.b", "layers.2.w", "layers.10.w"]
    assert [t.name for t in got.tensors] == want


def test_inspect_reports_every_byte_it_reads():
    seen = []
    c = checkpoint(
        w=draw(10, 10), b=draw(3, dtype=np.float16), c=np.ones(9, np.complex64)
    )
    _report.inspect(c, advance=seen.append)
    assert sum(seen) == c.nbytes
    assert len(seen) > 10


def test_diff_agrees_with_numpy():
    a, b = draw(12, 8), draw(12, 8, seed=1)
    got = _diff.diff(checkpoint(w=a), checkpoint(w=b)).tensors[0]
    a, b = a.astype(np.float64), b.astype(np.float64)
    na, nb, nd = np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(b - a)
    np.testing.assert_allclose(
        [got.norm, got.delta, got.relative, got.cosine, got.conflict, got.largest],
        [
            na,
            nd,
            nd / na,
            (a * b).sum() / na / nb,
            (a * b < 0).mean(),
            abs(b - a).max(),
        ],
        rtol=1e-13,
    )
    sigma = np.linalg.svd(b - a, compute_uv=False)
    p = sigma / sigma.sum()
    np.testing.assert_allclose(got.rank, np.exp(-(p * np.log(p)).sum()), rtol=1e-10)


def test_diff_of_a_model_with_itself_is_nothing():
    c = checkpoint(w=draw(4, 6), zero=np.zeros(3, np.float32))
    got = _diff.diff(c, c)
    for t in (*got.tensors, *got.layers, got.total):
        assert (t.delta, t.relative, t.conflict, t.largest) == (0, 0, 0, 0)
    assert got.tensors[0].cosine == pytest.approx(1)
    assert got.tensors[0].rank == 0
    assert got.tensors[1].cosine == 0


def test_diff_known_signs_and_zeros():
    a = np.array([1, -1, 0, 2, 0], np.float32)
    b = np.array([-1, -1, 5, 0, 0], np.float32)
    t = _diff.diff(checkpoint(w=a), checkpoint(w=b)).tensors[0]
    assert t.conflict == 1 / 5  # a zero is against nobody
    assert t.rank is None  # not a matrix
    zero = _diff.diff(checkpoint(w=a * 0), checkpoint(w=b)).tensors[0]
    assert zero.relative == np.inf


def test_diff_leaves_out_what_is_not_finite():
    a, b = np.ones((4, 4), np.float32), np.full((4, 4), 3, np.float32)
    a[0, 0], b[1, 1], b[2, 2] = np.nan, np.inf, np.nan
    a[1, 1] = np.inf
    t = _diff.diff(checkpoint(w=a), checkpoint(w=b)).tensors[0]
    assert (t.nonfinite, t.entries) == (3, 13)
    np.testing.assert_allclose([t.delta, t.norm], [2 * 13**0.5, 13**0.5], rtol=1e-14)
    assert np.isfinite(t.rank)


def test_diff_groups_layers_and_names_what_does_not_match():
    names = ["model.embed.weight", "model.layers.0.q.weight", "model.layers.0.k.weight"]
    a = {n: draw(4, 4, seed=i) for i, n in enumerate([*names, "head.weight", "gone"])}
    b = {n: x + 1 for n, x in a.items() if n != "gone"}
    b["head.weight"], b["new"] = b["head.weight"][:2], draw(1)
    got = _diff.diff(checkpoint(**a), checkpoint("b", **b))
    assert [x.name for x in got.layers] == ["model.embed", "model.layers.0"]
    assert (got.only_a, got.only_b) == (("gone",), ("new",))
    assert got.mismatched == ("head.weight: float32[4, 4] in a, float32[2, 4] in b",)
    one = got.layers[1]
    np.testing.assert_allclose(one.delta, 32**0.5, rtol=1e-7)
    old = np.concatenate([a[n].ravel() for n in names[1:]]).astype(np.float64)
    new = np.concatenate([b[n].ravel() for n in names[1:]]).astype(np.float64)
    cos = old @ new / np.linalg.norm(old) / np.linalg.norm(new)
    np.testing.assert_allclose(one.cosine, cos, rtol=1e-12)
    assert one.rank == pytest.approx(1, abs=1e-3)  # + 1 has rank one, up to rounding
    assert got.total.entries == 48


def test_diff_matches_slashes_with_dots():
    w = draw(2, 2)
    got = _diff.diff(checkpoint(**{"a/w": w}), checkpoint(**{"a.w": w}))
    assert len(got.tensors) == 1
    clash = checkpoint(**{"a/w": w, "a.w": w})
    assert len(_diff.diff(clash, clash).tensors) == 2


@pytest.mark.parametrize("rank_side", [0, 3, 9])
@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (3, 30)])
def test_diff_reports_the_bytes_that_it_says_it_will(shape, rank_side):
    seen = []
    a, b = checkpoint(w=draw(*shape), v=draw(5)), checkpoint(w=draw(*shape), x=draw(2))
    _diff.diff(a, b, rank_side=rank_side, advance=seen.append)
    assert sum(seen) == _diff.work(a, b, rank_side=rank_side) > 0


def test_diff_of_complex_and_real_is_a_mismatch():
    got = _diff.diff(
        checkpoint(w=np.ones((2, 2), np.complex64)), checkpoint(w=draw(2, 2))
    )
    assert got.mismatched == ("w: complex64[2, 2] in a, float32[2, 2] in b",)


@pytest.mark.parametrize(("rows", "columns"), [(30, 12), (12, 30), (9, 9), (1, 50)])
@pytest.mark.parametrize("rank", [1, 3])
def test_effective_rank_of_equal_singular_values_is_the_rank(rows, columns, rank):
    rank = min(rank, rows, columns)
    u = np.linalg.qr(draw(rows, rows, dtype=np.float64))[0][:, :rank]
    v = np.linalg.qr(draw(columns, columns, seed=1, dtype=np.float64))[0][:, :rank]
    d = 5 * u @ v.T
    got = _rank.effective_rank(lambda low, high: d[low:high], rows, columns)
    assert got == pytest.approx(rank, rel=1e-7)


def test_effective_rank_closed_form():
    d = np.diag([3.0, 1.0, 0.0])
    want = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    got = _rank.effective_rank(lambda low, high: d[low:high], 3, 3)
    assert got == pytest.approx(want, rel=1e-12)
    zero = np.zeros((3, 3))
    assert _rank.effective_rank(lambda low, high: zero[low:high], 3, 3) == 0
    assert _rank.effective_rank(lambda low, high: zero[low:high], 0, 3) == 0


def test_rank_side_bounds_the_work():
    a, b = checkpoint(w=draw(6, 5)), checkpoint(w=draw(6, 5, seed=1))
    assert _diff.diff(a, b, rank_side=4).tensors[0].rank is None
    assert _diff.diff(a, b, rank_side=4).total.rank is None
    assert 1 <= _diff.diff(a, b, rank_side=5).tensors[0].rank <= 5


@pytest.mark.parametrize(
    ("shape", "want"),
    [((3, 3, 64, 128), (576, 128)), ((128, 64, 3, 3), (128, 576)), ((5,), (1, 5))],
)
def test_square_splits_where_the_smaller_side_is_largest(shape, want):
    assert _diff.square(shape) == want


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("model.layers.10.mlp.up.weight", "model.layers.10"),
        ("block_0/attn/kernel", "block_0"),
        ("lm_head.weight", "lm_head"),
        ("weight", "weight"),
        ("layers.0", "layers"),
    ],
)
def test_layer_names(name, want):
    assert _diff.layer(name) == want
