"""The demo at a small size: what it claims, what it writes, what it replaces."""

import json
import re

import jax
import numpy as np
import pytest

from jaxlab import demo, io
from jaxlab.demo import _measure, _publish, _recipes, _tasks

SMALL = demo.Settings(
    width=64,
    base_steps=300,
    expert_steps=120,
    methods=("linear", "task_arithmetic", "slerp"),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One small run, its folder and the phases it announced."""
    out, said = tmp_path_factory.mktemp("demo") / "demo", []
    return demo.run(out, settings=SMALL, say=said.append), out, said


def test_every_expert_beats_the_base_on_its_own_task(done):
    results = done[0]
    for column, task in enumerate(results.tasks):
        if task != "plain":
            own, base = results.accuracy[task][column], results.accuracy["base"][column]
            assert own > base + 0.1, task


def test_a_merge_beats_the_base_on_the_mean(done):
    results = done[0]
    assert results.mean(results.merges[0]) > results.mean("base") + 0.05


def test_experts_are_better_at_home(done):
    results = done[0]
    own, others = results.at_home()
    table = [[results.accuracy[e][results.tasks.index(t)] for t in results.experts]
             for e in results.experts]  # fmt: skip
    assert own == pytest.approx(np.trace(table) / 4)
    assert others == pytest.approx((np.sum(table) - np.trace(table)) / 12)
    assert own > others + 0.2


def test_the_paths_pass_through_base_and_merge(done):
    results = done[0]
    zero, one = (int(np.flatnonzero(results.steps == s)[0]) for s in (0, 1))
    for method in results.merges:
        path = results.paths[method]
        # A test image may sit on a boundary, where rounding tips it.
        np.testing.assert_allclose(path[zero], results.accuracy["base"], atol=0.004)
        np.testing.assert_allclose(path[one], results.accuracy[method], atol=0.004)


def test_linear_is_the_mean_of_the_saved_experts(done):
    _, out, _ = done
    experts = [io.load(out / "experts" / name) for name in _tasks.SHIFTS]
    merged = io.load(out / "merged" / "linear")
    want = jax.tree.map(lambda *xs: np.mean(xs, 0), *experts)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, want)


def test_the_folder_is_whole(done):
    results, out, said = done
    for name in ("tasks", "accuracy", "path", "conflicts"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {p.stem for p in (out / "recipes").iterdir()} == set(SMALL.methods)
    numbers = json.loads((out / "results.json").read_text())
    assert numbers["accuracy"]["base"] == results.accuracy["base"].tolist()
    assert len(said) == demo.phases(SMALL)
    assert [p.name for p in out.parent.iterdir()] == ["demo"]


def test_the_page_needs_no_other_file(done):
    results, out, _ = done
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    best = results.merges[0]
    assert f"{results.mean(best):.1%}" in page
    assert all(f"<summary>{m}</summary>" in page for m in SMALL.methods)


def test_a_new_demo_replaces_an_old_one(tmp_path):
    out = tmp_path / "demo"
    for number in (1, 2):
        with _publish.replacing(out) as folder:
            (folder / "results.json").write_text(json.dumps({"made_by": "jaxlab demo"}))
            (folder / "number").write_text(str(number))
    assert (out / "number").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


def test_a_failed_demo_leaves_the_old_one(tmp_path):
    out = tmp_path / "demo"
    with _publish.replacing(out) as folder:
        (folder / "results.json").write_text(json.dumps({"made_by": "jaxlab demo"}))
    with pytest.raises(KeyboardInterrupt), _publish.replacing(out):
        raise KeyboardInterrupt
    assert (out / "results.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("content", ["{}", "no json", "[]", '{"made_by": "me"}'])
def test_a_demo_never_replaces_anything_else(tmp_path, content):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "results.json").write_text(content)
    with pytest.raises(ValueError, match="precious holds files"):
        demo.run(out, settings=SMALL)
    assert (out / "results.json").read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_a_demo_does_not_replace_a_file_or_a_link(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with (
            pytest.raises(ValueError, match="not a folder"),
            _publish.replacing(tmp_path / name),
        ):
            pass


def test_an_unknown_method_is_named(tmp_path):
    with pytest.raises(ValueError, match="'tyes'"):
        demo.run(tmp_path / "demo", settings=demo.Settings(methods=("tyes",)))
    assert not list(tmp_path.iterdir())


def test_tasks_share_one_split_and_are_images():
    tasks = _tasks.load(seed=0)
    assert list(tasks) == ["plain", "tilted", "striped", "shaded", "bold"]
    for task in tasks.values():
        assert task.x_train.shape == (1258, 64)
        assert task.x_test.shape == (539, 64)
        assert 0 <= task.x_train.min() <= task.x_train.max() <= 1
        np.testing.assert_array_equal(task.y_test, tasks["plain"].y_test)
    again, other = _tasks.load(seed=0), _tasks.load(seed=1)
    np.testing.assert_array_equal(again["bold"].x_test, tasks["bold"].x_test)
    assert (other["bold"].x_test != tasks["bold"].x_test).any()


def test_conflicts_are_those_of_a_table_made_by_hand():
    deltas = {"w": np.array([[[3.0, -1, 2, 0.1, 5]], [[2.0, 1, -1, 0.1, -4]]])}
    (one,) = _measure.conflicts(deltas)
    assert one.every == pytest.approx([3 / 5])  # entries 1, 2 and 4
    assert one.large == pytest.approx([1.0])  # the largest of both is entry 4


def test_at_least_eight_methods_have_a_recipe():
    assert len(demo.Settings().methods) >= 8
    recipes = _recipes.recipes(list(_tasks.SHIFTS))
    assert set(recipes) == set(demo.Settings().methods)
