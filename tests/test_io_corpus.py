"""The malformed-file corpus: refused, and never laxer than the reference."""

from pathlib import Path
import tempfile

from corpus import Case, index_cases, safetensors_cases, torch_cases
from corpus.reading import read_all, same
from corpus.safetensors_parts import NEXT, info, pack
from hypothesis import given, settings, strategies as st
import ml_dtypes
import pytest
from safetensors import SafetensorError, safe_open

from jaxlab import io
from jaxlab.io._dtypes import PACKED

ALL = [*safetensors_cases.CASES, *index_cases.CASES, *torch_cases.CASES]
REFUSED = [case for case in ALL if case.want == "refuse"]
ACCEPTED = [case for case in ALL if case.want == "accept"]


def test_corpus_is_whole():
    counts = [len(m.CASES) for m in (safetensors_cases, index_cases, torch_cases)]
    assert counts == [139, 33, 2]
    assert len({(case.name, case.build) for case in ALL}) == len(ALL)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
def test_refuses(case: Case, tmp_path: Path):
    path = case.build(tmp_path)
    with pytest.raises(io.FormatError) as caught:
        read_all(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1000


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("case", ACCEPTED, ids=lambda c: c.name)
def test_accepts(case: Case, tmp_path: Path):
    path = case.build(tmp_path)
    got = read_all(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    wanted = {}
    for file in files:
        with safe_open(file, "numpy") as reference:
            wanted |= {
                key: reference.get_tensor(key)
                for key in reference.keys()  # noqa: SIM118  (no mapping)
                if got[key].dtype != ml_dtypes.bfloat16
            }
    assert wanted.keys() <= got.keys()
    assert {k for k in got if got[k].dtype != ml_dtypes.bfloat16} == wanted.keys()
    for key, value in wanted.items():
        same(got[key], value)


def test_misaligned_value(tmp_path: Path):
    case = next(c for c in ACCEPTED if c.name == "misaligned_f32")
    assert read_all(case.build(tmp_path))["b"].tolist() == [1.5]


@pytest.mark.parametrize("case", safetensors_cases.CASES, ids=lambda c: c.name)
def test_never_laxer_than_the_reference(case: Case, tmp_path: Path):
    path = case.build(tmp_path)
    try:
        with safe_open(path, "numpy") as reference:
            reference.keys()
    except (SafetensorError, OSError):
        with pytest.raises(io.FormatError):
            read_all(path)


def test_packed_types_are_refused_by_name(tmp_path: Path):
    for code in PACKED:
        path = tmp_path / f"{code}.safetensors"
        entry = info(code, (8,), (0, 6 if "6" in code else 4))
        path.write_bytes(pack({"a": entry}, bytes(entry["data_offsets"][1])))
        with pytest.raises(io.FormatError, match=f"{code} is not supported"):
            io.open(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_never_surprise(data: st.DataObject):
    """A damaged file is refused, or read as the reference reads it; nothing else."""
    good = pack(
        {
            "__metadata__": {"k": "v"},
            "a": info(),
            "bb": NEXT,
        },
        bytes(8),
    )
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "add"]))
        if kind == "set":
            damaged[i] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[i : i + data.draw(st.integers(1, 4))]
        else:
            damaged[i:i] = data.draw(st.binary(min_size=1, max_size=4))
        if not damaged:
            break
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(damaged)
        try:
            got = read_all(path)
        except io.FormatError:
            return
        with safe_open(path, "numpy") as reference:
            for key, value in got.items():
                same(value, reference.get_tensor(key))
