"""Writers under full disks, failing calls and interrupts: nothing half done."""

import contextlib
import errno
import itertools
import os
from pathlib import Path
import resource
import shutil
import signal
import subprocess
import time

from corpus.reading import listing, version_of
import numpy as np
import pytest

from jaxlab import io
from jaxlab.io import _atomic
from jaxlab.io._atomic import (
    atomic_bytes,
    atomic_file,
    atomic_folder,
)

# ---------------------------------------------------------------- calls that fail


def save_new(path: Path) -> None:
    x = np.full(4096, 2, np.float32)
    io.save(path, {"a": x, "b": x + 10}, shard_size=20_000)


def failing(call: str, n: int, code: int):
    """The system call, failing at its n-th use."""
    real, uses = getattr(os, call), itertools.count()

    def fails(*args, **kwargs):
        if next(uses) == n:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return fails


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "rename", "mkdir"])
@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_every_call_may_fail(tmp_path: Path, monkeypatch, name, call, code):
    """Each n-th call fails in turn: an error that names the target, nothing changed."""
    path = tmp_path / name
    if name == "a.safetensors":
        x = np.full(4096, 1, np.float32)
        io.save(path, {"a": x, "b": x + 10})
    before = listing(tmp_path)
    for n in itertools.count():
        raised = None
        with monkeypatch.context() as patch:
            patch.setattr(_atomic.os, call, failing(call, n, code))
            try:
                save_new(path)
            except OSError as error:
                raised = error
        if raised is None:
            break
        assert raised.errno == code
        assert str(path) in str(raised)
        if version_of(path) == "new":  # all was done but the last sync of the parent
            assert call in ("open", "fsync")
            shutil.rmtree(path) if path.is_dir() else atomic_bytes(path, before[name])
        assert listing(tmp_path) == before
        assert len(list(tmp_path.iterdir())) == len(before)
    assert version_of(path) == "new"
    used = {
        "a.safetensors": {"open": 2, "fsync": 2, "replace": 1, "rename": 0, "mkdir": 0},
        "folder": {"open": 10, "fsync": 10, "replace": 4, "rename": 1, "mkdir": 1},
    }
    assert n >= used[name][call]


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
@pytest.mark.parametrize("size", [0, 1, 8, 100, 4096, 16_400])
def test_a_write_may_fail_anywhere(tmp_path: Path, name: str, size: int):
    path = tmp_path / name
    if name == "a.safetensors":
        io.save(path, {"a": np.ones(1)})
    before = listing(tmp_path)
    with file_size_limit(size), pytest.raises(OSError, match=tmp_path.name):
        save_new(path)
    assert listing(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


@pytest.fixture
def disk(tmp_path: Path):
    """A real file system of 64 kB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_a_full_or_read_only_disk(disk: Path, name: str, read_only: bool):
    io.save(disk / "a.safetensors", {"a": np.ones(8)})
    before = listing(disk)
    if read_only:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=name) as caught:
        io.save(disk / name, {"a": np.zeros(2**20)})
    assert caught.value.errno == (errno.EROFS if read_only else errno.ENOSPC)
    assert listing(disk) == before
    assert len(list(disk.iterdir())) == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"a\.safetensors"):
        io.save(tmp_path / "a.safetensors", {"a": np.ones(1)})
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def half_a_file(folder: Path, error: type[BaseException]) -> None:
    with atomic_file(folder / "a") as file:
        file.write(b"half")
        raise error


def half_a_folder(folder: Path, error: type[BaseException]) -> None:
    with atomic_folder(folder / "b") as staging:
        atomic_bytes(staging / "c", b"half")
        raise error


@pytest.mark.parametrize("half", [half_a_file, half_a_folder])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_block_leaves_nothing(tmp_path: Path, half, error):
    atomic_bytes(tmp_path / "a", b"old")
    with pytest.raises(error):
        half(tmp_path, error)
    assert listing(tmp_path) == {"a": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_interrupt_during_a_save(tmp_path: Path):
    """A real SIGINT while bytes are written."""
    io.save(tmp_path / "a.safetensors", {"a": np.ones(1)})
    before = listing(tmp_path)

    class Slow:
        shape, dtype = (1,), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            raise AssertionError("not interrupted")

    with pytest.raises(KeyboardInterrupt):
        io.save(tmp_path / "a.safetensors", {"a": Slow(), "b": np.ones(9)})
    assert listing(tmp_path) == before
