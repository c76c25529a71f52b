"""Flax msgpack: sizes that lie, unknown types, keys that collide, depth."""

import struct

from . import Case, one_file

_CHUNKED = b"__msgpack_chunked_array__"


def text(word: bytes) -> bytes:
    """A short text."""
    return bytes([0xA0 | len(word)]) + word


def wide(number: int) -> bytes:
    """An unsigned integer of 64 bits."""
    return b"\xcf" + struct.pack(">Q", number)


def ext(code: int, data: bytes) -> bytes:
    """An extension type, in the shorter of two widths."""
    short = len(data) < 256
    head = struct.pack(">BB" if short else ">BI", 0xC7 if short else 0xC9, len(data))
    return head + bytes([code]) + data


def array(shape: tuple[int, ...], dtype: str, data: bytes) -> bytes:
    """What Flax puts into an extension: (shape, dtype, bytes)."""
    dims = bytes([0x90 | len(shape)]) + b"".join(map(wide, shape))
    body = b"\xc6" + struct.pack(">I", len(data)) + data
    return b"\x93" + dims + text(dtype.encode()) + body


def root(value: bytes) -> bytes:
    """A map with one key, `a`."""
    return b"\x81" + text(b"a") + value


def chunked(shape: tuple[int, ...], *chunks: bytes, keys: str = "0123") -> bytes:
    """An array that Flax has cut."""
    dims = b"".join(text(str(i).encode()) + wide(n) for i, n in enumerate(shape))
    pairs = zip(keys, chunks, strict=False)
    parts = b"".join(text(k.encode()) + c for k, c in pairs)
    return (
        b"\x83"
        + (bytes([0xA0 | len(_CHUNKED)]) + _CHUNKED + b"\xc3")
        + (text(b"shape") + bytes([0x80 | len(shape)]) + dims)
        + (text(b"chunks") + bytes([0x80 | len(chunks)]) + parts)
    )


GOOD = ext(1, array((1,), "float32", bytes(4)))
TWO = ext(1, array((2,), "float32", bytes(8)))
WHOLE = ext(1, array((1,), "int32", bytes(4)))

