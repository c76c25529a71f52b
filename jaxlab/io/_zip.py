"""The strict zip container of `.npz`: members tile the file, and inflate within bounds.

Python's `zipfile` reads the directory; it is checked against the members themselves.
"""

from collections.abc import Callable
from pathlib import Path
import struct
import threading
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

from ._errors import refuse

_DIRECTORY = 2**28  # bytes of zip directory, which is read whole
_BLOCK = 2**20
_RATIO, _FREE = 200, 2**26  # inflated bytes per stored byte, beyond those that are free
_STREAMED = 8  # flag bit: sizes follow the data, in at most 24 bytes
_REFUSED = 0x2061  # flag bits: encrypted, patched, strongly encrypted, masked

Read = Callable[[np.ndarray, int], None]
"""Fills a byte buffer from that byte on."""


class Member(NamedTuple):
    """The bytes of one member: where they lie, and how many they inflate to."""

    name: str
    start: int
    stored: int
    size: int
    crc: int
    deflated: bool


class Cache(NamedTuple):
    """The one deflated member that is held inflated, so that its blocks cost once."""

    slot: dict[str, np.ndarray]
    lock: threading.Lock


def members(path: Path, read_at: Read, size: int) -> list[Member]:
    """The members of an archive whose directory accounts for every byte of the file."""
    tail = take(read_at, max(0, size - 98), min(98, size))
    wide = tail[-42:-38] == b"PK\6\7"  # a zip64 directory: its record lies before
    length = int.from_bytes(tail[-58:-50] if wide else tail[-10:-6], "little")
    if tail[-22:-18] != b"PK\5\6":
        raise refuse(
            path, "the zip archive is cut short, or bytes follow its directory"
        )
    if length > min(size, _DIRECTORY):
        raise refuse(path, f"a zip directory of {length} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise refuse(path, f"broken zip directory: {error}") from None
    found = [_member(path, read_at, size, info) for info in infos]
    if len({m.name for m in found}) < len(found):
        raise refuse(path, "two members have one name")
    _check_tiling(path, infos, found, end)
    total = sum(m.size for m in found if m.deflated)
    packed = sum(m.stored for m in found if m.deflated)
    if total > _FREE + _RATIO * packed:
        raise refuse(
            path,
            f"{packed} bytes would inflate to {total}: that is a bomb, or an array of "
            "zeros that must be saved uncompressed",
        )
    return found


def head(read_at: Read, member: Member, count: int) -> bytes:
    """The first bytes of a member, inflating no more than those."""
    if not member.deflated:
        return take(read_at, member.start, min(count, member.size))
    packed = take(read_at, member.start, min(count + 1024, member.stored))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, count)
    except zlib.error:
        return b""


def take(read_at: Read, first: int, count: int) -> bytes:
    """Reads `count` bytes."""
    buffer = np.empty(count, np.uint8)
    read_at(buffer, first)
    return buffer.tobytes()


def reader(path: Path, read_at: Read, member: Member, cache: Cache) -> Read:
    """How to read a member: its checksum is verified before the first byte is used."""
    checked = threading.Event()

    def inflated(buffer: np.ndarray, start: int) -> None:
        with cache.lock:
            if member.name not in cache.slot:
                cache.slot.clear()
                cache.slot[member.name] = _inflate(path, read_at, member)
            buffer[:] = cache.slot[member.name][start : start + len(buffer)]
            if start + len(buffer) == member.size:
                cache.slot.clear()

    def stored(buffer: np.ndarray, start: int) -> None:
        if not checked.is_set():
            _check_stored(path, read_at, member)
            checked.set()
        read_at(buffer, member.start + start)

    return inflated if member.deflated else stored


def plain(name: str) -> bool:
    """Whether a member's name could be a relative path below any folder."""
    parts = name.split("/")
    odd = "\\" in name or not name.isprintable()
    return not odd and parts[0] != "" and not {".", ".."} & set(parts)


