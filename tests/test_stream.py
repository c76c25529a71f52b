"""Streamed from disk, every merge is what it is in memory."""

import functools as ft
import inspect

from cases import MERGE
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlab import io, merge, tree
from jaxlab.io import _feed, _run


def makes_one(case):
    """Does a method make a model, or one task vector, of a stack of either?"""
    data = case.data("float32", 0)
    first = next(iter(inspect.signature(case.fn).parameters))
    if first not in ("deltas", "models") or len(data) != 1:
        return False
    out = jax.eval_shape(bound(case, key=True), *data)
    return jax.tree.leaves(out)[0].shape == (3, 8)


def bound(case, key=False):
    more = {"key": jax.random.key(0)} if case.random and key else {}
    return ft.partial(case.fn, **case.coefficients, **more)


WHOLE = {name: case for name, case in MERGE.items() if makes_one(case)}


def save_all(folder, stacked):
    paths = []
    for i, model in enumerate(tree.unstack(stacked)):
        io.save(folder / f"{i}.safetensors", model)
        paths.append(folder / f"{i}.safetensors")
    return paths


def small_blocks(monkeypatch):
    """Blocks of a few entries, so that small leaves are cut too."""
    monkeypatch.setattr(_feed, "BLOCK", 6)
    monkeypatch.setattr(_feed, "KEEP", 40)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_is_in_memory(name, dtype, tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    case = WHOLE[name]
    (data,) = case.data(dtype, 0)
    _run.stream(bound(case), save_all(tmp_path, data), tmp_path / "out")
    got = io.load(tmp_path / "out")
    want = bound(case, key=True)(jax.tree.map(tree.widen, data))
    tree.check_like(got, want)
    unit = 3e-7 if dtype == "float32" else 0  # a sum in another order

    def same(x, y):
        y = np.asarray(y.astype(dtype), np.float64)
        assert x.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=max(unit, 8e-3 if unit == 0 else 0),
            atol=unit * max(1, np.abs(y).max()),
        )  # fmt: skip
        assert unit or np.mean(np.asarray(x, np.float64) != y) < 0.05

    jax.tree.map(same, got, want)


@pytest.mark.parametrize("name", ["ties", "dare_linear", "breadcrumbs", "ram"])
def test_no_bit_depends_on_the_blocks(name, tmp_path, monkeypatch):
    case = WHOLE[name]
    paths = save_all(tmp_path, case.data("float32", 0)[0])
    _run.stream(bound(case), paths, tmp_path / "one")
    for block in (5, 8, 13):
        monkeypatch.setattr(_feed, "BLOCK", block)
        out = tmp_path / str(block)
        _run.stream(bound(case), paths, out)
        assert read(out) == read(tmp_path / "one")


def read(folder):
    return (folder / "model.safetensors").read_bytes()


def test_masks_depend_on_seed_and_path_alone(tmp_path):
    """Neither the order of the tensors nor their number moves a random draw."""
    case = MERGE["dare_linear"]
    data = case.data("float32", 0)[0]
    paths = save_all(tmp_path, data)
    _run.stream(bound(case), paths, tmp_path / "all")
    whole = io.load(tmp_path / "all")
    (tmp_path / "few").mkdir()
    part = {"b": {"c": data["b"]["c"]}}
    few = save_all(tmp_path / "few", part)
    _run.stream(bound(case), few, tmp_path / "few_out")
    alone = io.load(tmp_path / "few_out")
    np.testing.assert_array_equal(alone["b"]["c"], whole["b"]["c"])
    _run.stream(bound(case), paths, tmp_path / "other", seed=1)
    assert (io.load(tmp_path / "other")["a"] != whole["a"]).any()


