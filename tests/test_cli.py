"""The command line: results, exit codes, and errors of one paragraph."""

import json
import os
from pathlib import Path
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import jaxlab
from jaxlab import _console, _tables, demo, io, recipe
from jaxlab.cli import app, reported


def run(*args: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def shell(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A real process, without a terminal."""
    command = [sys.executable, "-c", "from jaxlab.cli import main; main()"]
    return subprocess.run(
        [*command, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def one_paragraph(text: str) -> str:
    """The error, after a check that it is one line without a traceback."""
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


@pytest.fixture
def models(tmp_path):
    """Two checkpoints that differ by 1 in one layer of two."""
    w = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    a = {"layers": {"0": {"w": w}, "1": {"w": w + 1}}}
    b = {"layers": {"0": {"w": w}, "1": {"w": w + 2}}}
    io.save(tmp_path / "a.safetensors", a)
    io.save(tmp_path / "b.safetensors", b)
    return tmp_path


def test_version_and_help():
    assert run("--version").output == f"jaxlab {jaxlab.__version__}\n"
    text = run("--help").output
    for command in ("merge", "align", "inspect", "diff", "demo", "methods", "recipe"):
        assert command in text


def test_help_imports_neither_jax_nor_numpy():
    code = (
        "import sys, jaxlab.cli\n"
        "try: jaxlab.cli.app(['merge', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'numpy', 'flax', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_inspect_prints_a_table_and_json(models):
    table = run("inspect", models / "a.safetensors").output
    assert "layers.0.w" in table
    assert "6 x 4" in table
    assert "48 entries" in table
    found = json.loads(run("inspect", models / "a.safetensors", "--json").stdout)
    assert found["parameters"] == 48
    assert [t["name"] for t in found["tensors"]] == ["layers.0.w", "layers.1.w"]
    assert found["tensors"][0]["shape"] == [6, 4]
    assert found["nan"] == 0


def test_inspect_counts_nan_in_a_real_file(tmp_path):
    x = np.array([1, np.nan, np.inf, -np.inf, np.nan], np.float32)
    io.save(tmp_path / "x.safetensors", {"x": x})
    found = json.loads(run("inspect", tmp_path / "x.safetensors", "--json").stdout)
    assert (found["nan"], found["inf"]) == (2, 2)
    assert "2 NaN, 2 infinite" in run("inspect", tmp_path / "x.safetensors").output


def test_inspect_reads_every_format(tmp_path):
    tree = {"layer": {"w": jnp.arange(6.0).reshape(2, 3)}}
    norms = set()
    for name in ("a.safetensors", "a.npz", "a.msgpack", "folder"):
        io.save(tmp_path / name, tree)
        found = json.loads(run("inspect", tmp_path / name, "--json").stdout)
        norms.add((found["parameters"], round(found["norm"], 6)))
    assert norms == {(6, round(55**0.5, 6))}


def test_diff_prints_a_table_json_and_a_figure(models):
    a, b, plot = models / "a.safetensors", models / "b.safetensors", models / "d.png"
    table = run("diff", a, b, "--plot", plot).output
    assert "layers.1" in table
    assert "total" in table
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = json.loads(run("diff", a, b, "--json").stdout)
    still, moved = found["layers"]
    assert (still["delta"], still["rank"]) == (0, 0)
    np.testing.assert_allclose(moved["delta"], 24**0.5, rtol=1e-6)
    np.testing.assert_allclose(moved["rank"], 1, rtol=1e-4)


def test_diff_names_what_does_not_match(tmp_path):
    io.save(tmp_path / "a.npz", {"w": np.ones(2), "x": np.zeros(1), "s": np.ones(3)})
    io.save(tmp_path / "b.npz", {"w": np.ones(2), "s": np.ones(4), "y": np.ones(1)})
    result = run("diff", tmp_path / "a.npz", tmp_path / "b.npz")
    assert "only in a: x" in result.output
    assert "only in b: y" in result.output
    assert "mismatch: s: float64[3] in a, float64[4] in b" in result.output
    plot = tmp_path / "p.png"
    run("diff", tmp_path / "a.npz", tmp_path / "b.npz", "--plot", plot)
    assert plot.exists()


def test_json_has_no_infinity(tmp_path):
    io.save(tmp_path / "a.npz", {"w": np.zeros(2)})
    io.save(tmp_path / "b.npz", {"w": np.ones(2)})
    text = run("diff", tmp_path / "a.npz", tmp_path / "b.npz", "--json").stdout
    assert json.loads(text, parse_constant=pytest.fail)["total"]["relative"] is None


def test_methods_lists_every_public_method():
    rows = json.loads(run("methods", "--json").stdout)
    assert [r["name"] for r in rows] == sorted(recipe.names())
    for row in rows:
        assert row["summary"].endswith((".", ":")), row
        assert row["source"], f"{row['name']} has no References section"
    table = run("methods").output
    assert all(name in table for name in recipe.names())
    ties = next(r for r in rows if r["name"] == "merge.ties")
    assert "2306.01708" in ties["source"]
    assert "density" in ties["options"]


def test_source_takes_the_section_and_nothing_else():
    def method():
        """Does.

        References:
          Someone, 2020,
          "Title".

        Example:
          >>> 1
        """

    assert _tables.source(method) == 'Someone, 2020, "Title".'
    assert _tables.summary(method) == "Does."
    assert _tables.source(run) == ""


@pytest.mark.parametrize(
    "args",
    [
        ["inspect", "missing.safetensors"],
        ["diff", "missing", "missing"],
        ["merge", "missing.yaml", "out"],
        ["recipe", "convert", "missing.yaml"],
    ],
)
def test_bad_input_is_one_paragraph_and_exit_1(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "missing" in one_paragraph(run(*args, code=1).stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args",
    [
        ["inspect"],
        ["nonsense"],
        ["merge", "a"],
        ["merge", "a", "b", "--shard-size", "much"],
        ["demo", "--seed", "-1"],
        ["inspect", "a", "--nonsense"],
        ["recipe", "convert", "a", "--to", "other"],
    ],
)
def test_wrong_usage_is_exit_2(args):
    assert "Traceback" not in run(*args, code=2).stderr


def test_a_real_process_fails_with_one_paragraph(tmp_path):
    bad = tmp_path / "bad[red].safetensors"
    bad.write_bytes(b"\xff" * 40)
    done = shell("inspect", bad)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "bad[red].safetensors" in one_paragraph(done.stderr)
    done = shell("inspect", bad, "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "\nerror: " in done.stderr


def test_a_real_process_says_wrong_usage(tmp_path):
    assert shell("merge", "only-one").returncode == 2


def test_names_from_files_cannot_write_to_the_terminal(tmp_path):
    io.save(tmp_path / "a.safetensors", {"w\x1b[31m[bold]": np.ones(2)})
    out = run("inspect", tmp_path / "a.safetensors").output
    assert "\x1b" not in out
    assert r"w\x1b[31m[bold]" in out


def command(error: BaseException) -> typer.Typer:
    """A command line of one command, that fails."""
    one = typer.Typer()

    @one.command()
    @reported
    def merge() -> None:
        raise error

    return one


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("two\n\n  lines"), 1, "error: two lines\n"),
        (OSError(28, "No space left on device", "o"), 1, "o: No space left on device"),
        (FileNotFoundError("x does not exist"), 1, "error: x does not exist\n"),
        (MemoryError("8 GB"), 1, "not enough memory: 8 GB"),
        (KeyError("k"), 1, "fault of jaxlab, please report it: KeyError: 'k'"),
        (ValueError("\x1b[31m"), 1, "error: \\x1b[31m\n"),
        (ValueError(), 1, "error: ValueError\n"),
        (ValueError("[bold]a[/bold]"), 1, "error: [bold]a[/bold]\n"),
        (ValueError("x" * 10_000), 1, "xxx...\n"),
        (KeyboardInterrupt(), 130, "interrupted; no file is half written. The same"),
    ],
)
def test_every_error_is_one_paragraph(error, code, said):
    result = CliRunner().invoke(command(error), [])
    assert result.exit_code == code
    assert said in one_paragraph(result.stderr)
    result = CliRunner().invoke(command(error), ["--debug"])
    assert result.exit_code == code
    assert "Traceback" in result.stderr
    assert type(error).__name__ in result.stderr


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("5GB", 5e9),
        ("500 mb", 5e8),
        ("2GiB", 2**31),
        ("5e9", 5e9),
        ("7", 7),
        ("1k", 1e3),
    ],
)
def test_sizes(text, want):
    assert _console.size(text, option="--shard-size") == want


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "1e99", "1.2.3", "5 XB"])
def test_bad_sizes(text):
    with pytest.raises(typer.BadParameter, match="no size"):
        _console.size(text, option="--shard-size")


def test_amounts():
    said = [_tables.amount(n) for n in (0, 999, 1000, 5e9, 2e13)]
    assert said == ["0 B", "999 B", "1.0 kB", "5.0 GB", "20.00 TB"]


@pytest.fixture
def mean(models):
    """A recipe, in mergekit's form, for the mean of the two models."""
    file = models / "mean.yaml"
    file.write_text(
        "merge_method: linear\n"
        "models:\n"
        "- {model: a.safetensors, parameters: {weight: 1}}\n"
        "- {model: b.safetensors, parameters: {weight: 1}}\n"
        "dtype: float32\n"
    )
    return file


def test_merge_by_recipe(mean):
    out = mean.with_name("[red]out")
    report = run("merge", mean, out).output
    assert "[red]out" in report
    rows = [line.split() for line in report.splitlines()]
    assert ["tensors", "2"] in rows
    assert ["read", "384", "B"] in rows
    assert ["written", "192", "B"] in rows
    a, b = (io.load(mean.with_name(f"{x}.safetensors")) for x in "ab")
    merged = io.load(out)["layers"]
    np.testing.assert_allclose(merged["0"]["w"], a["layers"]["0"]["w"])
    want = (a["layers"]["1"]["w"] + b["layers"]["1"]["w"]) / 2
    np.testing.assert_allclose(merged["1"]["w"], want, rtol=1e-6)
    taken = run("merge", mean, out, code=1)
    assert "out" in one_paragraph(taken.stderr)
    assert run("merge", mean, out, "--resume", "--quiet").output == ""


def test_merge_in_shards(mean):
    out = mean.with_name("out")
    run("merge", mean, out, "--shard-size", "100B", "--quiet")
    assert len(list(out.glob("*.safetensors"))) == 2
    assert len(io.load(out)["layers"]) == 2


def test_dry_run_says_the_plan_and_writes_nothing(mean):
    before = sorted(mean.parent.iterdir())
    plan = run("merge", mean, mean.with_name("out"), "--dry-run").output
    assert "plan" in plan
    assert "peak memory" in plan
    assert "384 B" in plan  # two models of 48 float32
    assert sorted(mean.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"0": {"w": np.ones((6, 4), np.float32)}}, "layers.1.w"),
        ({n: {"w": np.ones((5, 4), np.float32)} for n in "01"}, "layers.0.w"),
    ],
)
def test_dry_run_names_what_does_not_fit(mean, other, named):
    io.save(mean.with_name("b.safetensors"), {"layers": other})
    result = run("merge", mean, mean.with_name("out"), "--dry-run", code=1)
    assert named in result.stdout
    assert "nothing was written" in one_paragraph(result.stderr)
    error = one_paragraph(run("merge", mean, mean.with_name("out"), code=1).stderr)
    assert named in error
    assert "b.safetensors" in error
    assert not mean.with_name("out").exists()


