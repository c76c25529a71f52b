"""PyTorch pickles: two cases, both of which would run code."""

import io
import os
import pickle
import zipfile

from . import Case, one_file


class Caller:
    """Pickles as a call of `os.getenv`."""

    def __reduce__(self):
        return os.getenv, ("PATH",)


def _pickle():
    return pickle.dumps({"a": Caller()}, 2)


def _archive():
    """A checkpoint as torch.save writes it: a zip around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle())
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return buffer.getvalue()


CASES = [
    Case(
        "pickle_call",
        "refuse",
        "a bare pickle",
        one_file("pickle_call", ".bin", _pickle()),
    ),
    Case(
        "zip_pickle_call",
        "refuse",
        "a pickle in a zip",
        one_file("zip_pickle_call", ".pt", _archive()),
    ),
]
