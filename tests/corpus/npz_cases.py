"""npz and npy: pickles, bombs, lies about sizes, and archives that hide something."""

from collections.abc import Callable
import io
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np

from . import Case, one_file

HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"


class Caller:
    """Pickles as a call of `os.getenv`."""

    def __reduce__(self):
        return os.getenv, ("PATH",)


def npy(x: np.ndarray, **options) -> bytes:
    """An array as `np.save` writes it."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, x, **options)
    return buffer.getvalue()


def raw(header: str, body: bytes = bytes(4), version: int = 1) -> bytes:
    """An array with any header."""
    text = header.encode("latin1") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + body


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of these members, duplicates included."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as target:
        warnings.simplefilter("ignore")
        for name, data in members:
            target.writestr(zipfile.ZipInfo(name), data, method)
    return buffer.getvalue()


def patched(data: bytes, old: bytes, new: bytes, count: int = 1) -> bytes:
    """Bytes with something replaced that must be there."""
    assert old in data
    return data.replace(old, new, count)


ONES = npy(np.ones(3, np.float32))
OBJECT = npy(np.array([Caller()], dtype=object), allow_pickle=True)
ZEROS = raw(HEADER % "(67108864,)", bytes(2**28))
ONE = archive(("a.npy", ONES))
DEFLATED = archive(("a.npy", ONES), method=zipfile.ZIP_DEFLATED)


def _streamed() -> bytes:
    """A zip written to a pipe: sizes follow the data."""
    buffer = io.BytesIO()
    pipe = type("Pipe", (), {"write": buffer.write, "flush": buffer.flush})()
    with zipfile.ZipFile(pipe, "w") as target:
        target.writestr("a.npy", ONES)
        target.writestr("b.npy", ONES)
    return buffer.getvalue()


def _hole() -> bytes:
    """A zip with bytes between its members and its directory."""
    data = bytearray(ONE)
    at = data.index(b"PK\1\2")
    (start,) = struct.unpack("<I", data[-6:-2])
    data[-6:-2] = struct.pack("<I", start + 9)
    return bytes(data[:at] + b"contraban" + data[at:])


def _overlap() -> bytes:
    """Two members of the directory that share the bytes of one."""
    data = archive(("a.npy", ONES), ("b.npy", ONES))
    second = data.rindex(b"PK\1\2")
    (place,) = struct.unpack("<I", data[second + 42 : second + 46])
    assert place
    return data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :]


_NPZ: dict[str, tuple[str, str, bytes]] = {
    "ok": ("accept", "control", ONE),
    "object": ("refuse", "a pickled object", archive(("a.npy", OBJECT))),
    "object_structured": (
        "refuse",
        "an object inside a structured dtype",
        archive(
            (
                "a.npy",
                raw(
                    "{'descr': [('x', '|O')], 'fortran_order': False, 'shape': (1,), }",
                    b"\x80\x04N.",
                ),
            )
        ),
    ),
    "pickle_as_npz": ("refuse", "a bare pickle", pickle.dumps({"a": Caller()}, 4)),
    "bomb_deflate": (
        "refuse",
        "256 MiB of zeros in 260 kB",
        archive(("a.npy", ZEROS), method=zipfile.ZIP_DEFLATED),
    ),
    "shape_huge": (
        "refuse",
        "2^40 entries, 4 bytes",
        archive(("a.npy", raw(HEADER % "(1099511627776,)"))),
    ),
    "shape_overflow": (
        "refuse",
        "2^64 entries",
        archive(("a.npy", raw(HEADER % "(4294967296, 4294967296)"))),
    ),
    "shape_neg": ("refuse", "an axis of -1", archive(("a.npy", raw(HEADER % "(-1,)")))),
    "header_long": (
        "refuse",
        "a header of 20 kB",
        archive(("a.npy", raw(HEADER % ("(1,)" + " " * 20000)))),
    ),
    "header_code": (
        "refuse",
        "an expression, not a literal",
        archive(("a.npy", raw(HEADER % "(__import__('os').getpid(),)"))),
    ),
    "truncated": ("refuse", "4 bytes are missing", archive(("a.npy", ONES[:-4]))),
    "trailing": ("refuse", "bytes after the array", archive(("a.npy", ONES + b"xx"))),
    "dup_member": (
        "refuse",
        "a.npy twice",
        archive(("a.npy", ONES), ("a.npy", npy(np.zeros(3, np.float32)))),
    ),
    "member_traversal": ("refuse", "../a.npy", archive(("../a.npy", ONES))),
    "member_not_npy": (
        "refuse",
        "a member of raw bytes",
        archive(("a.npy", ONES), ("b.bin", b"x")),
    ),
    "not_magic": ("refuse", "no npy magic", archive(("a.npy", b"hello"))),
    "crc_bad": (
        "refuse",
        "checksum mismatch",
        patched(ONE, struct.pack("<3f", 1, 1, 1), struct.pack("<3f", 1, 1, 2)),
    ),
    "zip_truncated": ("refuse", "no directory", ONE[:60]),
    # Beyond the shared rules.
    "ok_deflated": ("accept", "control, deflated", DEFLATED),
    "ok_streamed": ("accept", "sizes after the data", _streamed()),
    "ok_slashes": (
        "accept",
        "slashes in a name, as JAX code writes them",
        archive(("block_0/attn/kernel.npy", ONES), ("block_0/.npy", ONES)),
    ),
    "ok_python2": (
        "accept",
        "long integers of Python 2",
        archive(("a.npy", raw(HEADER % "(1L,)"))),
    ),
    "ok_empty": ("accept", "no members", archive()),
    "absolute": ("refuse", "/a.npy", archive(("/a.npy", ONES))),
    "backslash": ("refuse", "..\\a.npy", archive(("..\\a.npy", ONES))),
    "nul_in_name": (
        "refuse",
        "a NUL in a name, where zipfile cuts it",
        patched(
            archive(("a.npyXb.npy", ONES)), b"a.npyXb.npy", b"a.npy\0b.npy", count=2
        ),
    ),
    "comment": ("refuse", "bytes after the directory", ONE + b"x" * 30),
    "prefix": ("refuse", "bytes before the first member", b"#!/bin/sh\n" + ONE),
    "hole": ("refuse", "bytes that no member owns", _hole()),
    "overlap": ("refuse", "two members in one place", _overlap()),
    "local_name": (
        "refuse",
        "a member that calls itself otherwise",
        patched(ONE, b"a.npy", b"b.npy"),
    ),
    "encrypted": (
        "refuse",
        "an encrypted member",
        patched(ONE, b"PK\3\4\x14\0\0\0", b"PK\3\4\x14\0\1\0"),
    ),
    "deflate_garbage": (
        "refuse",
        "no deflate stream",
        patched(DEFLATED, b"a.npy\x9b", b"a.npy\xff"),
    ),
    "deflate_more": (
        "refuse",
        "inflates to more than the directory says",
        DEFLATED.replace(struct.pack("<I", len(ONES)), struct.pack("<I", 139)),
    ),
    "deep_header": (
        "refuse",
        "5,000 parentheses",
        archive(("a.npy", raw(HEADER % ("(" * 4900 + ")" * 4900)))),
    ),
    "bool_shape": (
        "refuse",
        "an axis of True",
        archive(("a.npy", raw(HEADER % "(True,)"))),
    ),
    "shape_of_zero": (
        "refuse",
        "no entries, along an axis numpy cannot hold",
        archive(("a.npy", raw(HEADER % "(0, 18446744073709551616)", b""))),
    ),
    "big_endian": (
        "refuse",
        "an order of bytes no other format has",
        archive(("a.npy", npy(np.ones(3, ">f4")))),
    ),
    "datetime": (
        "refuse",
        "no numbers",
        archive(("a.npy", npy(np.zeros(3, "M8[s]")))),
    ),
    "bool_two": (
        "refuse",
        "a bool of 2",
        archive(("a.npy", npy(np.array([0, 2], np.uint8).view(bool)))),
    ),
    "void_of_one": (
        "refuse",
        "some f8 type, but which?",
        archive(("a.npy", npy(np.zeros(3, "V1")))),
    ),
    "table_is_no_json": (
        "refuse",
        "our table, damaged",
        archive(("a.npy", ONES), ("__metadata__.npy", npy(np.zeros(3, np.uint8)))),
    ),
    "table_of_a_float": (
        "refuse",
        "a table that calls a float an f8",
        archive(
            ("a.npy", ONES),
            (
                "__metadata__.npy",
                npy(
                    np.frombuffer(
                        b'{"dtypes": {"a": "float8_e5m2"}, "metadata": {}}', np.uint8
                    )
                ),
            ),
        ),
    ),
}

_NPY: dict[str, tuple[str, str, bytes]] = {
    "object_npy": ("refuse", "a pickled object", OBJECT),
    "shape_huge_npy": ("refuse", "2^40 entries", raw(HEADER % "(1099511627776,)")),
    "ok_npy": ("accept", "control", ONES),
}


def _case(name: str, row: tuple, suffix: str) -> Case:
    want, why, content = row
    build: Callable = one_file(name, suffix, content)
    return Case(name, want, why, build)


CASES = [_case(name, row, ".npz") for name, row in _NPZ.items()] + [
    _case(name, row, ".npy") for name, row in _NPY.items()
]
