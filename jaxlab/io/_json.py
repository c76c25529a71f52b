"""JSON without surprises: no duplicate keys, no constants that JSON lacks."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any, NoReturn

from ._errors import refuse, show
from ._files import read_bytes

LIMIT = 100_000_000
_DIGITS = 400


def read_object(path: Path, *, constants: bool = False) -> dict[str, Any]:
    """The JSON object in a file; `constants` lets Infinity and NaN through."""
    try:
        text = read_bytes(path, LIMIT).decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=float if constants else _constant,
        )
    except RecursionError:
        raise refuse(path, "nested too deeply") from None
    except UnicodeDecodeError as error:
        raise refuse(path, "not UTF-8", byte=error.start) from None
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode())  # pyright: ignore
        raise refuse(path, f"not JSON: {error.msg}", byte=byte) from None
    except _Invalid as error:
        raise refuse(path, str(error)) from None
    if not isinstance(value, Mapping):
        raise refuse(path, f"expected a JSON object, found {show(value)}")
    return dict(value)


class _Invalid(Exception):
    """What the hooks below find."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict, after a check that no key appears twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Invalid(f"the key {show(key)} appears twice")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    """An integer of sane length: parsing a long one takes quadratic time."""
    if len(digits) > _DIGITS:
        raise _Invalid(f"an integer of {len(digits)} digits")
    return int(digits)


def _constant(word: str) -> NoReturn:
    raise _Invalid(f"{word} is not JSON")
