"""Regular files, read at any offset by any thread."""

from collections.abc import Callable
import os
from pathlib import Path
import stat
import weakref

import numpy as np

from ._errors import refuse

_STEP = 2**30  # one read call returns at most 2 GiB


def reader(path: Path) -> tuple[Callable[..., None], int, Callable[[], None]]:
    """Opens a regular file: (fill a buffer from a byte on, size, close).

    A pipe or a device is refused without waiting for its other end. The file closes
    with the last reference to the first function, if not before.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise refuse(path, "not a regular file")
    except BaseException:
        os.close(fd)
        raise

    def read_at(buffer: np.ndarray, first: int, tensor: str | None = None) -> None:
        view, done = buffer.data, 0
        while done < len(view):
            if not shut.alive:
                raise refuse(path, "the checkpoint is closed", tensor=tensor)
            try:
                got = os.preadv(fd, [view[done : done + _STEP]], first + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            if not got:
                why = "the file ends early; it was changed after it was opened"
                raise refuse(path, why, tensor=tensor, byte=first + done)
            done += got

    shut = weakref.finalize(read_at, os.close, fd)
    return read_at, info.st_size, shut


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    read_at, size, shut = reader(path)
    try:
        if size > limit:
            raise refuse(path, f"{size} bytes; at most {limit} are allowed")
        buffer = np.empty(size, np.uint8)
        read_at(buffer, 0)
        return buffer.tobytes()
    finally:
        shut()


def read_start(path: Path, count: int) -> bytes:
    """The first bytes of a regular file, at most `count`."""
    read_at, size, shut = reader(path)
    try:
        buffer = np.empty(min(size, count), np.uint8)
        read_at(buffer, 0)
        return buffer.tobytes()
    finally:
        shut()
