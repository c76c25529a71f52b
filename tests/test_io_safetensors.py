"""safetensors: errors say where, round trips, the reference reader, a real file."""

from collections.abc import Callable
import hashlib
from pathlib import Path
import tempfile

from corpus.reading import read_all, same
from corpus.safetensors_parts import ONE, info, pack
from hypothesis import given, settings, strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
import safetensors.numpy

from jaxlab import io
from jaxlab.io._dtypes import DTYPES
from jaxlab.io._header import Entry, header_bytes
from jaxlab.io._names import nest, to_path
from jaxlab.io._safetensors import open_safetensors, safetensors_writer


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 bytes"]),
        (
            pack(ONE, bytes(3)),
            ["'a'", "byte 69", "truncated"],
        ),
        (
            pack({"a": info("F33")}, bytes(4)),
            ["'a'", "byte 9", "F33", "did you mean F32"],
        ),
        (
            pack(ONE, bytes(4), 100_000_001),
            ["100000001", "100000000", "byte 0"],
        ),
        (
            pack({"a": info("BOOL", (4,))}, b"\0\1\0\7"),
            ["'a'", "byte 73", "BOOL", "7"],
        ),
        (
            pack({"\u00e9": {}, "b": []}, b""),
            ["'\u00e9'", "byte 9", "dtype"],
        ),
        (b"version https://git-lfs.github.com/spec/v1\n", ["git-lfs", "git lfs pull"]),
    ],
)
def test_error_names_file_tensor_and_byte(tmp_path, content, words):
    path = tmp_path / "some.safetensors"
    path.write_bytes(content)
    with pytest.raises(io.FormatError) as caught:
        read_all(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_header_cap_is_checked_before_reading(tmp_path: Path):
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(300_000_000)
    with pytest.raises(io.FormatError, match="at most 100000000"):
        io.open(path)


def test_changed_and_closed_files(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    io.save(path, {"a": np.ones(100, np.float32)})
    checkpoint = io.open(path)
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(io.FormatError, match=r"'a' at byte 100.*changed"):
        checkpoint.tensors["a"].read()
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(io.FormatError, match=r"'a'.*closed"):
        checkpoint.tensors["a"].read()


def test_tensor_outlives_its_checkpoint(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    io.save(path, {"a": np.arange(3)})
    assert io.open(path).tensors["a"].read().tolist() == [0, 1, 2]


UTF8 = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
NAMES = st.text(UTF8, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)


@st.composite
def arrays(draw: Callable) -> np.ndarray:
    """Any bits of any dtype and shape."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = draw(SHAPES)
    if dtype == np.bool_:
        return np.array(draw(st.lists(st.booleans(), min_size=81, max_size=81)))[
            : int(np.prod(shape))
        ].reshape(shape)
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(
        draw(st.binary(min_size=count, max_size=count)), dtype
    ).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, arrays(), max_size=5), st.booleans())
def test_round_trip_is_bit_identical(flat: dict[str, np.ndarray], sharded: bool):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out" if sharded else "a.safetensors")
        given_tree = nest({to_path(name): x for name, x in flat.items()})
        if not any(isinstance(x, dict) for x in given_tree.values()):
            given_tree = flat  # a state dict
        io.save(path, given_tree, shard_size=8, metadata={"k\u00e9": "v"})
        got = read_all(path)
        assert got.keys() == flat.keys()
        for name, x in flat.items():
            same(got[name], x)
        for file in [path] if path.is_file() else path.glob("*.safetensors"):
            with safe_open(file, "numpy") as reference:
                assert reference.metadata() == {"k\u00e9": "v"}
                for name in reference.keys():  # noqa: SIM118  (no mapping)
                    if flat[name].dtype.isbuiltin == 1:
                        same(reference.get_tensor(name), flat[name])


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, arrays(), max_size=5))
def test_reads_what_the_reference_writes(flat: dict[str, np.ndarray]):
    flat = {
        n: x for n, x in flat.items() if x.dtype.isbuiltin == 1 and x.dtype.kind != "c"
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        safetensors.numpy.save_file(flat, path, {"k": "v"})
        got = read_all(path)
        assert got.keys() == flat.keys()
        for name, x in flat.items():
            same(got[name], x)


def test_save_is_deterministic_and_aligned(tmp_path: Path):
    flat = {
        "b": np.ones(3, np.uint8),
        "a": np.ones(2, np.float64),
        "c": np.ones(1, np.int16),
    }
    io.save(tmp_path / "1.safetensors", flat)
    io.save(tmp_path / "2.safetensors", dict(reversed(flat.items())))
    first = (tmp_path / "1.safetensors").read_bytes()
    assert first == (tmp_path / "2.safetensors").read_bytes()
    assert int.from_bytes(first[:8], "little") % 8 == 0
    with io.open(tmp_path / "1.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == ["a", "c", "b"]


def test_odd_layouts_save(tmp_path: Path):
    x = np.arange(12, dtype=">f4").reshape(3, 4)
    io.save(tmp_path / "a.safetensors", {"t": x.T, "s": np.float32(2), "r": x[::-2]})
    got = read_all(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(got["t"], x.T)
    np.testing.assert_array_equal(got["r"], x[::-2])
    assert (got["s"].shape, got["s"].dtype) == ((), np.float32)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"a": {"b": 1.0}}, "'a/b' is no array but float"),
        ({"a": {"b": np.array(["x"])}}, "'a.b': safetensors has no dtype"),
        ({"a": jnp.ones(1, jnp.int4)}, "'a': safetensors has no dtype int4"),
        ({"a\0": np.ones(1)}, "NUL"),
        ({"__metadata__": np.ones(1)}, "the format's own"),
        ({"a" * 70_000: np.ones(1)}, "longer than 65536"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "path 'a/b'"),
    ],
)
def test_save_refuses(tmp_path: Path, bad, words):
    with pytest.raises(ValueError, match=words):
        io.save(tmp_path / "a.safetensors", bad)
    with pytest.raises(ValueError, match=words):
        io.save(tmp_path / "out", bad)
    assert not list(tmp_path.iterdir())


def test_save_refuses_formats(tmp_path: Path):
    x = {"a": np.ones(1)}
    with pytest.raises(io.FormatError, match="pickle"):
        io.save(tmp_path / "a.pt", x)
    with pytest.raises(ValueError, match="no format 'tar'"):
        io.save(tmp_path / "a", x, format="tar")
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        io.save(tmp_path / "a.npz", x, format="safetensors")
    with pytest.raises(ValueError, match="shard_size"):
        io.save(tmp_path / "out", x, shard_size=0)
    with pytest.raises(ValueError, match="metadata holds 1"):
        io.save(tmp_path / "a.safetensors", x, metadata={"a": 1})
    assert not list(tmp_path.iterdir())


def test_writer_enforces_the_length(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    entries = [Entry("a", np.dtype(np.float32), (2,))]
    with (
        pytest.raises(ValueError, match=r"written, .* announced"),
        safetensors_writer(path, entries) as write,
    ):
        write(bytes(7))
    with (
        pytest.raises(ValueError, match="more than"),
        safetensors_writer(path, entries) as write,
    ):
        write(bytes(9))
    assert not list(tmp_path.iterdir())
    with safetensors_writer(path, entries, {"a": "b"}) as write:
        write(bytes(3))
        write(memoryview(bytes(5)))
    assert path.stat().st_size == write.size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == write.sha256


@given(st.lists(st.tuples(NAMES, SHAPES), max_size=6, unique_by=lambda x: x[0]))
def test_header_is_the_reference_one(listed: list):
    entries = [Entry(n, np.dtype(np.uint8), s) for n, s in listed]
    content = header_bytes(entries) + bytes(sum(e.nbytes for e in entries))
    loaded = safetensors.numpy.load(content)
    assert {n: x.shape for n, x in loaded.items()} == dict(listed)


def test_a_real_file(data: Path):
    path = data / "loras" / "lora_disney.safetensors"
    got = read_all(path)
    assert len(got) == 386
    with safe_open(path, "numpy") as reference:
        for name, x in got.items():
            same(x, reference.get_tensor(name))
    with open_safetensors(path) as checkpoint:
        assert repr(checkpoint).endswith("safetensors, 386 tensors, 1.5 MB)")
