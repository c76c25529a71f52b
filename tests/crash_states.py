"""The states a crash may leave on disk, built from the system calls of one save.

A save runs under strace. Every prefix of its operations is a moment to lose power. At
each, what was synced is there; a name whose folder was not synced since may be missing;
bytes not synced since they were written may be whole, empty or torn. Every such folder
is built and checked. Making a folder is never undone: later operations need it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
import os
from pathlib import Path
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

_CALLS = (
    "openat,creat,write,pwrite64,writev,ftruncate,fsync,fdatasync,rename,renameat,"
    "renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
)
_CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)")
_FD = re.compile(r"(?:AT_FDCWD|\d+)<([^>]*)>")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')

Inode = tuple[str, int] | None  # where a file came from; None is a folder


class Op(NamedTuple):
    """One operation: create, write, sync, rename, unlink or mkdir."""

    kind: str
    path: str
    target: str = ""


class Disk(NamedTuple):
    """Names, files with unsynced bytes, and name changes that are not durable yet."""

    names: dict[str, Inode]
    dirty: set[Inode]
    loose: dict[int, set[str]]  # operation -> folders that must be synced for it


class Report(NamedTuple):
    """How many states came out how, a moment of each, and what the end leaves."""

    outcomes: Counter[str]
    examples: dict[str, str]
    at_end: set[str]

    @property
    def broken(self) -> int:
        return sum(n for kind, n in self.outcomes.items() if kind.startswith("broken"))


def crash_states(
    root: Path, command: Sequence[str], check: Callable[[Path], str]
) -> Report:
    """Runs `command`, which saves below `root`, and checks every state it may leave.

    `check` gets a copy of a state of `root` and says what it found, or raises.
    """
    root = root.resolve()
    with tempfile.TemporaryDirectory(dir=root.parent) as work:
        old = Path(work, "old")
        shutil.copytree(root, old, symlinks=True)
        ops = _trace(root, command, Path(work, "trace"))
        before = _walk(old, "old")
        contents = _contents(root, old, ops, before)
        report = Report(Counter(), {}, set())
        seen: dict[frozenset, str] = {}
        for moment, last, state in _states(ops, before, contents):
            key = frozenset(state.items())
            if key not in seen:
                seen[key] = _judge(Path(work, "state"), state, check)
                report.outcomes[seen[key]] += 1
                report.examples.setdefault(seen[key], moment)
            if last:
                report.at_end.add(seen[key])
    return report


def _states(
    ops: list[Op], before: dict[str, Inode], contents: dict[Inode, bytes]
) -> Iterator[tuple[str, bool, dict[str, bytes | None]]]:
    """(when, at the very end?, relative path -> bytes) of each possible state."""
    for n in range(len(ops) + 1):
        loose = _replay(ops[:n], before).loose
        for skip in (set(), *({i} for i in loose), set(loose)):
            disk = _replay(ops[:n], before, skip)
            for how in ("whole", "empty", "torn"):
                state = {}
                for name, inode in disk.names.items():
                    data = None if inode is None else contents.get(inode, b"")
                    if data and inode in disk.dirty:
                        half = len(data) // 2
                        torn = data[:half] + bytes(len(data) - half)
                        data = {"whole": data, "empty": b"", "torn": torn}[how]
                    state[name] = data
                undone = [ops[i] for i in sorted(skip)]
                moment = f"after {n}: {ops[n - 1 : n]}, undone {undone}, bytes {how}"
                yield moment, n == len(ops), state


def _replay(
    ops: list[Op], before: dict[str, Inode], skip: Collection[int] = ()
) -> Disk:
    """The disk after `ops`, those in `skip` undone."""
    disk = Disk(dict(before), set(), {})
    for i, op in enumerate(ops):
        if op.kind in ("create", "rename", "unlink"):
            touched = (op.path, op.target) if op.kind == "rename" else (op.path,)
            disk.loose[i] = {os.path.dirname(p) for p in touched}
        if op.kind == "sync":
            _sync(disk, ops, op.path)
        elif i not in skip:
            _apply(disk, i, op)
    return disk


def _apply(disk: Disk, i: int, op: Op) -> None:
    """One operation that reached the disk."""
    names = disk.names
    below = lambda path: [q for q in names if q == path or q.startswith(path + "/")]
    if op.kind == "create":
        disk.dirty.add(names.setdefault(op.path, ("new", i)))
    elif op.kind == "mkdir":
        names.setdefault(op.path, None)
    elif op.kind == "write" and op.path in names:
        disk.dirty.add(names[op.path])
    elif op.kind == "unlink":
        for name in below(op.path):
            del names[name]
    elif op.kind == "rename" and op.path in names:
        for name in below(op.target):
            del names[name]
        for name in below(op.path):
            names[op.target + name[len(op.path) :]] = names.pop(name)


def _sync(disk: Disk, ops: list[Op], path: str) -> None:
    """A file's bytes, and the name it was created by; or all names in a folder."""
    if disk.names.get(path) is not None:
        disk.dirty.discard(disk.names[path])
        for i in [i for i in disk.loose if ops[i][:2] == ("create", path)]:
            del disk.loose[i]
        return
    for i, folders in list(disk.loose.items()):
        folders.discard(path)
        if not folders:
            del disk.loose[i]


