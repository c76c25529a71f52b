"""Rival writers, leftovers of dead ones, and what publishing a folder refuses."""

import fcntl
import os
from pathlib import Path
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxlab import io
from jaxlab.io._atomic import (
    atomic_bytes,
    atomic_file,
    atomic_folder,
    folder_lock,
    publish,
    sweep,
)


def listing(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_missing_parent_is_named(tmp_path: Path):
    for name in ("no/a.safetensors", "no/folder"):
        with pytest.raises(FileNotFoundError, match=name):
            io.save(tmp_path / name, {"a": np.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_folder_never_covers_another(tmp_path: Path):
    target = tmp_path / "out"
    target.mkdir()
    io.save(target, {"a": np.ones(1)})
    before = listing(tmp_path)
    with pytest.raises(OSError, match=r"not empty.*out"):
        io.save(target, {"a": np.zeros(1)})
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="not a folder"):
        io.save(tmp_path / "file", {"a": np.zeros(1)})
    assert listing(tmp_path) == before | {"file": b"x"}


def overtaken(target: Path) -> None:
    with atomic_folder(target) as late:
        atomic_bytes(late / "a", b"late")
        with atomic_folder(target) as early:
            atomic_bytes(early / "a", b"early")


def test_two_writers_of_one_folder(tmp_path: Path):
    """Both stage; the first to finish wins, the second is told."""
    with pytest.raises(OSError, match="not empty"):
        overtaken(tmp_path / "out")
    assert listing(tmp_path) == {"out/a": b"early"}


def test_a_lock_has_one_holder(tmp_path: Path):
    hold = (
        "import sys, time; from jaxlab.io._atomic import folder_lock\n"
        "with folder_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(BlockingIOError, match=f"another process.*{tmp_path.name}"),
            folder_lock(tmp_path),
        ):
            raise AssertionError("two holders")
        child.kill()
    with folder_lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_sweep_takes_only_dead_leftovers(tmp_path: Path):
    old = time.time() - 7200
    (tmp_path / "keep").write_bytes(b"x")
    (tmp_path / ".tmp-new-1").write_bytes(b"x")
    (tmp_path / ".tmp-dir-1").mkdir()
    (tmp_path / ".tmp-dir-1" / "a").write_bytes(b"x")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "keep")
    (tmp_path / ".tmp-old-1").write_bytes(b"x")
    (tmp_path / ".tmp-live-1").write_bytes(b"x")
    os.utime(tmp_path / "keep", (old, old))
    for name in (".tmp-old-1", ".tmp-live-1", ".tmp-dir-1"):
        os.utime(tmp_path / name, (old, old))
    with (tmp_path / ".tmp-live-1").open() as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        swept = sweep(tmp_path)
        assert [p.name for p in swept] == [".tmp-dir-1", ".tmp-old-1"]
        left = {".tmp-link", ".tmp-live-1", ".tmp-new-1", "keep"}
        assert {p.name for p in tmp_path.iterdir()} == left
    assert [p.name for p in sweep(tmp_path, age=0)] == [".tmp-live-1", ".tmp-new-1"]


def test_work_in_progress_is_not_swept(tmp_path: Path):
    with atomic_file(tmp_path / "a") as file:
        file.write(b"x")
        assert sweep(tmp_path, age=0) == []
    with atomic_folder(tmp_path / "b") as staging:
        assert sweep(tmp_path, age=0) == []
        atomic_bytes(staging / "c", b"x")
    assert listing(tmp_path) == {"a": b"x", "b/c": b"x"}


def test_publish_and_long_names(tmp_path: Path):
    (tmp_path / "s").mkdir()
    atomic_bytes(tmp_path / "s" / ("\u00e9" * 127), b"x")
    publish(tmp_path / "s", tmp_path / "t")
    assert listing(tmp_path / "t") == {"\u00e9" * 127: b"x"}
    mode = (tmp_path / "t" / ("\u00e9" * 127)).stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    assert mode == 0o666 & ~mask
