"""Files and folders that appear whole or not at all, whatever is killed or unplugged.

The order is always: an exclusive temporary beside the target, write, fsync, rename,
fsync of the folder. A temporary is locked as long as its writer lives, so `sweep` can
tell a leftover from work in progress.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import errno
import fcntl
import os
from pathlib import Path
import secrets
import shutil
import stat
import time
from typing import BinaryIO

PREFIX = ".tmp-"
_NAME_MAX = 255
_BUFFER = 2**20


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` once it is complete and on disk.

    Args:
      path: the target; an older file of that name stays until it is replaced whole.

    Yields:
      The open file. Leave the block normally to publish it; any exception, Ctrl-C
      included, removes it and leaves the older file as it was.

    Raises:
      OSError: the disk is full, the folder read-only or missing; names `path`.
    """
    path = Path(path)
    temporary = beside(path)
    with _naming(path):
        try:
            with _create(temporary) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_folder(path.parent)


def atomic_bytes(path: Path | str, data: bytes) -> None:
    """Writes `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A staging folder that takes the name `path` once it is complete and on disk.

    Args:
      path: the target: missing, or an empty folder.

    Yields:
      The staging folder, beside the target and locked. Any exception removes it.

    Raises:
      OSError: the target exists and is not an empty folder, or the disk refuses.
    """
    path = Path(path)
    vacant(path)
    staging = beside(path)
    with _naming(path):
        try:
            os.mkdir(staging)
            with folder_lock(staging):
                yield staging
                publish(staging, path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def publish(staging: Path, target: Path) -> None:
    """Renames a finished folder onto a missing or empty target, all of it on disk."""
    for folder, _, files in os.walk(staging, topdown=False):
        for name in files:
            _sync(Path(folder, name), os.O_RDONLY)
        sync_folder(Path(folder))
    vacant(target)
    os.rename(staging, target)
    sync_folder(target.parent)


def vacant(target: Path) -> None:
    """Refuses a target that a folder cannot be renamed onto."""
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(target).st_mode):
            if not os.listdir(target):
                return
            code, why = errno.ENOTEMPTY, "the output folder is not empty"
        else:
            code, why = errno.EEXIST, "the output exists and is not a folder"
        raise OSError(code, why, str(target))


@contextmanager
def folder_lock(folder: Path | str) -> Iterator[None]:
    """Holds `folder` for one writer; readers need no lock, and a kill frees it.

    Args:
      folder: an existing folder. The lock is on the folder itself: no file is left.

    Yields:
      Nothing; the lock is held inside the block.

    Raises:
      BlockingIOError: another writer, in this process or another, holds it.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(fd):
            why = "another process is writing to this folder"
            raise BlockingIOError(errno.EWOULDBLOCK, why, str(folder))
        yield
    finally:
        os.close(fd)


def sweep(folder: Path | str, *, age: float = 3600.0) -> list[Path]:
    """Removes what killed writers left in `folder`: temporaries, old and unlocked.

    Args:
      folder: where to look, not deeper.
      age: seconds since the last change; 0 where the caller holds the folder's lock.

    Returns:
      What was removed.
    """
    removed = []
    for path in sorted(Path(folder).glob(PREFIX + "*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # not ours: a link, or gone meanwhile
        try:
            info = os.fstat(fd)
            if time.time() - info.st_mtime < age or not _lock(fd):
                continue
            if stat.S_ISDIR(info.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.unlink(path)
        except OSError:
            continue  # cannot be locked here, or cannot be removed
        finally:
            os.close(fd)
        if not os.path.lexists(path):
            removed.append(path)
    return removed


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def beside(path: Path) -> Path:
    """A new temporary name in the folder of `path`."""
    ending = f"-{secrets.token_hex(8)}"
    room = _NAME_MAX - len(PREFIX) - len(ending)
    stem = path.name.encode("utf-8", "surrogateescape")[:room].decode("utf-8", "ignore")
    return path.with_name(f"{PREFIX}{stem}{ending}")


@contextmanager
def _create(temporary: Path) -> Iterator[BinaryIO]:
    """A new, locked file; closed at the end, without a second error on top of one."""
    fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    file = os.fdopen(fd, "wb", buffering=_BUFFER)
    try:
        with suppress(OSError):  # a file system without locks: nobody sweeps there
            _lock(fd)
        yield file
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    file.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives an OSError the name of the target where it names none or a temporary."""
    try:
        yield
    except OSError as error:
        named = error.filename is None or PREFIX in str(error.filename)
        if error.errno is None or not named:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _lock(fd: int) -> bool:
    """Takes the lock of an open file or folder, unless another holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