def test_nonfinite_input_is_named_and_can_be_allowed(mean):
    io.save(
        mean.with_name("b.safetensors"),
        {"layers": {n: {"w": np.full((6, 4), np.nan, np.float32)} for n in "01"}},
    )
    result = run("merge", mean, mean.with_name("out"), code=1)
    assert "layers.0.w" in one_paragraph(result.stderr)
    assert not mean.with_name("out").exists()
    run("merge", mean, mean.with_name("out"), "--allow-nonfinite")
    found = json.loads(run("inspect", mean.with_name("out"), "--json").stdout)
    assert found["nan"] == 48


def test_a_bad_recipe_names_file_line_and_nearest_word(mean):
    mean.write_text(mean.read_text().replace("linear", "lineer"))
    error = one_paragraph(run("merge", mean, mean.with_name("out"), code=1).stderr)
    assert "mean.yaml:1" in error
    assert "linear" in error


def test_convert_there_and_back(mean):
    own = run("recipe", "convert", mean).stdout
    assert "use: merge.linear" in own
    ours, back = mean.with_name("ours.yaml"), mean.with_name("back.yaml")
    run("recipe", "convert", mean, ours)
    assert ours.read_text() == own
    run("recipe", "convert", ours, back)
    assert "merge_method: linear" in back.read_text()
    assert recipe.load(back) == recipe.load(ours) == recipe.load(mean)
    again = run("recipe", "convert", mean, "--to", "mergekit").stdout
    assert "merge_method: linear" in again
    taken = run("recipe", "convert", mean, ours, code=1)
    assert "ours.yaml exists" in one_paragraph(taken.stderr)
    assert ours.read_text() == own


