"""Well-formed files, and those whose length, text or keys are wrong."""

import io
import json
import struct
import zipfile

from .safetensors_parts import INFO, NEXT, ONE, TEXT, ZERO, info, pack, raw


def _zip():
    """A small zip archive, to append to a checkpoint."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("data.pkl"), b"x")
    return buffer.getvalue()


def controls():
    """What must load."""
    end = info(shape=(0,), offsets=(4, 4))
    none = info(shape=(0,), offsets=(0, 0))
    many = {f"t{i:05d}": info("U8", (1,), (i, i + 1)) for i in range(4000)}
    mixed = {"a": info("U8", (1,), (0, 1)), "b": info(offsets=(1, 5))}
    return {
        "ok_min": ("the smallest file", pack(ONE, ZERO)),
        "ok_scalar": ("rank 0", pack({"a": info(shape=())}, ZERO)),
        "ok_bf16": ("bfloat16", pack({"a": info("BF16", (2,))}, ZERO)),
        "ok_padded": ("trailing spaces", pack(TEXT + " " * 9, ZERO)),
        "ok_metadata": (
            "strings",
            pack({"__metadata__": {"format": "pt"}, **ONE}, ZERO),
        ),
        "ok_unsorted": ("not by offset", pack({"b": NEXT, "a": info()}, bytes(8))),
        "ok_zero_size": (
            "a dimension of 0",
            pack({"a": info(shape=(0, 3), offsets=(0, 0)), "b": info()}, ZERO),
        ),
        "ok_zero_size_end": ("empty and last", pack({"a": info(), "z": end}, ZERO)),
        "ok_empty_object": ("no tensors", pack("{}")),
        "ok_no_tensor_metadata": ("only metadata", pack({"__metadata__": {"a": "b"}})),
        "ok_many_4000": ("4000 tensors", pack(many, bytes(4000))),
        "zero_shared_offset": (
            "empty tensors where the next one starts",
            pack({"z": none, "y": none, "a": info()}, ZERO),
        ),
        "misaligned_f32": (
            "an F32 at byte 1",
            pack(mixed, b"\7" + struct.pack("<f", 1.5)),
        ),
        "header_unaligned": (
            "a header of 8 n + 3 bytes",
            pack(TEXT + " " * (-len(TEXT) % 8 + 3), ZERO),
        ),
        "name_empty": ("an empty name", pack({"": info()}, ZERO)),
        "name_traversal": ("a name is no path", pack({"../../x": info()}, ZERO)),
        "name_nfc_pair": (
            "equal after normalisation, yet two",
            pack({"\u00e9": info(), "e\u0301": NEXT}, bytes(8)),
        ),
    }


def lengths():
    """The length word, and files that end early or late."""
    return {
        "empty_file": ("0 bytes", b""),
        "short_7": ("7 bytes", bytes(7)),
        "n_zero": ("no header", bytes(8)),
        "n_zero_body": ("no header, but a body", bytes(16)),
        "truncated_header": ("ends inside the header", pack(ONE)[:20]),
        "truncated_data": ("one byte short", pack(ONE, bytes(3))),
        "no_data": ("no body", pack(ONE)),
        "n_past_end": ("header beyond the file", pack(ONE, ZERO, 5000)),
        "n_100mb_1": ("one byte over the cap", pack(ONE, ZERO, 100_000_001)),
        "n_2_63": ("2^63", pack(ONE, ZERO, 2**63)),
        "n_max": ("2^64 - 1", pack(ONE, ZERO, 2**64 - 1)),
        "n_max_minus_7": ("plus 8 wraps to 0", pack(ONE, ZERO, 2**64 - 8)),
        "n_short": ("cuts the JSON", pack(ONE, ZERO, 10)),
        "n_into_data": ("swallows the body", pack(ONE, ZERO, len(TEXT) + 4)),
        "trailing_bytes": ("a byte too many", pack(ONE, bytes(5))),
        "polyglot_zip": ("a zip appended", pack(ONE, ZERO + _zip())),
        "trailing_empty": ("no tensors, but a body", pack("{}", ZERO)),
        "lfs_pointer": (
            "git-lfs left a pointer",
            b"version https://git-lfs.github.com/spec/v1\n"
            b"oid sha256:" + b"0" * 64 + b"\nsize 123\n",
        ),
    }


def texts():
    """Text that is no strict JSON object of UTF-8."""
    deep = 100_000
    return {
        "lead_space": ("must begin with {", pack(" " + TEXT, ZERO)),
        "lead_newline": ("must begin with {", pack("\n" + TEXT, ZERO)),
        "bom": ("a byte order mark", pack(b"\xef\xbb\xbf" + TEXT.encode(), ZERO)),
        "utf16": ("UTF-16", pack(TEXT.encode("utf-16"), ZERO)),
        "nonutf8_name": ("0xff", pack(b'{"\xff":' + INFO.encode() + b"}", ZERO)),
        "nonutf8_pad": ("0xff as padding", pack(TEXT.encode() + b"\xff", ZERO)),
        "overlong_utf8": ("c0 80", pack(b'{"\xc0\x80":' + INFO.encode() + b"}", ZERO)),
        "lone_surrogate_escape": ("half", pack(f'{{"\\ud800":{INFO}}}', ZERO)),
        "trail_newlines": ("only spaces pad", pack(TEXT + "\n\t\r", ZERO)),
        "trail_nul": ("only spaces pad", pack(TEXT + "\0\0", ZERO)),
        "trail_garbage": ("a second value", pack(TEXT + "{}", ZERO)),
        "trail_comma": ("no strict JSON", pack(TEXT[:-1] + ",}", ZERO)),
        "comment": ("no strict JSON", pack("/**/" + TEXT, ZERO)),
        "top_array": ("no object", pack("[]")),
        "top_null": ("no object", pack("null")),
        "top_string": ("no object", pack('"x"')),
        "top_number": ("no object", pack("1")),
        "deep_nest": ("nested", pack('{"a":' + "[" * deep + "]" * deep + "}")),
        "deep_nest_200": ("nested", pack('{"a":' + "[" * 200 + "]" * 200 + "}")),
        "int_huge": ("5000 digits", raw(shape=f"[{'9' * 5000}]")),
        "int_leading_zero": ("01", raw(shape="[01]")),
        "nan_literal": ("NaN", raw(shape="[NaN]")),
        "minus_zero": ("-0", raw(data_offsets="[-0,4]")),
    }


def duplicates():
    """What appears twice."""
    later, wide = json.dumps(NEXT), json.dumps(info("F64"))
    twice = f'"a":{INFO},"a":'
    return {
        "dup_key_same": ("same info", pack(f"{{{twice}{INFO}}}", ZERO)),
        "dup_key_diff": ("two ranges", pack(f"{{{twice}{later}}}", bytes(8))),
        "dup_key_last_valid": (
            "only the last is good",
            pack(f'{{"a":{wide},"a":{INFO}}}', ZERO),
        ),
        "dup_key_escape": (
            "a and \\u0061",
            pack(f'{{"a":{INFO},"\\u0061":{INFO}}}', ZERO),
        ),
        "dup_metadata": (
            "metadata twice",
            pack(
                f'{{"__metadata__":{{}},"__metadata__":{{"x":"y"}},"a":{INFO}}}', ZERO
            ),
        ),
        "dup_metadata_key": (
            "a key of metadata twice",
            pack(f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{INFO}}}', ZERO),
        ),
        "dup_field": (
            "dtype twice",
            pack(
                '{"a":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}',
                ZERO,
            ),
        ),
    }
