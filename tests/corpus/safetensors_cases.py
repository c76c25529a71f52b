"""safetensors files: 139 cases, one rule of the format each."""

from . import Case, one_file
from .safetensors_parts import NEXT, ONE, ZERO, info, pack, raw
from .safetensors_text import controls, duplicates, lengths, texts


def _entries():
    """Entries that are no entries, and dtypes that are none."""
    cases = {"extra_field": ("unknown", pack({"a": {**info(), "strides": [4]}}, ZERO))}
    for field in ("dtype", "shape", "data_offsets"):
        less = {key: value for key, value in info().items() if key != field}
        cases[f"missing_{field}"] = ("a field is missing", pack({"a": less}, ZERO))
    for name, value in {
        "null": None,
        "list": [],
        "str": "x",
        "num": 1,
        "array_form": ["F32", [1], [0, 4]],
    }.items():
        cases[f"info_{name}"] = ("no object", pack({"a": value}, ZERO))
    for name, code in {
        "unknown": "F33",
        "lower": "f32",
        "empty": "",
        "num": 1,
        "null": None,
        "numpy": "<f4",
        "obj": "O",
        "pad": "F32 ",
    }.items():
        cases[f"dtype_{name}"] = ("no dtype", pack({"a": info(code)}, ZERO))
    cases["f4_odd"] = ("12 bits", pack({"a": info("F4", (3,), (0, 2))}, bytes(2)))
    cases["bool_2"] = ("a BOOL of 2", pack({"a": info("BOOL", (1,), (0, 1))}, b"\2"))
    return cases


def _offsets():
    """Ranges that do not tile the body."""
    two, shifted = info(shape=(2,), offsets=(0, 8)), info(shape=(2,), offsets=(4, 12))
    cases = {
        "overlap": ("in part", pack({"a": two, "b": shifted}, bytes(12))),
        "overlap_same": (
            "two names, one range",
            pack({"a": info(), "b": info()}, ZERO),
        ),
        "overlap_dos": (
            "1000 names, one range",
            pack({f"t{i}": info() for i in range(1000)}, ZERO),
        ),
        "gap": ("a hole", pack({"a": info(), "b": info(offsets=(8, 12))}, bytes(12))),
        "gap_start": ("a hole at 0", pack({"a": NEXT}, bytes(8))),
        "off_reversed": ("end < begin", pack({"a": info(offsets=(4, 0))}, ZERO)),
        "off_neg": ("negative", pack({"a": info(offsets=(-4, 0))}, ZERO)),
        "off_past": (
            "beyond the file",
            pack({"a": info(shape=(100,), offsets=(0, 400))}, ZERO),
        ),
        "off_2_64": ("2^64", pack({"a": info(offsets=(0, 2**64))}, ZERO)),
        "off_wrap": (
            "2^64 - 1",
            pack({"a": info("U8", (2**64 - 1,), (0, 2**64 - 1))}, ZERO),
        ),
        "zero_with_bytes": ("empty, 4 bytes", pack({"a": info(shape=(0,))}, ZERO)),
        "zero_offset_inside": (
            "empty, inside another",
            pack({"a": info(), "z": info(shape=(0,), offsets=(2, 2))}, ZERO),
        ),
        "zero_offset_past": (
            "empty, past the end",
            pack({"a": info(), "z": info(shape=(0,), offsets=(9, 9))}, ZERO),
        ),
    }
    for name, value in {
        "one": [0],
        "three": [0, 4, 8],
        "float": [0.0, 4.0],
        "str": ["0", "4"],
        "null": None,
        "bool": [False, True],
        "obj": {"0": 0},
    }.items():
        entry = {**info(), "data_offsets": value}
        cases[f"off_{name}"] = ("no pair of integers", pack({"a": entry}, ZERO))
    return cases


def _shapes():
    """Shapes that are none, that do not fit, or whose product overflows."""
    cases = {}
    for name, text in {
        "neg": "[-1]",
        "float": "[1.0]",
        "exp": "[1e0]",
        "str": '["1"]',
        "null": "null",
        "bool": "[true]",
        "scalar": "1",
        "nested": "[[1]]",
        "big": f"[{2**64}]",
        "neg_pair": "[-1,-1]",
    }.items():
        cases[f"shape_{name}"] = ("no list of sizes", raw(shape=text))
    empty = lambda dtype, *shape: pack({"a": info(dtype, shape, (0, 0))})
    return cases | {
        "shape_mismatch_small": (
            "4 bytes in 8",
            pack({"a": info(offsets=(0, 8))}, bytes(8)),
        ),
        "shape_mismatch_big": (
            "40 kB in 4",
            pack({"a": info(shape=(1000, 1000))}, ZERO),
        ),
        "dtype_mismatch": ("F64 in 4 bytes", pack({"a": info("F64")}, ZERO)),
        "prod_2_63": ("2^63", empty("U8", 2**32, 2**31)),
        "prod_2_64_wraps_0": ("wraps to 0", empty("U8", 2**32, 2**32)),
        "bytes_2_64_wraps_0": ("bytes wrap to 0", empty("F32", 2**62)),
        "bits_wrap": ("bits wrap", empty("U8", 2**61)),
        "prod_wraps_4": (
            "wraps to the true size",
            pack({"a": info("U8", (2**32 + 1, 2**32 + 4), (0, 4))}, ZERO),
        ),
        "huge_then_zero": ("overflows before the 0", empty("F32", 2**63, 4, 0)),
        "zero_then_huge": ("no shape of an array", empty("F32", 0, 2**63)),
        "zero_huge_dims": ("no shape of an array", empty("F32", 0, 2**40, 2**40)),
        "rank_65": ("numpy has 64 axes", pack({"a": info(shape=[1] * 65)}, ZERO)),
        "rank_100k": ("100 000 axes", pack({"a": info(shape=[1] * 100_000)}, ZERO)),
    }


def _names():
    """Metadata that maps no strings to strings, and names that are none."""
    cases = {}
    for name, value in {
        "int": {"x": 1},
        "null": {"x": None},
        "nested": {"x": {"y": "z"}},
        "list": {"x": ["y"]},
        "is_list": [],
        "is_str": "x",
        "bool": {"x": True},
        "is_null": None,
        "is_tensor": info(),
    }.items():
        header = {"__metadata__": value, **ONE}
        cases[f"meta_{name}"] = ("no map of strings", pack(header, ZERO))
    return cases | {
        "name_nul": ("a NUL", pack({"a\0b": info()}, ZERO)),
        "name_1mb": ("over 64 KiB", pack({"a" * 1_000_000: info()}, ZERO)),
    }


_REFUSED = lengths() | texts() | duplicates() | _entries() | _offsets() | _shapes()
_REFUSED |= _names()

# Part of the format, but of no array library: refused by name, not as an unknown dtype.
UNSUPPORTED = Case(
    "ok_f4_even",
    "refuse",
    "four-bit floats",
    one_file(
        *("ok_f4_even", ".safetensors"), pack({"a": info("F4", (4,), (0, 2))}, bytes(2))
    ),
)

CASES = [
    *(
        Case(name, "accept", why, one_file(name, ".safetensors", content))
        for name, (why, content) in controls().items()
    ),
    *(
        Case(name, "refuse", why, one_file(name, ".safetensors", content))
        for name, (why, content) in _REFUSED.items()
    ),
    UNSUPPORTED,
]
