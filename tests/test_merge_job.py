"""`io.merge` from recipe to folder: killed, rivalled, resumed, refused."""

import errno
import json
import os
from pathlib import Path
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from corpus.reading import listing
from crash_states import crash_states
import numpy as np
import pytest
import yaml

from jaxlab import io
from jaxlab.io import _job, _safetensors
from jaxlab.io._shards import verify

RUN = """
import os, sys
sync, left_out = os.fsync, sys.argv[3]
os.fsync = lambda fd: None if left_out == "all" else sync(fd)
from jaxlab import io
print("go", flush=True)
io.merge(sys.argv[1], sys.argv[2], shard_size=40_000, seed=3, resume=True)
"""


def make(folder: Path, tensors: int = 40, size: int = 2000) -> Path:
    """Three small models and a random, trimmed merge of them."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    base = {f"t{i:03d}": rng.standard_normal(size).astype("f4") for i in range(tensors)}
    for name in ("base", "a", "b"):
        (folder / name).mkdir()
        model = {
            k: v
            + (0 if name == "base" else 0.1 * rng.standard_normal(size).astype("f4"))
            for k, v in base.items()
        }
        io.save(folder / name / "model.safetensors", model)
        (folder / name / "config.json").write_text('{"model_type": "toy"}')
        (folder / name / "tokenizer.json").write_text(json.dumps({"name": name}))
    spec = {
        "merge_method": "dare_ties",
        "base_model": "base",
        "dtype": "float32",
        "models": [
            {"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in "ab"
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(spec))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("toy"))


def command(recipe: Path, out: Path, left_out: str = "none") -> list[str]:
    return [sys.executable, "-B", "-c", RUN, str(recipe), str(out), left_out]


def merged(recipe: Path, out: Path, **more):
    return io.merge(recipe, out, shard_size=40_000, seed=3, **more)


def test_a_merge_is_a_model_folder(toy, tmp_path):
    report = merged(toy, tmp_path / "out")
    files = set(os.listdir(tmp_path / "out"))
    assert files == set(report.files)
    assert {"config.json", "tokenizer.json", "jaxlab_manifest.json"} <= files
    assert json.loads((tmp_path / "out/tokenizer.json").read_text())["name"] == "base"
    verify(tmp_path / "out")
    with io.open(tmp_path / "out") as opened:
        assert list(opened.tensors) == [f"t{i:03d}" for i in range(40)]
        assert report.tensors == 40
        assert report.bytes_out == opened.nbytes
    assert not list(tmp_path.glob(".*"))
    again = merged(toy, tmp_path / "again")
    assert listing(tmp_path / "out") == listing(tmp_path / "again")
    assert again.resumed == ()
    other = io.merge(toy, tmp_path / "other", shard_size=40_000, seed=4)
    assert other.files == report.files
    name = "model-00001-of-00008.safetensors"
    assert listing(tmp_path / "other")[name] != listing(tmp_path / "out")[name]


def test_a_dry_run_writes_nothing(toy, tmp_path):
    report = merged(toy, tmp_path / "out", dry_run=True)
    assert report.tensors == 40
    assert report.bytes_in == 3 * report.bytes_out == 3 * 40 * 2000 * 4
    assert 0 < report.peak_memory < 256e6
    assert not os.listdir(tmp_path)


def test_a_dry_run_names_everything_that_does_not_fit(tmp_path):
    recipe = make(tmp_path / "toy", tensors=4)
    model = tmp_path / "toy/b/model.safetensors"
    held = {k: np.asarray(v) for k, v in io.load(model).items()}
    held["t000"], held["more"] = held["t000"][:-1], held.pop("t002")
    io.save(model, held)
    report = merged(recipe, tmp_path / "out", dry_run=True)
    text = "; ".join(report.problems)
    for words in ("no tensor 't002'", "no tensor 'more'", "'t000' is (1999,)"):
        assert words in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"t000|t002|more"):
        merged(recipe, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_kill_at_twenty_moments_then_resume(toy, tmp_path):
    """SIGKILL anywhere; the resumed result is the same to the bit."""
    merged(toy, tmp_path / "want")
    want = listing(tmp_path / "want")
    out, staging = tmp_path / "out", tmp_path / ".out.partial"
    chance = random.Random(0)
    kills, shards = 0, set()
    for _ in range(20):
        with subprocess.Popen(command(toy, out), stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()  # imports are done
            wanted, patience = chance.randrange(7), time.time() + chance.uniform(0, 3)
            while child.poll() is None and time.time() < patience:
                if len(list(staging.glob("*.safetensors"))) > wanted:
                    break
            time.sleep(chance.uniform(0, 0.02))
            kills += child.poll() is None
            child.kill()
        assert not out.exists() or listing(out) == want
        found = len(list(staging.glob("*.safetensors")))
        shards.add(8 if out.exists() else found)
        if out.exists():  # it got through
            shutil.rmtree(out)
        elif found > 3:  # begin anew, to be cut off early again
            shutil.rmtree(staging)
    assert kills >= 10
    assert len(shards) >= 3  # it was cut off in different places
    subprocess.run(command(toy, out), check=True)
    assert listing(out) == want
    assert not staging.exists()


def test_resume_takes_finished_shards_as_they_are(toy, tmp_path, monkeypatch):
    merged(toy, tmp_path / "want")
    stop_after(monkeypatch, 3)
    with pytest.raises(OSError, match="No space left") as caught:
        merged(toy, tmp_path / "out")
    assert "3 files are finished" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unfinished run: resume it"):
        merged(toy, tmp_path / "out")
    with pytest.raises(ValueError, match="other inputs, recipe, seed"):
        io.merge(toy, tmp_path / "out", shard_size=40_000, seed=9, resume=True)
    shard = next(iter(sorted((tmp_path / ".out.partial").glob("*.safetensors"))))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)  # a flipped bit is found by its checksum
    report = merged(toy, tmp_path / "out", resume=True)
    assert len(report.resumed) == 2
    assert listing(tmp_path / "out") == listing(tmp_path / "want")
    done = merged(toy, tmp_path / "out", resume=True)
    assert set(done.resumed) | {"jaxlab_manifest.json"} == set(done.files)


def stop_after(monkeypatch, shards: int) -> None:
    """A disk that is full after some shards."""
    left = iter(range(shards))
    whole = _safetensors.safetensors_writer

    def writer(*args):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return whole(*args)

    monkeypatch.setattr(_job, "safetensors_writer", writer)


def test_a_disk_full_from_the_start_leaves_nothing(toy, tmp_path, monkeypatch):
    stop_after(monkeypatch, 0)
    with pytest.raises(OSError, match="No space left"):
        merged(toy, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_interrupt_then_resume(toy, tmp_path):
    out = tmp_path / "out"
    script = "from jaxlab.cli import main; main()"
    args = ["merge", str(toy), str(out), "--shard-size", "40KB", "--seed", "3"]
    child = subprocess.Popen(
        [sys.executable, "-c", script, *args], stderr=subprocess.PIPE, text=True
    )
    while (
        not list(tmp_path.glob(".out.partial/*.safetensors")) and child.poll() is None
    ):
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    if child.returncode:  # it may have been through already
        assert child.returncode == 130
        assert "--resume" in said
        assert "Traceback" not in said
        assert not out.exists()
    subprocess.run([sys.executable, "-c", script, *args, "--resume"], check=True)
    merged(toy, tmp_path / "want")
    assert listing(out) == listing(tmp_path / "want")


def test_a_second_writer_is_refused(toy, tmp_path):
    out, staging = tmp_path / "out", tmp_path / ".out.partial"
    child = subprocess.Popen(command(toy, out), stdout=subprocess.DEVNULL)
    while not list(staging.glob("*.safetensors")) and child.poll() is None:
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGSTOP)
    try:
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing"):
                merged(toy, out, resume=resume)
    finally:
        os.kill(child.pid, signal.SIGCONT)
    assert child.wait(60) == 0
    verify(out)


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_taken_target_stays_as_it_was(taken, toy, tmp_path):
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(ValueError, match="name another output"):
        merged(toy, out)
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(
        ["out"] if taken == "file" else ["out", "mine"]
    )


def test_an_empty_target_is_taken(toy, tmp_path):
    (tmp_path / "out").mkdir()
    merged(toy, tmp_path / "out")
    verify(tmp_path / "out")


def test_changed_inputs_are_not_resumed(tmp_path, monkeypatch):
    recipe = make(tmp_path / "toy")
    stop_after(monkeypatch, 2)
    with pytest.raises(OSError, match="No space left"):
        merged(recipe, tmp_path / "out")
    monkeypatch.undo()
    model = tmp_path / "toy/a/model.safetensors"
    io.save(model, {k: v * 2 for k, v in io.load(model).items()})
    with pytest.raises(ValueError, match="other inputs"):
        merged(recipe, tmp_path / "out", resume=True)


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-o", os.devnull, "true"], check=False).returncode
    != 0,
    reason="needs strace, and leave to trace",
)


@needs_strace
def test_no_crash_leaves_half_a_merge(tmp_path):
    recipe = make(tmp_path / "toy", tensors=12)
    merged(recipe, tmp_path / "want")
    want = listing(tmp_path / "want")

    def check(state: Path) -> str:
        out = state / "out"
        if not out.exists():
            return "old"
        if listing(out) != want:  # no assert: its diff of the bytes takes minutes
            raise ValueError("half a merge")
        return "new"

    root = tmp_path / "root"
    root.mkdir()
    report = crash_states(root, command(recipe, root / "out"), check)
    assert report.broken == 0, report.examples
    assert report.outcomes["new"] >= 1
    assert report.at_end == {"new"}
    shutil.rmtree(root)
    root.mkdir()
    report = crash_states(root, command(recipe, root / "out", "all"), check)
    assert report.broken > 0


def edit(**changes):
    """A change of the recipe."""
    return lambda folder, spec: spec | changes


def options(**changes):
    """A change of the first model's parameters."""

    def change(folder, spec):
        first = spec["models"][0]
        first["parameters"] = first["parameters"] | changes
        return spec

    return change


