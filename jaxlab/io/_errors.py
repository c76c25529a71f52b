"""The one error of a bad file: it names the file, the tensor and the byte."""

from pathlib import Path

_SHOWN = 120


class FormatError(ValueError):
    """A file is not what its format says, or would not be safe to read.

    The message names the file, and the tensor and the byte offset where they are known.
    Nothing has been written when it is raised.

    Example:
      >>> raise FormatError("a.safetensors: 7 bytes, too short")
      Traceback (most recent call last):
      jaxlab.io._errors.FormatError: a.safetensors: 7 bytes, too short
    """


def refuse(
    file: Path | str, why: str, *, tensor: str | None = None, byte: int | None = None
) -> FormatError:
    """The error that says why `file` is refused, and where in it."""
    where = "" if tensor is None else f" tensor {show(tensor)}"
    where += "" if byte is None else f" at byte {byte}"
    return FormatError(f"{file}:{where}{':' if where else ''} {why}")


def show(text: object) -> str:
    """What a file said, quoted and cut short: a name may be a megabyte."""
    quoted = repr(text)
    return quoted if len(quoted) <= _SHOWN else f"{quoted[: _SHOWN - 3]}..."