def test_control_c_says_how_to_go_on(tmp_path):
    code = (
        "import sys, time, jaxlab.cli\n"
        "from jaxlab import io\n"
        "def merge(*_, **__):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "io.merge = merge\n"
        "jaxlab.cli.app(['merge', 'recipe', 'out'])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume goes on" in one_paragraph(error)


def test_demo_prints_the_table(tmp_path, monkeypatch):
    accuracy = {"base": [1.0, 0.25], "bold": [0.5, 0.75], "ties": [0.875, 0.5]}
    found = demo.Results(
        tasks=["plain", "bold"],
        experts=["bold"],
        accuracy={m: np.array(a) for m, a in accuracy.items()},
        recipes={"ties": ""},
        steps=np.zeros(1),
        paths={},
        conflicts=[],
        samples=np.zeros((2, 10, 8, 8)),
        tested=8,
        seed=3,
        seconds={},
    )
    asked = []

    def fake(out, *, seed, say):
        asked.append((out, seed))
        say("a phase")
        return found

    monkeypatch.setattr(demo, "run", fake)
    text = run("demo", "--out", tmp_path / "here", "--seed", 3).stdout
    assert asked == [(tmp_path / "here", 3)]
    rows = [line.split() for line in text.splitlines()]
    assert ["base", "100.0", "25.0", "62.5"] in rows
    assert ["expert:", "bold", "50.0", "75.0", "62.5"] in rows
    assert ["ties", "87.5", "50.0", "68.8"] in rows
    assert str(tmp_path / "here" / "index.html") in text


def test_demo_refuses_a_folder_of_yours(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    error = run("demo", "--out", tmp_path, "--quiet", code=1).stderr
    assert "not an earlier" in one_paragraph(error)
    assert (tmp_path / "thesis.tex").exists()