_ROWS: dict[str, tuple[str, str, bytes]] = {
    "ok": ("accept", "control", root(GOOD)),
    "shape_huge": (
        "refuse",
        "2^40 entries, 4 bytes",
        root(ext(1, array((2**40,), "float32", bytes(4)))),
    ),
    "shape_wrap": (
        "refuse",
        "2^64 entries",
        root(ext(1, array((2**32, 2**32), "float32", b""))),
    ),
    "dtype_object": ("refuse", "objects", root(ext(1, array((1,), "O", bytes(8))))),
    "dtype_unknown": ("refuse", "f33", root(ext(1, array((1,), "f33", bytes(4))))),
    "ext_unknown": ("refuse", "extension type 77", root(ext(77, b"x"))),
    "trailing": ("refuse", "bytes after the root", root(b"\x01") + b"x"),
    "truncated": ("refuse", "2 bytes are missing", root(GOOD)[:-2]),
    "len_4g": ("refuse", "2^32 - 1 items, none follow", b"\xdd\xff\xff\xff\xff"),
    "bin_4g": ("refuse", "2^32 - 1 bytes, none follow", root(b"\xc6\xff\xff\xff\xff")),
    "deep": ("refuse", "100,000 nested lists", b"\x91" * 100_000 + b"\xc0"),
    "dup_key": ("refuse", "a twice", b"\x82\xa1a\x01\xa1a\x02"),
    "nonutf8_key": ("refuse", "a key of 0xff", b"\x81\xa1\xff\x01"),
    "int_key": ("refuse", "a key of 1", b"\x81\x01\x01"),
    "chunk_bogus": ("refuse", "chunks that do not fill", root(chunked((2**40,), GOOD))),
    # Beyond the shared rules.
    "ok_chunked": ("accept", "an array in two pieces", root(chunked((3,), TWO, GOOD))),
    "ok_number": ("accept", "a step count", root(b"\x07")),
    "ok_nil": ("accept", "None is no leaf", root(b"\xc0")),
    "ok_empty_key": ("accept", "a key of no letters", b"\x81\xa0\x01"),
    "ok_empty": ("accept", "no keys", b"\x80"),
    "ok_bfloat16": (
        "accept",
        "bfloat16",
        root(ext(1, array((2,), "bfloat16", bytes(4)))),
    ),
    "ok_complex": (
        "accept",
        "a Python complex",
        root(ext(2, b"\x92" + 2 * (b"\xcb" + bytes(8)))),
    ),
    "empty_file": ("refuse", "no root", b""),
    "root_array": ("refuse", "an array without a name", GOOD),
    "root_nil": ("refuse", "no map", b"\xc0"),
    "map_4g": ("refuse", "2^32 - 1 keys, none follow", b"\xdf\xff\xff\xff\xff"),
    "many_nils": (
        "refuse",
        "2 million values",
        b"\xdd\0\x1e\x84\x80" + b"\xc0" * 2_000_000,
    ),
    "deep_maps": ("refuse", "1,000 nested maps", b"\x81\xa1a" * 1000 + b"\xc0"),
    "shape_of_zero": (
        "refuse",
        "no entries, along axes numpy cannot hold",
        root(ext(1, array((0, 2**63), "float32", b""))),
    ),
    "rank_100": (
        "refuse",
        "100 axes",
        root(ext(1, b"\x93\xdc\0\x64" + b"\x01" * 100 + text(b"int8") + b"\xc4\x01\0")),
    ),
    "shape_negative": (
        "refuse",
        "an axis of -1",
        root(ext(1, b"\x93\x91\xff" + text(b"int8") + b"\xc4\0")),
    ),
    "shape_float": (
        "refuse",
        "an axis of 1.0",
        root(
            ext(
                1,
                b"\x93\x91\xcb" + struct.pack(">d", 1.0) + text(b"int8") + b"\xc4\1\0",
            )
        ),
    ),
    "extension_too_long": (
        "refuse",
        "bytes after the array, inside its extension",
        root(ext(1, array((1,), "float32", bytes(4)) + b"x")),
    ),
    "extension_too_short": (
        "refuse",
        "an array that reaches into the next key",
        root(b"\xc7\x10\x01" + array((1,), "float32", bytes(4))),
    ),
    "scalar_with_axes": (
        "refuse",
        "a numpy scalar of one axis",
        root(ext(3, array((1,), "float32", bytes(4)))),
    ),
    "complex_of_text": ("refuse", "no floats", root(ext(2, b"\x92\xa1a\xa1b"))),
    "text_leaf": ("refuse", "text where an array is due", root(text(b"hello"))),
    "bytes_leaf": ("refuse", "bytes where an array is due", root(b"\xc4\x01x")),
    "never_used": ("refuse", "the byte 0xc1", root(b"\xc1")),
    "paths_collide": (
        "refuse",
        "a/b as one key, and as two",
        b"\x82" + text(b"a/b") + b"\x01" + text(b"a") + b"\x81" + text(b"b") + b"\x01",
    ),
    "bool_two": ("refuse", "a bool of 2", root(ext(1, array((1,), "bool", b"\2")))),
    "chunks_unordered": (
        "refuse",
        "chunks 1, 0",
        root(chunked((2,), GOOD, GOOD, keys="10")),
    ),
    "chunks_none": ("refuse", "no chunks", root(chunked((0,)))),
    "chunks_of_two_types": ("refuse", "two dtypes", root(chunked((2,), GOOD, WHOLE))),
    "chunks_of_numbers": ("refuse", "no arrays", root(chunked((1,), b"\x01"))),
    "metadata_of_numbers": (
        "refuse",
        "metadata that are no text",
        b"\x81" + text(b"__metadata__") + root(b"\x01"),
    ),
}

CASES = [
    Case(name, want, why, one_file(name, ".msgpack", content))
    for name, (want, why, content) in _ROWS.items()
]
