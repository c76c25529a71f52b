"""A model folder written by a job that may be interrupted at any moment.

Shards grow in a hidden folder beside the target, which appears whole at the end. What
the job is (its inputs, recipe and seed) is written first, so that only the same job can
go on where one stopped; every finished shard is in the manifest with its checksum.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
import hashlib
import json
from pathlib import Path
import shutil
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from ._atomic import atomic_bytes, folder_lock, publish, sweep, vacant
from ._errors import FormatError
from ._header import Entry
from ._safetensors import safetensors_writer
from ._shards import (
    INDEX,
    MANIFEST,
    Listed,
    index_bytes,
    manifest_bytes,
    plan_shards,
    read_manifest,
)

JOB = "jaxlab_job.json"
_AHEAD = 4  # blocks that may wait for the disk


class Job(NamedTuple):
    """What is to be written, and what makes it this job and no other."""

    out: Path
    entries: tuple[Entry, ...]  # the tensors, in order
    facts: Mapping[str, Any]  # inputs, recipe, seed: JSON
    files: Mapping[str, bytes]  # config, tokenizer and the like
    shard_size: float = 5e9


class Written(NamedTuple):
    """What a job wrote."""

    files: tuple[str, ...]
    resumed: tuple[str, ...]  # those found finished


Blocks = Iterable[tuple[str, Iterable[np.ndarray]]]
"""Pairs (tensor name, its blocks in order)."""


def run(
    job: Job, compute: Callable[[Sequence[str]], Blocks], *, resume: bool = False
) -> Written:
    """Writes the shards of a job, then everything else, then publishes the folder.

    Args:
      job: what to write.
      compute: called with the names of the tensors that are still to be made.
      resume: go on where an interrupted run of this job stopped.

    Returns:
      The files of the folder, and which of them were finished before.

    Raises:
      ValueError: the target is taken, or holds or is another job.
      OSError: the disk is full or read-only. The target stays as it was.
    """
    shards = plan_shards(job.entries, job.shard_size)
    facts = {"jaxlab": __version__, **job.facts}
    identity = _json({**facts, "shards": [[n, _layout(e)] for n, e in shards]})
    if resume and _complete(job.out, identity):
        files = tuple(read_manifest(job.out) or {})
        return Written((*files, MANIFEST), files)
    free(job.out)
    staging = job.out.parent / f".{job.out.name}.partial"
    with _staging(staging, identity, resume) as done:
        found = tuple(done)
        todo = [(name, held) for name, held in shards if name not in done]
        blocks = iter(compute([e.name for _, held in todo for e in held]))
        for name, held in todo:
            done[name] = _shard(staging / name, held, blocks)
            atomic_bytes(staging / MANIFEST, manifest_bytes(done))
        rest = dict(job.files)
        if len(shards) > 1:
            rest[INDEX] = index_bytes(shards)
        for name, data in rest.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_bytes(staging / name, data)
            done[name] = Listed(len(data), hashlib.sha256(data).hexdigest())
        done[JOB] = Listed(len(identity), hashlib.sha256(identity).hexdigest())
        atomic_bytes(staging / MANIFEST, manifest_bytes(done))
        publish(staging, job.out)
    return Written((*done, MANIFEST), found)


def free(out: Path) -> None:
    """Refuses a target that something else is in."""
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent} to put it in")
    try:
        vacant(out)
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}; name another output") from None


@contextmanager
def _staging(folder: Path, identity: bytes, resume: bool) -> Any:
    """The hidden folder, locked; yields the shards in it that are finished.

    After an error it stays where it holds a finished shard, and is removed otherwise.
    """
    existed = folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with folder_lock(folder):
            if existed and (folder / JOB).exists():
                done = _unfinished(folder, identity, resume)
            else:
                done = {}
                atomic_bytes(folder / JOB, identity)
            try:
                yield done
            except BaseException as error:
                if not done:
                    shutil.rmtree(folder, ignore_errors=True)
                elif not isinstance(error, GeneratorExit):
                    error.add_note(f"{len(done)} files are finished: resume to go on")
                raise
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is writing this output") from None


def _unfinished(folder: Path, identity: bytes, resume: bool) -> dict[str, Listed]:
    """The finished shards of an interrupted run of this same job."""
    if not resume:
        raise ValueError(
            f"{folder} holds an unfinished run: resume it (--resume), or remove it"
        )
    if (folder / JOB).read_bytes() != identity:
        raise ValueError(
            f"{folder} holds an unfinished run with other inputs, recipe, seed, shard "
            "size or version: remove it to start anew"
        )
    sweep(folder, age=0)
    done = {}
    for name, listed in (read_manifest(folder) or {}).items():
        path = folder / name
        if name.endswith(".safetensors") and _matches(path, listed):
            done[name] = listed
    return done


def _complete(out: Path, identity: bytes) -> bool:
    """Is the target this very job, finished?"""
    try:
        if not (out / JOB).is_file() or (out / JOB).read_bytes() != identity:
            return False
        listed = read_manifest(out) or {}
    except (OSError, FormatError):
        return False
    return bool(listed) and all(_matches(out / n, x) for n, x in listed.items())


def _matches(path: Path, listed: Listed) -> bool:
    """Does a file have the size and checksum it should?"""
    if not path.is_file() or path.stat().st_size != listed.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == listed.sha256


def _shard(path: Path, held: Sequence[Entry], blocks: Any) -> Listed:
    """Writes one shard, on a thread of its own, as its blocks are computed."""
    waiting: list[Future[None]] = []
    with (
        ThreadPoolExecutor(1) as writer,
        safetensors_writer(path, held, {"format": "pt"}) as write,
    ):
        for entry in held:
            name, parts = next(blocks)
            assert name == entry.name, (name, entry.name)
            for part in parts:
                waiting.append(writer.submit(write, part))
                if len(waiting) > _AHEAD:
                    waiting.pop(0).result()
        for future in waiting:
            future.result()
    return Listed(write.size, write.sha256)


def _layout(entries: Sequence[Entry]) -> list[list[Any]]:
    return [[e.name, e.dtype.name, list(e.shape)] for e in entries]


def _json(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode()
