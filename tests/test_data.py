"""Data sets by name, changes of images, and the frame of an experiment."""

from dataclasses import dataclass
import gzip
import json
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxlab import data, experiment, tree
from jaxlab.data import _local


def test_digits_are_embedded_and_their_split_is_disjoint_and_repeatable():
    one, again = data.load("digits"), data.load("digits")
    assert one.classes == 10
    assert len(one.train.y) + len(one.test.y) == 1797
    np.testing.assert_array_equal(one.train.x, again.train.x)
    assert one.train.x.min() == 0
    assert one.train.x.max() == 1
    other = data.load("digits", seed=1)
    assert not np.array_equal(one.train.y, other.train.y)
    key = lambda x: {r.tobytes() for r in x}
    both = key(one.train.x) & key(one.test.x)
    assert len(both) <= 2  # scans that are equal, not rows taken twice


def test_subsets_are_drawn_from_the_split():
    few = data.load("digits", train=50, test=20)
    assert len(few.train.y) == 50
    assert len(few.test.y) == 20
    whole = {r.tobytes() for r in data.load("digits").train.x}
    assert all(r.tobytes() in whole for r in few.train.x)


@pytest.mark.parametrize("name", _local.READERS)
def test_local_sets_have_images_in_range_and_every_class(name, data_folder):
    got = data.load(name, folder=data_folder)
    assert data.available(name, folder=data_folder)
    for split in (got.train, got.test):
        assert split.x.dtype == np.float32
        assert split.y.dtype == np.int32
        assert len(split.x) == len(split.y)
        assert 0 <= split.x.min() < split.x.max() <= 1
        assert set(split.y) == set(range(got.classes))


@pytest.fixture
def data_folder(request):
    return request.getfixturevalue("data")


def test_mnist_is_the_official_one(data_folder):
    got = data.load("mnist", folder=data_folder)
    assert np.bincount(got.test.y).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert got.train.x.shape == (60000, 28, 28)


def test_errors_name_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no data set 'minst'"):
        data.load("minst")
    monkeypatch.setenv("JAXLAB_DATA", str(tmp_path))
    assert not data.available("mnist")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        data.load("mnist")
    with pytest.raises(ValueError, match="no change 'blurr2'"):
        data.load("digits/blurr2")
    with pytest.raises(ValueError, match="severity from 1 to 5"):
        data.load("digits/blur9")


def test_tfds_sets_are_read_by_index(monkeypatch):
    """With a stand-in for the library, which is an optional dependency."""
    rows = [{"image": np.full((4, 4, 1), i, np.uint8), "label": i} for i in range(3)]
    builder = SimpleNamespace(
        download_and_prepare=lambda: None, as_data_source=lambda split: rows
    )
    fake = SimpleNamespace(builder=lambda name, file_format: builder)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    got = data.load("tfds:three/invert")
    assert got.train.x.shape == (3, 4, 4)
    assert got.test.y.tolist() == [0, 1, 2]
    np.testing.assert_allclose(got.train.x[1], 1 - 1 / 255)


def test_an_idx_file_that_is_cut_off_is_refused(tmp_path):
    header = b"\0\0\x08\x01" + (10).to_bytes(4, "big")
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + b"\1" * 9))
    with pytest.raises(ValueError, match="9 bytes, its header says"):
        _local.idx(tmp_path / "x.gz")
    (tmp_path / "y.gz").write_bytes(gzip.compress(b"hello"))
    with pytest.raises(ValueError, match="no idx file"):
        _local.idx(tmp_path / "y.gz")


@pytest.mark.parametrize("kind", data.CORRUPTIONS)
def test_corruption_grows_with_severity_and_is_repeatable(kind):
    x = ndimage.zoom(data.load("digits", train=64).train.x, (1, 3, 3), order=1)
    far = [np.abs(data.corrupt(x, f"{kind}{s}") - x).mean() for s in range(1, 6)]
    assert far[0] > 0
    assert np.all(np.diff(far) > 0)
    np.testing.assert_array_equal(
        data.corrupt(x, f"{kind}2"), data.corrupt(x, f"{kind}2")
    )


def test_changes_do_what_they_say():
    x = data.load("digits", train=8).train.x
    np.testing.assert_allclose(data.corrupt(data.corrupt(x, "invert"), "invert"), x)
    np.testing.assert_array_equal(data.corrupt(x, "flip"), x[:, :, ::-1])
    np.testing.assert_allclose(
        data.corrupt(x, "rotate90"), np.rot90(x, axes=(1, 2)), atol=1e-6
    )
    shuffled = data.corrupt(x, "permute1").reshape(8, -1)
    np.testing.assert_array_equal(np.sort(shuffled), np.sort(x.reshape(8, -1)))
    np.testing.assert_array_equal(
        data.corrupt(x, "permute1", seed=3).reshape(8, -1), shuffled
    )


