"""Two processes save one sharded array, and restore it onto another sharding."""

import os
from pathlib import Path
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxlab import io
from jaxlab.io._shards import verify

WORKER = r"""
import os, sys
from pathlib import Path
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"127.0.0.1:{port}",
    num_processes=2,
    process_id=rank,
    heartbeat_timeout_seconds=10,
    shutdown_timeout_seconds=5,
)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxlab import io
from jaxlab.io._orbax import save_orbax

mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
put = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
host = np.arange(64, dtype=np.float32).reshape(8, 8)
x = jax.make_array_from_callback((8, 8), put("d"), lambda i: host[i])
y = jax.make_array_from_callback((8, 8), put(), lambda i: host[i])
flat = {"a.x": x, "y": y}
assert not x.is_fully_addressable

if "die" in sys.argv:
    from jaxlab.io import _orbax_save
    def die(*_):
        os._exit(9)
    if rank == 1:
        phase = sys.argv[-1]
        if phase == "before":
            die()
        setattr(_orbax_save, phase, die)
    save_orbax(folder / "a", flat)
    raise SystemExit(0)
if "fail" in sys.argv:
    if rank == 0:
        from jaxlab.io import _orbax_save
        def refuse(*_):
            raise OSError(28, "No space left on device")
        _orbax_save.publish = refuse
    try:
        save_orbax(folder / "a", flat)
    except OSError as error:
        print(type(error).__name__, error)
    else:
        raise SystemExit("saved")
    try:
        save_orbax(folder / "taken", flat)
    except OSError as error:
        print(type(error).__name__, error)
    else:
        raise SystemExit("replaced")
else:
    pending = save_orbax(folder / "a", flat, {"k": "v"}, wait=False)
    del x, y, flat
    pending.wait()
    after = {"a": {"x": put(None, "d")}, "y": put("d")}
    for like in (None, {"a": {"x": host}, "y": host}):
        got = io.load(folder / "a", like=like, sharding=after)
        for leaf, want in ((got["a"]["x"], put(None, "d")), (got["y"], put("d"))):
            assert leaf.sharding == want
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, host[shard.index])
    save_orbax(folder / "b", {"a.x": got["a"]["x"], "y": got["y"]})
jax.distributed.shutdown()
"""


def run(folder: Path, *words: str) -> tuple[list[int], list[str], list[str]]:
    """Runs two workers of two devices each: exit codes, output, errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # More threads than cores: forced host devices deadlock otherwise.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    flags |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "32"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, str(folder), *words],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [worker.communicate(timeout=100) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    outputs, errors = zip(*ends, strict=True)
    return [worker.returncode for worker in workers], list(outputs), list(errors)


def test_two_processes_save_and_reshard(tmp_path: Path):
    codes, _, errors = run(tmp_path)
    assert codes == [0, 0], errors
    host = np.arange(64, dtype=np.float32).reshape(8, 8)
    for name in ("a", "b"):
        verify(tmp_path / name)
        got = io.load(tmp_path / name)
        np.testing.assert_array_equal(got["a"]["x"], host)
        np.testing.assert_array_equal(got["y"], host)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_all_processes_hear_of_a_failure(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    codes, (first, second), errors = run(tmp_path, "fail")
    assert codes == [0, 0], errors
    assert "No space left" in first
    assert "not empty" in first
    assert "the first process could not finish" in second
    assert "the first process refused" in second
    assert sorted(os.listdir(tmp_path)) == ["taken"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before", "_commit", "_files"])
def test_no_commit_without_all(phase: str, tmp_path: Path):
    """One process dies before, between and after the writes: the other says so."""
    codes, _, errors = run(tmp_path, "die", phase)
    assert codes[1] == 9, errors
    assert codes[0] != 0, errors
    assert not (tmp_path / "a").exists()
