"""The JSON that a safetensors header may hold, and nothing more of JSON.

An object of names to flat objects, whose values are strings or lists of unsigned
integers. No floats, no signs, no nesting, and bounds on every repetition: what is built
is never much larger than the tensors it describes. The quantifiers are possessive, so
no input makes them backtrack.
"""

from collections.abc import Iterator
import json
import re

from ._errors import show

Pairs = list[tuple[str, str | list[int]]]

_S = r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_W = r"[ \t\n\r]*+"
_N = r"(?:0|[1-9][0-9]{0,19}+)"
_LIST = rf"\[{_W}(?:{_N}{_W}(?:,{_W}{_N}{_W}){{0,1023}}+)?+\]"
_FIELD = rf"{_S}{_W}:{_W}(?:{_S}|{_LIST}){_W}"
_KEY = re.compile(rf"{_W}({_S}){_W}:{_W}")
_ENTRY = re.compile(rf"\{{{_W}(?:{_FIELD}(?:,{_W}{_FIELD}){{0,7}}+)?+\}}")
_STRINGS = re.compile(rf"\{{{_W}(?:{_FIELD}(?:,{_W}{_FIELD})*+)?+\}}")
_NEXT = re.compile(rf"{_W}([,}}])")
_EMPTY = re.compile(rf"\{{{_W}\}}")

_METADATA = 2**24
FORM = '{"dtype": code, "shape": [sizes], "data_offsets": [begin, end]}'


class Misfit(Exception):
    """Where the text departs from the grammar, and in which member."""

    def __init__(self, at: int, why: str, name: str | None = None) -> None:
        super().__init__(why)
        self.at, self.why, self.name = at, why, name


def members(text: str) -> Iterator[tuple[int, str, Pairs]]:
    """The members of the header: (position, name, fields in order, repeats included).

    Raises `Misfit` at the first departure, the end of the text included.
    """
    if not text.startswith("{"):
        raise Misfit(0, f"the header starts with {show(text[:8])}, not with a brace")
    empty = _EMPTY.match(text)
    i, more = (empty.end(), "}") if empty else (1, ",")
    while more == ",":
        key = _KEY.match(text, i)
        if key is None:
            why = f"expected a quoted tensor name and a colon, found {_near(text, i)}"
            raise Misfit(i, why)
        name, after = json.loads(key[1]), key.end()
        own = name == "__metadata__"
        end = after + _METADATA if own else len(text)
        fields = (_STRINGS if own else _ENTRY).match(text, after, end)
        if fields is None:
            want = "an object of strings, at most 16 MiB of it" if own else FORM
            raise Misfit(i, f"expected {want}, found {_near(text, after)}", name)
        yield i, name, json.loads(fields[0], object_pairs_hook=list)
        follow = _NEXT.match(text, fields.end())
        if follow is None:
            found = _near(text, fields.end())
            raise Misfit(fields.end(), f"expected a comma or a brace, found {found}")
        i, more = follow.end(), follow[1]
    if text[i:].strip(" "):
        raise Misfit(i, f"only spaces may follow the header, found {_near(text, i)}")


def _near(text: str, i: int) -> str:
    return show(text[i : i + 60]) if i < len(text) else "the end of the header"