def rewrite(name, how):
    """A change of one of the input files."""

    def change(folder, spec):
        path = folder / name / "model.safetensors"
        how(path)
        return spec

    return change


def without(path: Path) -> None:
    held = io.load(path)
    io.save(path, {k: np.asarray(held[k]) for k in list(held)[1:]})


def narrower(path: Path) -> None:
    held = {k: np.asarray(v) for k, v in io.load(path).items()}
    io.save(path, held | {"t001": held["t001"][:-1]})


def poisoned(path: Path) -> None:
    held = {k: np.array(v) for k, v in io.load(path).items()}
    held["t002"][7] = np.nan
    io.save(path, held)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def pickled(path: Path) -> None:
    path.rename(path.with_name("pytorch_model.bin"))


def outside(path: Path) -> None:
    target = path.parents[2] / "elsewhere.safetensors"
    path.rename(target)
    path.symlink_to(target)


def cancelling(folder, spec):
    mean = {"merge_method": "task_arithmetic", "parameters": {"normalize": True}}
    return options(weight=-0.5)(folder, spec | mean)


BAD = {
    "unknown method": (edit(merge_method="tiess"), "tiess.*did you mean.*ties"),
    "unknown key": (edit(dtyp="float32"), "dtyp.*dtype"),
    "unknown option": (options(densty=0.5), "densty.*density"),
    "two layouts": (edit(slices=[]), "models.*slices|exactly one"),
    "no base": (edit(base_model=None), "base"),
    "density 0": (options(density=0), "density"),
    "density negative": (options(density=-0.5), "density"),
    "density nan": (options(density=float("nan")), "density|nan"),
    "weight text": (options(weight="heavy"), "weight"),
    "weights cancel": (cancelling, "weight"),
    "no such model": (edit(base_model="nowhere"), "nowhere"),
    "lora": (edit(base_model="base+adapter"), r"\+|LoRA|adapter"),
    "bad dtype": (edit(dtype="float31"), "dtype.*float32"),
    "missing tensor": (rewrite("b", without), "t000"),
    "shape": (rewrite("b", narrower), "t001"),
    "nan": (rewrite("b", poisoned), r"b.*t002.*\(7,\)"),
    "truncated": (rewrite("b", cut), "b.*model.safetensors"),
    "pickle": (rewrite("b", pickled), "pickle"),
    "link out": (rewrite("b", outside), "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_and_leaves_the_output_as_it_was(name, tmp_path):
    from typer.testing import CliRunner

    from jaxlab import cli

    change, match = BAD[name]
    recipe = make(tmp_path / "toy", tensors=4)
    spec = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(change(tmp_path / "toy", spec)))
    (tmp_path / "out").mkdir()
    before = listing(tmp_path)
    result = CliRunner().invoke(cli.app, ["merge", str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    said = " ".join(result.stderr.split())
    assert re.search(match, said), said
    assert "Traceback" not in said
    assert "fault of jaxlab" not in said
    assert listing(tmp_path) == before
    assert not os.listdir(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))
