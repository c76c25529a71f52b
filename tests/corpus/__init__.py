"""Malformed and well-formed files, built by rule: one module per format.

Every module has `CASES`, a list of `Case`. A test builds a case in an empty folder and
opens what `build` returns; `want` says what must come of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple


class Case(NamedTuple):
    """One file (or folder) and what a careful reader does with it."""

    name: str
    want: Literal["accept", "refuse"]
    why: str
    build: Callable[[Path], Path]


def one_file(name: str, suffix: str, content: bytes) -> Callable[[Path], Path]:
    """Builds a case that is a single file."""

    def build(folder: Path) -> Path:
        path = folder / f"{name}{suffix}"
        path.write_bytes(content)
        return path

    return build
