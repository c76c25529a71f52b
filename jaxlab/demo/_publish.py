"""Replaces an earlier demo by a new one, and never anything else."""

from collections.abc import Iterator
from contextlib import contextmanager
import json
import os
from pathlib import Path
import shutil

from ..io import _atomic

FILE, MARK = "results.json", "jaxlab demo"


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder to write in; at the end of the block it takes the place of `out`.

    Args:
      out: missing, empty, or an earlier demo.

    Yields:
      The folder, beside `out`. An exception removes it and leaves `out` as it was.

    Raises:
      ValueError: `out` is something else; it is left as it is.
    """
    out = Path(os.path.abspath(out))
    _check(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    work, old = _atomic.beside(out), _atomic.beside(out)
    work.mkdir()
    try:
        with _atomic.folder_lock(work):
            yield work
            _check(out)
            if out.exists():
                os.rename(out, old)
            _atomic.publish(work, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _check(out: Path) -> None:
    """Refuses to replace what is not a demo of ours."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise ValueError(f"{out} exists and is not a folder; give another --out")
    if any(out.iterdir()) and not _is_demo(out):
        raise ValueError(
            f"{out} holds files that are not an earlier `jaxlab demo`; they would be "
            "lost, so give another --out or move them away"
        )


def _is_demo(folder: Path) -> bool:
    try:
        return json.loads((folder / FILE).read_text())["made_by"] == MARK
    except (OSError, ValueError, KeyError, TypeError):
        return False
