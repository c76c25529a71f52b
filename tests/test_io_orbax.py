"""Orbax: slices, shardings, asynchronous saves, and folders that lie."""

import errno
import json
import os
from pathlib import Path
import subprocess
import sys

from corpus.reading import read_all, same
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxlab import io
from jaxlab.io import _orbax_save
from jaxlab.io._dtypes import DTYPES
from jaxlab.io._orbax import save_orbax
from jaxlab.io._shards import MANIFEST, verify


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small checkpoint of ours."""
    path = tmp_path / "a.orbax"
    save_orbax(path, {"a.w": np.arange(12.0).reshape(3, 4), "b": np.ones(2)})
    return path


def test_round_trip(tmp_path: Path):
    """Every dtype, numbers without axes, and keys that hold a dot."""
    flat = {f"d.{d.name}": np.ones((3, 4), d) for d in DTYPES.values()}
    flat |= {"a.b/c": jnp.arange(3), "s": np.float32(3), "n": np.array(7)}
    save_orbax(tmp_path / "a.orbax", flat, {"k": "v"})
    with io.open(tmp_path / "a.orbax") as got:
        assert got.format == "orbax"
        assert got.metadata == {"k": "v"}
        assert got.tensors.keys() == flat.keys()
        for name, x in flat.items():
            same(got.tensors[name].read(), x)
    assert sorted(os.listdir(tmp_path)) == ["a.orbax"]
    with ocp.StandardCheckpointer() as theirs:
        tree = theirs.restore(tmp_path / "a.orbax")
    same(tree["a"]["b.c"], jnp.arange(3))
    same(tree["d"]["bfloat16"], flat["d.bfloat16"])


INDICES = [
    np.index_exp[1:3],
    np.index_exp[:, 1:2],
    np.index_exp[::2],
    np.index_exp[2],
    np.index_exp[..., 1],
    np.index_exp[-3:-1, :, 2:9],
    np.index_exp[4:1],
    np.index_exp[1:4, 2, ::-1],
]


def test_slices(tmp_path: Path):
    x = np.arange(60, dtype=np.float32).reshape(5, 4, 3)
    save_orbax(tmp_path / "a", {"x": x})
    tensor = io.open(tmp_path / "a").tensors["x"]
    for index in INDICES:
        same(tensor[index], x[index])
    part = np.empty(37, np.uint8)
    tensor.read_into(part, 5)
    same(part, x.reshape(-1).view(np.uint8)[5:42])


def test_a_slice_reads_no_more(tmp_path: Path):
    """Chunks are cut, so that a few rows of a large array cost a chunk, not all."""
    x = np.random.default_rng(0).normal(size=(2**14, 2**10)).astype(np.float64)
    save_orbax(tmp_path / "a", {"x": x})
    tensor = io.open(tmp_path / "a").tensors["x"]
    chunk = tensor.store.chunk_layout.read_chunk.shape
    assert np.prod(chunk) * 8 <= 2**26
    before = _read_so_far()
    same(tensor[10:12, :5], x[10:12, :5])
    assert _read_so_far() - before < x.nbytes * 0.75


def _read_so_far() -> int:
    """Bytes this process has asked the system for."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


