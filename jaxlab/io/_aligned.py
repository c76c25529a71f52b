"""A checkpoint permuted onto another: matched in memory, read a tensor at a time."""

from collections.abc import Callable, Mapping
import dataclasses as dc
import functools as ft
import hashlib
import math
from threading import Lock
from typing import Any, NamedTuple

import jax
import numpy as np

from .. import rewrite, tree
from ._checkpoint import Checkpoint, Tensor
from ._errors import refuse
from ._feed import finite
from ._forward import Forward
from ._names import to_path, unflatten
from ._run import is_float
from ._steps import is_buffer


class Alignment(NamedTuple):
    """Which units of a model go where, to lie near another."""

    symmetries: rewrite.Symmetries
    permutations: Mapping[str, np.ndarray]
    names: Mapping[str, str]  # of tensors, by the path of their leaf
    before: float  # ‖a - b‖ / ‖a‖
    after: float

    @property
    def moved(self) -> dict[str, float]:
        """By group, the share of units that are not where they were."""
        tables = self.permutations.items()
        return {n: float((t != np.arange(t.shape[-1])).mean()) for n, t in tables}

    @property
    def digest(self) -> str:
        """A checksum of the permutations: a run that differs must not be resumed."""
        found = hashlib.sha256()
        for name, table in sorted(self.permutations.items()):
            found.update(f"{name} {table.shape}\n".encode())
            found.update(np.ascontiguousarray(table, "<i4").tobytes())
        return found.hexdigest()


def symmetries(checkpoint: Checkpoint, forward: Forward) -> rewrite.Symmetries:
    """The symmetries of a model; no tensor is read.

    Raises:
      ValueError: the forward does not fit the tensors; names the checkpoint.
    """
    shapes = _tree(checkpoint, lambda t: jax.ShapeDtypeStruct(t.shape, t.dtype))
    try:
        return rewrite.symmetries(forward.apply, shapes, *forward.inputs)
    except (ValueError, TypeError, KeyError) as error:
        why = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{checkpoint.path}: {why}") from None


def check(a: Checkpoint, b: Checkpoint) -> None:
    """Raises where two models differ in a tensor's name or shape."""
    for name in sorted(a.tensors.keys() ^ b.tensors.keys()):
        if is_buffer(name):
            continue
        lacks, has = (b, a) if name in a.tensors else (a, b)
        raise ValueError(f"tensor {name!r} is in {has.path} but not in {lacks.path}")
    for name in a.tensors.keys() & b.tensors.keys():
        t, shape = a.tensors[name], b.tensors[name].shape
        if shape != t.shape and not is_buffer(name):
            raise ValueError(
                f"{name!r} has shape {shape} in {b.path}, but {t.shape} in {a.path}"
            )


def match(
    a: Checkpoint,
    b: Checkpoint,
    found: rewrite.Symmetries,
    *,
    seed: int,
    seen: Callable[[int], Any] = lambda _: None,
) -> Alignment:
    """Finds the permutations of b by weight matching; both are in memory meanwhile.

    Raises:
      ValueError: a tensor is in one of them only, differs in shape, or is not finite.
    """
    from .. import align  # other matchings need optax, which takes time to import

    check(a, b)

    def loaded(t: Tensor) -> jax.Array:
        seen(t.nbytes)
        values = t.read()
        if is_float(t.dtype) and not finite(values):
            why = "holds NaN or infinity: it can be matched to nothing"
            raise refuse(t.file, why, tensor=t.name)
        return jax.device_put(values)

    with jax.enable_x64(any(t.dtype.itemsize == 8 for t in a.tensors.values())):
        one, two = _tree(a, loaded), _tree(b, loaded)
        key = jax.random.key(seed)
        tables = align.weight_matching(one, two, found, key=key)
        before, after = (
            _distance(one, x) for x in (two, rewrite.permute(two, found, tables))
        )
    paths = _tree(b, lambda t: t.name)
    names = dict(zip(tree.paths(paths), jax.tree.leaves(paths), strict=True))
    held = {name: np.asarray(table) for name, table in tables.items()}
    return Alignment(found, held, names, before, after)


def aligned(b: Checkpoint, alignment: Alignment) -> Checkpoint:
    """The checkpoint with its units permuted, to the bit; its files stay its own."""
    moved: dict[str, list[rewrite.Group]] = {}
    for group in alignment.symmetries.groups:
        for path in dict.fromkeys(m.path for m in group.members):
            here = tuple(m for m in group.members if m.path == path)
            moved.setdefault(path, []).append(group._replace(members=here))
    slot: list[tuple[str, np.ndarray]] = []
    lock, tensors = Lock(), dict(b.tensors)
    for path, groups in moved.items():
        old = b.tensors[alignment.names[path]]
        here = rewrite.Symmetries(tuple(groups))
        tables = {g.name: alignment.permutations[g.name] for g in groups}
        make = ft.partial(_permuted, old, path, here, tables)
        read = ft.partial(_read, make, old.name, slot, lock)
        tensors[old.name] = dc.replace(old, read_into=read)
    return dc.replace(b, tensors=tensors, shut=lambda: None)


def _permuted(
    tensor: Tensor, path: str, here: rewrite.Symmetries, tables: dict[str, Any]
) -> np.ndarray:
    """The bytes of a permuted tensor; entries are moved as they are, NaNs too."""
    raw = tensor.read()
    bits = raw.view(f"u{raw.dtype.itemsize}")
    with jax.enable_x64(raw.dtype.itemsize == 8):
        out = np.asarray(rewrite.permute({path: bits}, here, tables)[path])
    return np.ascontiguousarray(out).reshape(-1).view(np.uint8)


def _read(
    make: Callable[[], np.ndarray],
    name: str,
    slot: list[tuple[str, np.ndarray]],
    lock: Lock,
    buffer: np.ndarray,
    first: int,
) -> None:
    """Fills a buffer from a permuted tensor; one of each model is kept."""
    with lock:
        if not slot or slot[0][0] != name:
            slot[:] = [(name, make())]
        held = slot[0][1]
    buffer[:] = held[first : first + len(buffer)]


def _tree(checkpoint: Checkpoint, leaf: Callable[[Tensor], Any]) -> Any:
    """The tensors as the tree that `load` makes of them, without buffers."""
    tensors = checkpoint.tensors.items()
    return unflatten({to_path(n): leaf(t) for n, t in tensors if not is_buffer(n)})


def _distance(a: Any, b: Any) -> float:
    """‖a - b‖ / ‖a‖ over the floating-point leaves."""
    gap = size = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
            x, y = (np.asarray(v).astype(np.float64) for v in (x, y))
            gap, size = gap + float(np.sum((x - y) ** 2)), size + float(np.sum(x**2))
    return math.sqrt(gap / size) if size else 0.0
