"""Writers under power loss and SIGKILL: old or new, nothing else."""

import os
from pathlib import Path
import shutil
import subprocess
import sys

from corpus.reading import version_of
from crash_states import crash_states
import numpy as np
import pytest

from jaxlab import io
from jaxlab.io._atomic import (
    sweep,
)

SAVE = """
import os, sys
sync, left_out = os.fsync, set(map(int, sys.argv[3].split(",")))
calls = iter(range(10**9))
os.fsync = lambda fd: None if left_out & {-1, next(calls)} else sync(fd)
import numpy as np
from jaxlab import io
x = np.full(4096, float(sys.argv[2]), np.float32)
io.save(sys.argv[1], {"a": x, "b": x + 10}, shard_size=20_000)
"""
NONE, ALL = "-2", "-1"


def save_command(path: Path, version: int, left_out: str = NONE) -> list[str]:
    return [sys.executable, "-B", "-c", SAVE, str(path), str(version), left_out]


# ---------------------------------------------------------------- power loss

needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None
    or subprocess.run(["strace", "-o", os.devnull, "true"], check=False).returncode
    != 0,
    reason="needs strace and the right to trace a child",
)


def lose_power(tmp_path: Path, name: str, left_out: str):
    """Every state a crash may leave of version 2 over 1 (a folder: over none)."""
    root = tmp_path / "root"
    root.mkdir()
    if name.endswith(".safetensors"):
        x = np.full(4096, 1, np.float32)
        io.save(root / name, {"a": x, "b": x + 10})
    command = save_command(root / name, 2, left_out)
    return crash_states(root, command, lambda state: version_of(state / name))


@needs_strace
@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_no_crash_breaks_a_save(tmp_path: Path, name: str):
    report = lose_power(tmp_path, name, NONE)
    before = "old" if "." in name else "none"
    assert report.broken == 0, report.examples
    assert set(report.outcomes) == {before, "new"}
    assert report.at_end == {"new"}
    assert report.outcomes.total() >= 5


@needs_strace
@pytest.mark.parametrize("name", ["a.safetensors", "folder"])
def test_a_save_without_fsync_breaks(tmp_path: Path, name: str):
    """The simulation can see the difference."""
    assert lose_power(tmp_path, name, ALL).broken > 0


@needs_strace
def test_each_fsync_of_a_file_is_needed(tmp_path: Path):
    (tmp_path / "1").mkdir()
    assert lose_power(tmp_path / "1", "a.safetensors", "0").broken > 0
    (tmp_path / "2").mkdir()
    report = lose_power(tmp_path / "2", "a.safetensors", "1")
    assert report.broken == 0
    assert report.at_end == {"new", "old"}  # an acknowledged save may be lost


@needs_strace
def test_the_simulator_finds_a_known_bug(tmp_path: Path):
    """The reference writer renames without fsync: two of its states are broken."""
    root = tmp_path / "root"
    root.mkdir()
    x = np.full(4096, 1, np.float32)
    io.save(root / "a.safetensors", {"a": x, "b": x + 10})
    code = (
        "import sys, numpy as np; from safetensors.numpy import save_file\n"
        "x = np.full(4096, 2, np.float32)\n"
        "save_file({'a': x, 'b': x + 10}, sys.argv[1])"
    )
    command = [sys.executable, "-B", "-c", code, str(root / "a.safetensors")]
    check = lambda state: version_of(state / "a.safetensors")
    assert crash_states(root, command, check).broken == 2


# ---------------------------------------------------------------- kills

KILLS = """
import os, random, signal, sys, time
import numpy as np
from jaxlab import io

path, kills, draw = sys.argv[1], int(sys.argv[2]), random.Random(0)

def save_forever(version, pipe):
    while True:
        version += 1
        x = np.full(20_000, version, np.float32)
        io.save(path, {"a": x, "b": x + 10})
        os.write(pipe, version.to_bytes(4, "little"))

start, first = time.monotonic(), np.zeros(20_000, np.float32)
for _ in range(5):
    io.save(path, {"a": first, "b": first + 10})
usual = (time.monotonic() - start) / 5
version, inside = 0, 0
for _ in range(kills):
    ear, mouth = os.pipe()
    child = os.fork()
    if not child:
        save_forever(version, mouth)
    os.close(mouth)
    time.sleep(draw.uniform(0, 5 * usual))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = os.read(ear, 2**16)
    os.close(ear)
    told = int.from_bytes(said[-4:], "little") if said else version
    with io.open(path) as checkpoint:
        a, b = (checkpoint.tensors[name].read() for name in "ab")
    assert (a == a[0]).all() and (b == a[0] + 10).all(), "broken"
    assert int(a[0]) in (told, told + 1), f"said {told}, found {a[0]}"
    version = int(a[0])
    inside += len(os.listdir(os.path.dirname(path))) > 1
print(version, inside)
"""


def test_kill_at_random_moments(tmp_path: Path):
    """SIGKILL in a save loop: whole, and never older than what was acknowledged."""
    command = [sys.executable, "-W", "ignore", "-c", KILLS]
    command += [str(tmp_path / "a.safetensors"), "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saved, inside = map(int, done.stdout.split())
    assert saved > 10  # it did save
    assert inside > 0  # and some kills fell inside a save
    assert sweep(tmp_path, age=0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
