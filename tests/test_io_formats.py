"""npz, msgpack and Orbax: what they hold comes back, and nothing else gets in."""

import copy
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile

from corpus import Case, msgpack_cases, npz_cases
from corpus.msgpack_cases import chunked, root
from corpus.npz_cases import DEFLATED, ONE, archive
from corpus.reading import read_all, same
from flax import serialization
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlab import io
from jaxlab.io._dtypes import DTYPES
from jaxlab.io._msgpack import save_msgpack
from jaxlab.io._npz import save_npz

ALL = [*npz_cases.CASES, *msgpack_cases.CASES]
REFUSED = [case for case in ALL if case.want == "refuse"]
ACCEPTED = [case for case in ALL if case.want == "accept"]
BOMBS = ("bomb_deflate", "shape_huge", "shape_overflow", "shape_huge_npy", "deep")
BOMBS += ("len_4g", "bin_4g", "map_4g", "shape_wrap", "chunk_bogus", "deep_header")


def reference(path: Path) -> dict[str, np.ndarray]:
    """What numpy or Flax makes of a file; raises where they do."""
    if path.suffix == ".msgpack":
        tree = serialization.msgpack_restore(path.read_bytes())
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        swap = str.maketrans("./", "/.")  # names have dots where trees have levels
        key = lambda k: jax.tree_util.keystr((k,), simple=True).translate(swap)
        name = lambda p: ".".join(map(key, p))
        return {name(p): np.asarray(x) for p, x in leaves}
    with open(path, "rb") as file:  # a path would hide a failure behind a warning
        found = np.load(file)
        if isinstance(found, np.ndarray):
            return {path.stem: found}
        return {name: np.asarray(found[name]) for name in found.files}