def test_a_base_is_subtracted_and_added_in_float32(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    rng = np.random.default_rng(0)
    base = {"w": rng.standard_normal((5, 7)).astype(ml_dtypes.bfloat16)}
    models = [
        {
            "w": (base["w"] + 0.1 * rng.standard_normal((5, 7))).astype(
                ml_dtypes.bfloat16
            )
        }
        for _ in range(3)
    ]
    for name, model in zip(["base", "0", "1", "2"], [base, *models], strict=True):
        io.save(tmp_path / f"{name}.safetensors", model)
    method = ft.partial(merge.task_arithmetic, weights=np.array([0.5, 0.3, 0.4]))
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    _run.stream(method, paths, tmp_path / "out", base=tmp_path / "base.safetensors")
    exact = base["w"].astype("f8")
    for weight, model in zip([0.5, 0.3, 0.4], models, strict=True):
        exact = exact + weight * (model["w"].astype("f8") - base["w"].astype("f8"))
    got = np.asarray(io.load(tmp_path / "out")["w"])
    assert (got == exact.astype(ml_dtypes.bfloat16)).all()


def test_integers_pass_through_and_must_agree(tmp_path):
    one = {"w": np.ones(3, "f4"), "steps": np.arange(3)}
    two = {"w": np.zeros(3, "f4"), "steps": np.arange(3)}
    paths = save_trees(tmp_path, one, two)
    _run.stream(merge.linear, paths, tmp_path / "out")
    got = io.load(tmp_path / "out")
    np.testing.assert_array_equal(got["steps"], one["steps"])
    np.testing.assert_array_equal(got["w"], np.full(3, 0.5, "f4"))
    paths = save_trees(tmp_path, one, two | {"steps": np.arange(1, 4)})
    with pytest.raises(ValueError, match=r"1\.safetensors.*'steps'.*differs"):
        _run.stream(merge.linear, paths, tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def save_trees(folder, *trees):
    for i, t in enumerate(trees):
        io.save(folder / f"{i}.safetensors", t)
    return [folder / f"{i}.safetensors" for i in range(len(trees))]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"]
)
def test_non_finite_inputs_are_named(bad, dtype, tmp_path):
    if dtype == "float8_e4m3fn" and np.isinf(bad):
        bad = np.nan  # has no infinity
    x = np.ones((2, 3), "f4")
    x[1, 2] = bad
    paths = save_trees(
        tmp_path, {"w": np.ones((2, 3)).astype(dtype)}, {"w": x.astype(dtype)}
    )
    with pytest.raises(ValueError, match=r"1\.safetensors.*'w'.*\(1, 2\)"):
        _run.stream(merge.linear, paths, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    _run.stream(merge.linear, paths, tmp_path / "out", allow_nonfinite=True)
    assert not np.isfinite(np.asarray(io.load(tmp_path / "out")["w"], "f4")).all()


def test_finite_reads_every_narrow_float():
    for dtype in (
        "float16",
        "bfloat16",
        "float8_e5m2",
        "float8_e4m3fn",
        "float8_e4m3b11fnuz",
    ):
        info = ml_dtypes.finfo(dtype)
        fine = np.array([0, -1, float(info.max), float(info.min)]).astype(dtype)
        assert _feed.finite(fine)
        assert not _feed.finite(np.append(fine, np.array([np.nan]).astype(dtype)))


def test_models_that_do_not_fit_are_named(tmp_path):
    paths = save_trees(tmp_path, {"w": np.ones(3, "f4")}, {"w": np.ones(4, "f4")})
    with pytest.raises(ValueError, match=r"'w'.*\(4,\).*1\.safe.*\(3,\).*0\.safe"):
        _run.stream(merge.linear, paths, tmp_path / "out")
    paths = save_trees(tmp_path, {"w": np.ones(3, "f4")}, {"v": np.ones(3, "f4")})
    with pytest.raises(ValueError, match=r"1\.safetensors has no tensor 'w'|'v'"):
        _run.stream(merge.linear, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_dtypes_and_formats_merge(tmp_path):
    x = np.linspace(-1, 1, 12, dtype="f4").reshape(3, 4)
    io.save(tmp_path / "a.safetensors", {"m": {"w": x.astype(ml_dtypes.bfloat16)}})
    io.save(tmp_path / "b.npz", {"m": {"w": x}})
    io.save(tmp_path / "c.msgpack", {"m": {"w": jnp.asarray(2 * x)}})
    paths = [tmp_path / n for n in ("a.safetensors", "b.npz", "c.msgpack")]
    _run.stream(merge.linear, paths, tmp_path / "out", dtype="float32")
    want = (x.astype(ml_dtypes.bfloat16).astype("f8") + x + 2 * x) / 3
    np.testing.assert_allclose(io.load(tmp_path / "out")["m"]["w"], want, rtol=1e-6)


def test_float64_models_merge_in_float64(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 9))
    paths = save_trees(tmp_path, {"w": x[0]}, {"w": x[1]})
    _run.stream(merge.linear, paths, tmp_path / "out")
    with io.open(tmp_path / "out") as opened:
        got = opened.tensors["w"].read()
    np.testing.assert_allclose(got, x.mean(0), rtol=1e-15)


def test_a_streamed_merge_resumes(tmp_path):
    paths = save_trees(tmp_path, {"w": np.ones(3, "f4")}, {"w": np.zeros(3, "f4")})
    method = ft.partial(merge.linear, weights=np.array([1.0, 3.0]))
    _run.stream(method, paths, tmp_path / "out")
    same = ft.partial(merge.linear, weights=[1.0, 3.0])
    done = _run.stream(same, paths, tmp_path / "out", resume=True)
    assert "model.safetensors" in done.resumed
    other = ft.partial(merge.linear, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="name another output"):
        _run.stream(other, paths, tmp_path / "out", resume=True)