def _member(path: Path, read_at: Read, size: int, info: zipfile.ZipInfo) -> Member:
    """One entry of the directory, checked against what lies at its place."""
    name = info.filename.removesuffix(".npy")
    if info.orig_filename != f"{name}.npy" or not plain(name):
        raise refuse(
            path, "a member must be a plain NAME.npy", tensor=info.orig_filename
        )
    first = info.header_offset
    start = take(read_at, first, 30) if 0 <= first <= size - 30 else b""
    if start[:4] != b"PK\3\4":
        raise refuse(path, "no member here", tensor=name, byte=first)
    flags, method = struct.unpack("<HH", start[6:10])
    n, m = struct.unpack("<HH", start[26:30])
    if (flags | info.flag_bits) & _REFUSED or method not in (0, 8):
        raise refuse(path, "encrypted, or neither stored nor deflated", tensor=name)
    local = take(read_at, first + 30, min(n, size - first - 30))
    coding = "utf-8" if flags & 0x800 else "cp437"
    if local != info.filename.encode(coding, "replace") or method != info.compress_type:
        raise refuse(path, "the member and the directory disagree", tensor=name)
    if method == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise refuse(path, "a stored member of two sizes", tensor=name)
    at, deflated = first + 30 + n + m, method == zipfile.ZIP_DEFLATED
    return Member(name, at, info.compress_size, info.file_size, info.CRC, deflated)


def _check_tiling(
    path: Path, infos: list[zipfile.ZipInfo], found: list[Member], end: int
) -> None:
    """Members follow each other from byte 0 to the directory."""
    pairs = sorted(zip(infos, found, strict=True), key=lambda x: x[0].header_offset)
    places = [info.header_offset for info, _ in pairs] + [end]
    slack = [0] + [24 * bool(info.flag_bits & _STREAMED) for info, _ in pairs]
    ends = [0] + [member.start + member.stored for _, member in pairs]
    for place, stop, extra in zip(places, ends, slack, strict=True):
        if not stop <= place <= stop + extra:
            raise refuse(path, f"members overlap or leave a hole at {stop}", byte=place)


def _check_stored(path: Path, read_at: Read, member: Member) -> None:
    """Reads a stored member once, in blocks, for its checksum."""
    crc, buffer = 0, np.empty(min(_BLOCK, member.size), np.uint8)
    for at in range(0, member.size, _BLOCK):
        part = buffer[: member.size - at]
        read_at(part, member.start + at)
        crc = zlib.crc32(part.data, crc)
    if crc != member.crc:
        raise refuse(path, "checksum mismatch", tensor=member.name, byte=member.start)


def _inflate(path: Path, read_at: Read, member: Member) -> np.ndarray:
    """A deflated member whole; never a byte more than it declares."""
    out, at, packed = np.empty(member.size, np.uint8), 0, b""
    inflater, stop = zlib.decompressobj(-zlib.MAX_WBITS), member.start + member.stored
    source = member.start
    try:
        while not inflater.eof and at <= member.size:
            if not packed and source < stop:
                packed = take(read_at, source, min(_BLOCK, stop - source))
                source += len(packed)
            room = min(_BLOCK, member.size - at + 1)
            piece = inflater.decompress(packed, room)
            packed = inflater.unconsumed_tail
            out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)[
                : member.size - at
            ]
            at += len(piece)
            if not piece and not packed and source >= stop:
                break
    except zlib.error as error:
        raise refuse(
            path, f"broken deflate stream: {error}", tensor=member.name
        ) from None
    whole = inflater.eof and not inflater.unused_data and source == stop and not packed
    if not whole or at != member.size:
        raise refuse(
            path, f"does not inflate to {member.size} bytes", tensor=member.name
        )
    if zlib.crc32(out.data) != member.crc:
        raise refuse(path, "checksum mismatch", tensor=member.name, byte=member.start)
    return out