def _judge(
    folder: Path, state: dict[str, bytes | None], check: Callable[[Path], str]
) -> str:
    """Builds a state and checks it."""
    folder.mkdir()
    for name in sorted(state):
        data = state[name]
        if data is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    try:
        return check(folder)
    except Exception as error:
        return f"broken: {type(error).__name__}"
    finally:
        shutil.rmtree(folder)


def _trace(root: Path, command: Sequence[str], log: Path) -> list[Op]:
    """The operations below `root`, in order, with paths relative to it."""
    strace = [
        "strace",
        "-f",
        "-y",
        "-s",
        "4096",
        "-o",
        str(log),
        "-e",
        f"trace={_CALLS}",
    ]
    subprocess.run([*strace, *command], check=True, capture_output=True)
    pending: dict[str, str] = {}
    ops = []
    for line in log.read_text(errors="replace").splitlines():
        thread, rest = line.split(None, 1)
        if "<unfinished" in rest:
            pending[thread] = rest.split("<unfinished")[0]
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", rest):
            rest = pending.pop(thread, "") + resumed[1]
        call = _CALL.match(rest)
        if call and not call[3].startswith("-") and (op := _op(call[1], call[2])):
            inside = [p for p in op[1:] if p and Path(p).is_relative_to(root)]
            if len(inside) == sum(map(bool, op[1:])):
                relative = [os.path.relpath(p, root) for p in inside]
                ops.append(Op(op.kind, *("" if p == "." else p for p in relative)))
    return ops


def _op(call: str, arguments: str) -> Op | None:
    """The operation of one system call, with absolute paths."""
    texts, fds = _TEXT.findall(arguments), _FD.findall(arguments)
    full = lambda base, p: os.path.normpath(os.path.join(base, p))
    here = fds[0] if fds else os.getcwd()
    if call in ("openat", "creat"):
        if "O_CREAT" in arguments:
            return Op("create", full(here, texts[0]))
        return Op("write", full(here, texts[0])) if "O_TRUNC" in arguments else None
    if call in ("write", "pwrite64", "writev", "ftruncate"):
        return Op("write", fds[0]) if fds else None
    if call in ("fsync", "fdatasync"):
        return Op("sync", fds[0])
    if call.startswith("rename"):
        there = fds[-1] if fds else here
        return Op("rename", full(here, texts[0]), full(there, texts[1]))
    kind = "mkdir" if call.startswith("mkdir") else "unlink"
    return Op(kind, full(here, texts[0]))


def _walk(folder: Path, label: str) -> dict[str, Inode]:
    """Every name below a folder; the files numbered in order."""
    found = sorted(folder.rglob("*"))
    return {
        str(p.relative_to(folder)): None if p.is_dir() else (label, i)
        for i, p in enumerate(found)
    }


def _contents(
    root: Path, old: Path, ops: list[Op], before: dict[str, Inode]
) -> dict[Inode, bytes]:
    """The bytes of every file, old and new, as they were in the end."""
    after = _replay(ops, before).names
    found = {i: (old / n).read_bytes() for n, i in before.items() if i is not None}
    return found | {
        i: (root / n).read_bytes() for n, i in after.items() if i is not None
    }