def test_corpus_is_whole():
    assert [len(npz_cases.CASES), len(msgpack_cases.CASES)] == [46, 46]
    assert len({case.name for case in npz_cases.CASES}) == 46
    assert set(BOMBS) <= {case.name for case in REFUSED}


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("case", REFUSED, ids=lambda c: c.name)
def test_refuses(case: Case, tmp_path: Path):
    path = case.build(tmp_path)
    with pytest.raises(io.FormatError) as caught:
        read_all(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("case", ACCEPTED, ids=lambda c: c.name)
def test_accepts(case: Case, tmp_path: Path):
    path = case.build(tmp_path)
    got = read_all(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # numpy, of headers of Python 2
        wanted = reference(path)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        same(got[name], value)


def test_bombs_stay_small(tmp_path: Path):
    """No refusal may cost memory: the reader has 64 MB beyond what it starts with."""
    paths = [str(c.build(tmp_path)) for c in REFUSED if c.name in BOMBS]
    code = """
import json, resource, sys
from jaxlab import io
from jaxlab.io import _msgpack, _npz
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))
for path in json.load(sys.stdin):
    try:
        with io.open(path) as c:
            [t.read() for t in c.tensors.values()]
    except io.FormatError as error:
        assert "no memory" not in str(error), error
    else:
        raise SystemExit(path + " was read")
"""
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(paths).encode(),
        check=True,
        timeout=60,
    )


def mutated(data: st.DataObject, good: bytes) -> bytes:
    """Bytes of which a few were changed, cut out or put in."""
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
    return bytes(damaged)


MUTABLE = {
    ".npz": [ONE, DEFLATED, archive(("a.npy", npz_cases.npy(np.eye(3)[:, :2])))],
    ".msgpack": [
        root(msgpack_cases.GOOD),
        root(chunked((3,), msgpack_cases.TWO, msgpack_cases.GOOD)),
    ],
}


@pytest.mark.parametrize("suffix", MUTABLE)
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_never_surprise(suffix: str, data: st.DataObject):
    """A damaged file is refused, or read as the reference reads it; nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(mutated(data, data.draw(st.sampled_from(MUTABLE[suffix]))))
        try:
            got = read_all(path)
        except io.FormatError:
            return
        wanted = reference(path)
        assert got.keys() <= wanted.keys()
        for name, value in got.items():
            same(value, wanted[name])


NAMES = st.lists(
    st.text("abz019_", min_size=1, max_size=4), min_size=1, max_size=3
).map(".".join)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """An array of any dtype we have, any bits, any order of axes."""
    dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)
    raw = raw & 1 if dtype.kind == "b" else raw
    x = raw.view(dtype).reshape(shape)
    return x.T if draw(st.booleans()) else x


FLAT = st.dictionaries(NAMES, arrays(), max_size=5)
TEXTS = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


def prefix_free(flat: dict) -> bool:
    """No name continues another: Flax cannot hold a leaf that is also a folder."""
    return not any(b.startswith(f"{a}.") for a in flat for b in flat)


@settings(max_examples=40, deadline=None)
@given(FLAT, TEXTS)
def test_npz_round_trip(flat: dict, metadata: dict):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.npz")
        save_npz(path, flat, metadata)
        first = path.read_bytes()
        with io.open(path) as got:
            assert got.metadata == metadata
            assert list(got.tensors) == list(flat)
            for name, x in flat.items():
                same(got.tensors[name].read(), x)
        with np.load(path) as theirs:
            assert set(theirs.files) - {"__metadata__"} == set(flat)
            for name, x in flat.items():
                assert theirs[name].shape == x.shape
                assert theirs[name].tobytes() == x.tobytes()
        save_npz(path, flat, metadata)
        assert path.read_bytes() == first


@settings(max_examples=40, deadline=None)
@given(FLAT.filter(prefix_free), TEXTS, st.sampled_from([8, 24, 2**30]))
def test_msgpack_round_trip(flat: dict, metadata: dict, chunk: int):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.msgpack")
        save_msgpack(path, flat, metadata, chunk=chunk)
        with io.open(path) as got:
            assert got.metadata == metadata
            assert got.tensors.keys() == flat.keys()
            for name, x in flat.items():
                same(got.tensors[name].read(), x)
        theirs = reference(path)
        for name, x in flat.items():
            same(theirs[name], x)


def test_msgpack_bytes_are_those_of_flax(tmp_path: Path, monkeypatch):
    """Chunked arrays too, with the limit of 1 GiB brought down."""
    tree = {
        "a": {"kernel": np.ones((2, 3), ml_dtypes.bfloat16), "bias": np.arange(5)},
        "big": np.arange(3000, dtype=np.float32).reshape(10, 300),
        "scalar": np.float32(3),
        "tiny": np.array(1, np.int8),
        "empty": np.zeros((0, 3)),
        "f8": np.ones(300, ml_dtypes.float8_e4m3fn),
        "complex": np.ones(2, np.complex64),
    }
    flat = {"a.kernel": tree["a"]["kernel"], "a.bias": tree["a"]["bias"], **tree}
    del flat["a"]
    path = tmp_path / "a.msgpack"
    for limit in (2**30, 1000):
        monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", limit)
        save_msgpack(path, flat, chunk=limit)
        assert path.read_bytes() == serialization.msgpack_serialize(
            copy.deepcopy(tree), in_place=True
        )
        with io.open(path) as got:
            same(got.tensors["big"].read(), tree["big"])
            same(got.tensors["big"][3:7], tree["big"][3:7])
            same(got.tensors["big"][2, 5:], tree["big"][2, 5:])


def test_msgpack_reads_a_flax_train_state(tmp_path: Path):
    """Numbers are arrays without axes, lists are maps, None is no leaf."""
    state = {"step": 3, "lr": 0.5, "done": True, "mu": [jnp.ones(2), None], "z": 2j}
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(state))
    got = read_all(tmp_path / "a.msgpack")
    assert {k: x.item() for k, x in got.items() if k != "mu.0"} == {
        "step": 3,
        "lr": 0.5,
        "done": True,
        "z": 2j,
    }
    same(got["mu.0"], np.ones(2, np.float32))


def test_msgpack_opens_without_reading_its_arrays(tmp_path: Path, monkeypatch):
    flat = {f"w{i}": np.ones((1000, 1000), np.float32) for i in range(4)}
    io.save(tmp_path / "a.msgpack", flat)
    seen = []
    preadv = os.preadv
    count = lambda fd, into, at: seen.append(len(into[0])) or preadv(fd, into, at)
    monkeypatch.setattr(os, "preadv", count)
    with io.open(tmp_path / "a.msgpack") as got:
        assert sum(seen) < 2**19
        seen.clear()
        same(got.tensors["w2"][10:12], np.ones((2, 1000), np.float32))
        assert sum(seen) == 8000


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy(save, tmp_path: Path):
    """In both orders, stored and deflated, whole and in slices, from many threads."""
    rng = np.random.default_rng(0)
    arrays = {
        "c": rng.normal(size=(40, 5, 7)),
        "f": np.asfortranarray(rng.normal(size=(40, 5, 7)).astype(np.float32)),
        "t": rng.integers(0, 99, (30, 20)).T,
        "half": np.asfortranarray(rng.normal(size=(9, 4)).astype(np.float16)),
        "bf16": rng.normal(size=(9, 4)).astype(ml_dtypes.bfloat16),
        "none": np.zeros((0, 3)),
        "one": np.array(3.0),
        "words": np.array(["a", "\u00e9"]),
        "word": np.array('{"k": 1}'),
    }
    save(tmp_path / "a.npz", **arrays)
    texts = {"words": json.dumps(["a", "\u00e9"]), "word": '{"k": 1}'}
    with io.open(tmp_path / "a.npz") as got:
        assert got.metadata == texts

        def check(name: str) -> None:
            x, t = arrays[name], got.tensors[name]
            for _ in range(3):
                same(t.read(), x)
                if x.ndim:
                    same(t[3:5], x[3:5])
                    same(t[-1:], x[-1:])
                raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
                part = np.empty(max(0, raw.size - 3) // 2, np.uint8)
                if part.size:
                    t.read_into(part, 3)
                    same(part, raw[3 : 3 + part.size])

        errors = []
        monitor = lambda name: _collect(check, name, errors)
        threads = [threading.Thread(target=monitor, args=(n,)) for n in got.tensors]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not errors


def _collect(check, name: str, errors: list) -> None:
    try:
        check(name)
    except BaseException as error:
        errors.append((name, error))


def test_npz_checks_the_sum_before_a_slice(tmp_path: Path):
    """A byte that flips far from the slice is still seen."""
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", a=np.random.default_rng(0).normal(size=(100, 100)))
        content = bytearray((tmp_path / "a.npz").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "a.npz").write_bytes(content)
        with (
            io.open(tmp_path / "a.npz") as got,
            pytest.raises(io.FormatError, match="'a'"),
        ):
            got.tensors["a"][0]


def test_npz_holds_a_long_array_of_zeros(tmp_path: Path):
    """What compresses too well to be told from a bomb is read where it is stored."""
    zeros = np.zeros(2**25, np.float32)
    np.savez(tmp_path / "a.npz", a=zeros)
    np.savez_compressed(tmp_path / "b.npz", a=zeros[: 2**24], b=np.ones(3))
    assert read_all(tmp_path / "a.npz")["a"].size == zeros.size
    assert read_all(tmp_path / "b.npz")["a"].size == 2**24
    np.savez_compressed(tmp_path / "c.npz", a=zeros)
    with pytest.raises(io.FormatError, match="saved uncompressed"):
        io.open(tmp_path / "c.npz")


def test_npz_refuses_names_it_cannot_hold(tmp_path: Path):
    for name in ("", "/a", "..", "a\\b", "a\0", "__metadata__"):
        with pytest.raises(ValueError, match="cannot hold"):
            save_npz(tmp_path / "a.npz", {name: np.ones(1)})
    with pytest.raises(ValueError, match="'a', of dtype object"):
        save_npz(tmp_path / "a.npz", {"a": np.array([None])})
    with pytest.raises(ValueError, match="'a', of dtype int4"):
        save_msgpack(tmp_path / "a.msgpack", {"a": np.ones(1, ml_dtypes.int4)})
    assert not list(tmp_path.iterdir())


def test_real_npz(data: Path):
    """Every npz at hand reads as numpy reads it; members of text are metadata."""
    files = [*data.glob("*/*.npz"), *data.glob("../oracles/*/*.npz")]
    assert files
    for path in files:
        with io.open(path) as got, np.load(path) as theirs:
            assert set(theirs.files) == {*got.tensors, *got.metadata}
            for name, t in got.tensors.items():
                same(t.read(), theirs[name])


def test_closed_files_are_not_read(tmp_path: Path):
    for suffix in ("npz", "msgpack"):
        io.save(tmp_path / f"a.{suffix}", {"a": np.ones(3)})
        with io.open(tmp_path / f"a.{suffix}") as got:
            pass
        with pytest.raises(io.FormatError, match="closed"):
            got.tensors["a"].read()


def test_zip_of_many_members(tmp_path: Path, monkeypatch):
    """A directory in zip64, as an archive of more than 65,535 members has."""
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    flat = {str(i): np.full(3, i, np.float32) for i in range(5)}
    save_npz(tmp_path / "a.npz", flat)
    assert b"PK\6\7" in (tmp_path / "a.npz").read_bytes()
    got = read_all(tmp_path / "a.npz")
    assert got.keys() == flat.keys()
    same(got["4"], flat["4"])