LAYOUTS = {
    "zarr_ocdbt": {},
    "zarr": {"use_ocdbt": False},
    "zarr3_ocdbt": {"use_zarr3": True},
    "zarr3": {"use_zarr3": True, "use_ocdbt": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_orbax_writes(layout: str, tmp_path: Path):
    """Lists, numbers, text, None and empty containers included."""
    tree = {
        "a": {"b.c": jnp.arange(12.0).reshape(3, 4), "l": [jnp.ones(3, jnp.bfloat16)]},
        "n": np.arange(5),
        "zero": np.zeros(4),
        "number": 3,
        "text": "hello",
        "none": None,
        "empty": {},
    }
    handler = ocp.PyTreeCheckpointHandler(**LAYOUTS[layout])
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "a", tree)
    with io.open(tmp_path / "a") as got:
        assert got.metadata == {"text": "hello"}
        found = {name: t.read() for name, t in got.tensors.items()}
    same(found.pop("a.b/c"), tree["a"]["b.c"])
    same(found.pop("a.l.0"), tree["a"]["l"][0])
    same(found.pop("n"), tree["n"])
    same(found.pop("zero"), tree["zero"])
    assert found.pop("number").item() == 3
    assert not found


def test_steps_of_a_manager(tmp_path: Path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({"a": jnp.full(3, step)}))
            manager.wait_until_finished()
    assert read_all(tmp_path / "run")["a"].tolist() == [10, 10, 10]
    assert read_all(tmp_path / "run" / "9")["a"].tolist() == [9, 9, 9]
    items = {k: ocp.args.StandardSave({"a": jnp.ones(1)}) for k in ("x", "y")}
    with ocp.CheckpointManager(tmp_path / "two", item_names=("x", "y")) as manager:
        manager.save(1, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    with pytest.raises(io.FormatError, match=r"items \['x', 'y'\]: open one"):
        io.open(tmp_path / "two" / "1")
    assert read_all(tmp_path / "two" / "1" / "x").keys() == {"a"}


@pytest.mark.parametrize("spec", [("d", "e"), (None, "d"), (("d", "e"),), ()])
def test_onto_any_sharding(spec: tuple, tmp_path: Path):
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    before = NamedSharding(mesh, PartitionSpec("e", "d"))
    x = np.arange(128, dtype=np.float32).reshape(8, 16)
    save_orbax(tmp_path / "a", {"b.x": jax.device_put(x, before), "y": np.ones(8)})
    after = NamedSharding(mesh, PartitionSpec(*spec))
    whole = NamedSharding(mesh, PartitionSpec())
    got = io.load(tmp_path / "a", sharding={"b": {"x": after}, "y": whole})
    assert got["b"]["x"].sharding == after
    same(got["b"]["x"], x)
    same(got["y"], np.ones(8))


def test_async_save_takes_a_snapshot(tmp_path: Path):
    """Arrays may be changed and donated as soon as `save_orbax` is back."""
    size = 2_000_000
    host = np.arange(size, dtype=np.float32)
    device = jnp.arange(size, dtype=jnp.float32) + 0.5
    want = {"host": host.copy(), "device": np.array(device)}
    pending = save_orbax(tmp_path / "a", {"host": host, "device": device}, wait=False)
    host[:] = -1
    jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(device).block_until_ready()
    del device
    pending.wait()
    pending.wait()
    for name, x in read_all(tmp_path / "a").items():
        same(x, want[name])


def test_async_save_reports_at_wait(tmp_path: Path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_orbax_save, "publish", full)
    pending = save_orbax(tmp_path / "a", {"a": np.ones(3)}, wait=False)
    with pytest.raises(OSError, match="No space left"):
        pending.wait()
    with pytest.raises(OSError, match="No space left"):
        save_orbax(tmp_path / "a", {"a": np.ones(3)})
    assert not list(tmp_path.iterdir())


def test_tensorstore_errors_are_os_errors(tmp_path: Path):
    """A limit on file sizes stands for a full disk."""
    code = f"""
import resource, signal, sys
import numpy as np
from pathlib import Path
from jaxlab.io._orbax import save_orbax
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    save_orbax(Path({str(tmp_path)!r}, "a"), {{"a": np.random.rand(2**18)}})
except OSError as error:
    sys.exit("File too large" not in str(error))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_the_end_of_a_process_is_no_silent_loss(tmp_path: Path):
    """Python stops Orbax's threads at exit: the save is whole, or the loss is said."""
    code = f"""
import numpy as np
from jaxlab.io._orbax import save_orbax
save_orbax({str(tmp_path / "a")!r}, {{"a": np.ones(10**6)}}, wait=False)
"""
    run = [sys.executable, "-c", code]
    end = subprocess.run(run, capture_output=True, text=True, timeout=60)
    # What the end of the process cut off is a temporary, which `sweep` removes.
    left = [name for name in os.listdir(tmp_path) if not name.startswith(".tmp-")]
    assert left == ["a"] or (not left and "cannot schedule new futures" in end.stderr)
    if left:
        verify(tmp_path / "a")


def test_target_must_be_vacant(saved: Path):
    before = sorted(saved.rglob("*"))
    with pytest.raises(OSError, match="not empty"):
        save_orbax(saved, {"a": np.ones(1)})
    assert sorted(saved.rglob("*")) == before
    assert os.listdir(saved.parent) == ["a.orbax"]
    (saved.parent / "empty").mkdir()
    save_orbax(saved.parent / "empty", {"a": np.ones(1)})
    verify(saved.parent / "empty")


@pytest.mark.parametrize(
    ("flat", "why"),
    [
        ({}, "without arrays"),
        ({"a": np.zeros((0, 3))}, "'a', which has no entries"),
        ({"a": np.array([None])}, "'a', of dtype object"),
        ({"a.b": np.ones(1), "a/b": np.ones(1)}, "one name"),
        ({"a..b": np.ones(1)}, r"named 'a\.\.b'"),
    ],
)
def test_what_orbax_cannot_hold(flat: dict, why: str, tmp_path: Path):
    with pytest.raises(ValueError, match=why):
        save_orbax(tmp_path / "a", flat)
    assert not list(tmp_path.iterdir())


def test_damage_is_seen(saved: Path):
    """Each file of a checkpoint: cut, gone, or with a byte changed."""
    files = [f for f in saved.rglob("*") if f.is_file() and f.name != MANIFEST]
    assert len(files) > 5
    verify(saved)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(io.FormatError, match="bytes, but"):
            io.open(saved)
        file.unlink()
        with pytest.raises(io.FormatError, match=r"missing|no Orbax checkpoint|_META"):
            io.open(saved)
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(io.FormatError):
            verify(saved)
        file.write_bytes(content)
    verify(saved)


def test_lost_chunk_is_no_zero(tmp_path: Path):
    """Without our manifest too: a chunk that is gone does not read as zeros."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": jnp.ones(3)})
    (tmp_path / "a" / "w" / "0").unlink()
    with pytest.raises(io.FormatError, match="'w'"):
        read_all(tmp_path / "a")


@pytest.mark.parametrize(
    "edit",
    [
        lambda tree: tree.pop("tree_metadata"),
        lambda tree: tree["tree_metadata"].update(x=3),
        lambda tree: tree["tree_metadata"].update(x={"key_metadata": []}),
        lambda tree: _entry(tree)["key_metadata"][0].update(key=".."),
        lambda tree: _entry(tree)["key_metadata"][0].update(key="../a"),
        lambda tree: _entry(tree)["key_metadata"][0].update(key=7),
        lambda tree: _entry(tree)["key_metadata"][0].update(key="missing"),
        lambda tree: tree.update(use_ocdbt=False),
        lambda tree: tree.update(use_zarr3=True),
        lambda tree: tree["tree_metadata"].update(x=_entry(tree)),
    ],
)
def test_structure_that_lies(edit, tmp_path: Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", {"w": jnp.ones(3)})
    file = tmp_path / "a" / "_METADATA"
    tree = json.loads(file.read_text())
    edit(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(io.FormatError, match=str(tmp_path)):
        io.open(tmp_path / "a")


def _entry(tree: dict) -> dict:
    return next(iter(tree["tree_metadata"].values()))


def test_unfinished_save_of_orbax(tmp_path: Path):
    """What Orbax leaves when it is killed is no checkpoint."""
    (tmp_path / "a" / "d").mkdir(parents=True)
    (tmp_path / "a" / "manifest.ocdbt").write_bytes(b"x")
    with pytest.raises(io.FormatError, match="incomplete"):
        io.open(tmp_path / "a")


def test_io_save_goes_on_in_the_background(tmp_path):
    x = np.arange(6.0, dtype="f4").reshape(2, 3)
    pending = io.save(tmp_path / "a.orbax", {"x": x}, wait=False)
    x[:] = -1
    assert pending is not None
    pending.wait()
    want = np.arange(6.0, dtype="f4").reshape(2, 3)
    np.testing.assert_array_equal(io.load(tmp_path / "a.orbax")["x"], want)
    with pytest.raises(ValueError, match="only Orbax saves in the background"):
        io.save(tmp_path / "a.npz", {"x": x}, wait=False)
