"""How the command line speaks: errors of one paragraph, progress, safe text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import re
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST = 2000  # characters of an error
_WIDE = 240  # columns of a table that no terminal bounds
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    f"{unit}I": 1024**power for power, unit in enumerate("KMGT", 1)
}


def fail(message: str, *, code: int = 1) -> NoReturn:
    """Says what went wrong on stderr, and ends the command."""
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    raise typer.Exit(code)


def paragraph(error: BaseException) -> str:
    """An exception as one readable paragraph, without its traceback."""
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{error.filename}: "
        text = f"{named}{error.strerror}"
    elif isinstance(error, ValueError | OSError):
        text = str(error)
    elif isinstance(error, MemoryError):
        text = f"not enough memory: {error}"
    else:
        text = (
            f"this is a fault of jaxlab, please report it: {type(error).__name__}: "
            f"{error}. --debug shows the traceback."
        )
    text = printable(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def printable(text: str) -> str:
    """The text with its control characters spelt out: names come from files."""
    fine = lambda c: c if c.isprintable() else c.encode("unicode_escape").decode()
    return "".join(map(fine, text))


def stdout() -> "Console":
    """The console for results; without a terminal, tables are as wide as they need."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


@contextmanager
def reading(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A bar of bytes on stderr; yields the function that advances it."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    off = quiet or not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=off) as p:
        task = p.add_task(printable(what), total=total)
        yield lambda n: p.advance(task, n)


@contextmanager
def phases(total: int, *, quiet: bool) -> Iterator[Callable[[str], Any]]:
    """A bar of phases on stderr; yields the function that begins the next one."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with progress.Progress(
        *columns, console=console, transient=True, disable=quiet
    ) as p:
        task = p.add_task("start", total=total, completed=-1)
        yield lambda name: p.update(task, advance=1, description=name)


def size(text: str, *, option: str) -> float:
    """The bytes that `5GB`, `500 MB`, `2GiB` or `5e9` stand for.

    Raises:
      typer.BadParameter: no size, or not a positive one.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?)B?\s*", text, re.I)
    try:
        value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 1 <= value < 2**63:
        why = f"{text!r} is no size; try 5GB, 500MB or 2GiB"
        raise typer.BadParameter(why, param_hint=option)
    return value
