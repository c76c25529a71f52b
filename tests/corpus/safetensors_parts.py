"""The pieces of a safetensors file, to be put together rightly or wrongly."""

import json
import struct

ZERO = bytes(4)  # the one F32 that most cases hold


def info(dtype="F32", shape=(1,), offsets=(0, 4)):
    """The header entry of one tensor; by default one F32 at byte 0."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def pack(header, body=b"", length=None):
    """A file of this header (an object, a text or bytes), whatever `length` claims."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode("utf-8", "surrogatepass")
    claimed = len(header) if length is None else length
    return struct.pack("<Q", claimed) + header + body


ONE = {"a": info()}
TEXT = json.dumps(ONE)
INFO = json.dumps(info())
NEXT = info(offsets=(4, 8))


def raw(**fields):
    """A file with one tensor, some fields of which are given as JSON text."""
    parts = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | fields
    inner = ",".join(f'"{key}":{value}' for key, value in parts.items())
    return pack(f'{{"a":{{{inner}}}}}', ZERO)