def linear(params, x):
    return x.reshape(len(x), -1) @ params["w"] + params["b"][None]


def linear_loss(params, x, y):
    return experiment.cross_entropy(linear(params, x), y)


def test_fit_learns_and_repeats_itself():
    task = data.load("digits")
    start = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    run = lambda: experiment.fit(
        linear_loss, start, task.train, key=jax.random.key(0), steps=150, rate=1e-2
    )
    one = run()
    assert experiment.accuracy(linear, one, *task.test) > 0.9
    assert jnp.array_equal(one["w"], run()["w"])
    assert not jnp.any(start["w"])


def test_accuracy_counts():
    x = np.eye(10, dtype=np.float32)
    params = {"w": jnp.eye(10), "b": jnp.zeros(10)}
    y = np.array([0, 1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert experiment.accuracy(linear, params, x, y, batch=3) == 0.7
    assert math.isnan(experiment.accuracy(linear, params, x[:0], y[:0]))


def test_interval_is_students():
    mean, half = experiment.interval([0.0, 2.0])
    assert mean == 1
    assert half == pytest.approx(12.706, abs=1e-3)  # t(0.975, 1) * 1
    assert experiment.interval([3.0]) == (3.0, math.inf)


@dataclass(frozen=True)
class Config:
    size: int = 9
    smoke: bool = False


def test_a_run_is_recorded_and_a_smoke_run_is_not(tmp_path, monkeypatch, capsys):
    frame = lambda run: experiment.main(
        Config, run, smoke={"size": 1}, file=str(tmp_path / "x.py")
    )
    monkeypatch.setattr(sys, "argv", ["x", "--smoke"])
    assert frame(lambda c: {"size": c.size}) == {"size": 1}
    assert not (tmp_path / "results").exists()
    monkeypatch.setattr(sys, "argv", ["x", "--size", "4"])
    frame(lambda c: {"size": c.size})
    line = json.loads((tmp_path / "results" / "x.jsonl").read_text())
    assert line["metrics"] == {"size": 4}
    assert line["config"]["size"] == 4
    with pytest.raises(SystemExit, match="not finite: size"):
        frame(lambda _: {"size": math.nan})


def test_experts_beat_their_base_each_on_its_own_task():
    tasks = ("digits", "digits/rotate90", "digits/invert")
    got = experiment.experts(
        tasks, key=jax.random.key(0), width=32, steps=120, rate=3e-3
    )
    base = experiment.accuracies(got, got.base)
    models = tree.unstack(got.models)
    own = [experiment.accuracies(got, m)[i] for i, m in enumerate(models)]
    assert np.all(np.array(own) > base)
    assert got.heads["kernel"].shape == (3, 32, 10)
    x = jnp.asarray(got.data[1].test.x[:5])
    one, each = (got.apply(got.base, x, jnp.full(s, 1)) for s in ((), (5,)))
    np.testing.assert_allclose(one, each, rtol=1e-5, atol=1e-6)


def test_experts_need_tasks_of_one_size(data_folder, monkeypatch):
    monkeypatch.setenv("JAXLAB_DATA", str(data_folder))
    with pytest.raises(ValueError, match="tasks differ in size"):
        experiment.experts(("digits", "signs"), key=jax.random.key(0))


def test_a_setting_is_divided_and_goes_further():
    tasks, key = ("digits", "digits/invert"), jax.random.key(0)
    size = {"steps": 40, "rate": 3e-3}
    got = experiment.experts(tasks, key=key, width=16, **size)
    choose, report = experiment.held_out(got)
    for whole, a, b in zip(got.data, choose.data, report.data, strict=True):
        both = np.concatenate([a.test.y, b.test.y])
        assert sorted(both) == sorted(whole.test.y)
        np.testing.assert_array_equal(a.test.x, whole.test.x[::2])
        np.testing.assert_array_equal(b.test.x, whole.test.x[1::2])
    table = [experiment.accuracies(report, m) for m in tree.unstack(got.models)]
    np.testing.assert_array_equal(
        experiment.own(report, got.models), np.diagonal(table)
    )
    new = experiment.further(got, 200, key=key, **size)
    seen = experiment.examples(got, 200)
    assert experiment.loss(got, new.base, seen) < experiment.loss(got, got.base, seen)
    assert np.all(
        experiment.own(new, new.models) > experiment.accuracies(new, new.base)
    )
    assert new.heads is got.heads
    still = experiment.further(got, 200, key=key, steps=0)
    for model in [still.base, *tree.unstack(still.models)]:
        jax.tree.map(np.testing.assert_array_equal, model, got.base)
