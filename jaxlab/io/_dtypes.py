"""The dtype codes of safetensors, as numpy and ml_dtypes know them."""

import difflib

import ml_dtypes
import numpy as np

from ._errors import show

_CODES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
DTYPES = {code: np.dtype(kind) for code, kind in _CODES.items()}
NAMES = {dtype: code for code, dtype in DTYPES.items()}

# Parts of the format whose elements are not whole bytes: numpy has no array of them.
PACKED = ("F4", "F6_E2M3", "F6_E3M2")


def from_code(code: str) -> np.dtype:
    """The dtype of a safetensors code."""
    if code in PACKED:
        raise ValueError(
            f"dtype {code} is not supported: its elements are not whole bytes"
        )
    if code not in DTYPES:
        close = difflib.get_close_matches(code[:20].upper(), DTYPES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"unknown dtype {show(code)}{hint}")
    return DTYPES[code]


def to_code(dtype: np.dtype) -> str:
    """The safetensors code of a dtype."""
    code = NAMES.get(dtype)
    if code is None:
        raise ValueError(f"safetensors has no dtype {dtype}; it has {sorted(DTYPES)}")
    return code


def little(dtype: np.dtype) -> np.dtype:
    """The dtype in the byte order of every format here."""
    return dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype
