"""Evaluates a function of whole leaves block by block, from its jaxpr."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ._blocks import Block, block
from ._program import Program, program
from ._select import Search
from ._split import KTH, Split, Splits, Stat, split

ROOM = 1 << 24  # values that the search for one order statistic may keep


class Leaf(NamedTuple):
    """The inputs that make up one leaf: arrays, and the axis of each that is cut."""

    avals: tuple[jax.ShapeDtypeStruct, ...]
    axes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The length of the axis that is cut."""
        return self.avals[0].shape[self.axes[0]]


class Passes(NamedTuple):
    """A function of leaves, ready to be evaluated in blocks of rows."""

    program: Program
    splits: Splits
    leaves: tuple[Leaf, ...]
    stats: tuple[tuple[Stat, ...], ...]  # what each pass over the data finds out

    @property
    def stages(self) -> int:
        """How many passes come before the one that writes the result."""
        return len(self.stats)


Blocks = Callable[[int, bool], Iterator[tuple[int, Sequence[Any]]]]
"""`blocks(leaf, sample)` yields (first row, the leaf's inputs cut to a block)."""


def passes(fn: Callable[..., Sequence[Any]], leaves: Sequence[Leaf]) -> Passes:
    """Splits a function of whole leaves into passes over blocks of their rows.

    The function is traced once, at full size. Each value of its jaxpr is either small
    or cut along the rows of one leaf; a sum, maximum, matrix product or k-th largest
    over the rows ends a pass. Random bits are drawn block by block, and are those that
    the whole function would draw.

    Args:
      fn: takes one tuple of arrays per leaf, returns one array per leaf, each with the
        leaf's rows on axis 0.
      leaves: what it will be called with.

    Returns:
      What `statistics` and `results` need.

    Raises:
      ValueError: an operation whose result in a block depends on other blocks, such as
        a sort along the rows; names it.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = Leaf((jax.ShapeDtypeStruct((1000,), jnp.float32),), (0,))
      >>> passes(lambda x: [x[0] / jnp.sum(x[0])], [leaf]).stages
      1
    """
    code, _ = program(lambda *xs: list(fn(*xs)), *[x.avals for x in leaves], keep=[KTH])
    cut, at = {}, iter(code.inputs)
    for group, leaf in enumerate(leaves):
        for axis in leaf.axes:
            cut[next(at)] = Split(group, axis, 1)
    want = {out: Split(group, 0, 1) for group, out in enumerate(code.outputs)}
    splits = split(code, cut, want, [leaf.rows for leaf in leaves])
    last = max([splits.stage[s.value] for s in splits.stats], default=0)
    by_stage = [
        tuple(s for s in splits.stats if splits.stage[s.value] == i + 1)
        for i in range(last)
    ]
    return Passes(code, splits, tuple(leaves), tuple(by_stage))


def statistics(plan: Passes, blocks: Blocks) -> dict[int, Any]:
    """Runs every pass but the last: all that the result needs to know of the whole.

    Args:
      plan: from `passes`.
      blocks: `blocks(leaf, sample)` yields (first row, arrays); with `sample` it may
        yield any one block's worth of rows spread over the leaf.

    Returns:
      The values that `results` needs, by number.

    Example:
      >>> import jax.numpy as jnp
      >>> leaf = Leaf((jax.ShapeDtypeStruct((4,), jnp.float32),), (0,))
      >>> plan = passes(lambda x: [x[0] / jnp.sum(x[0])], [leaf])
      >>> read = lambda i, sample: ((r, [np.ones(2, "f4")]) for r in (0, 2))
      >>> known = statistics(plan, read)
      >>> [(row, y.tolist()) for row, y in results(plan, known, 0, read)]
      [(0, [0.25, 0.25]), (2, [0.25, 0.25])]
    """
    known: dict[int, Any] = dict(plan.program.consts)
    with jax.enable_x64(True):
        for stats in plan.stats:
            known.update(_gather(plan, stats, known, blocks))
    return known


def results(
    plan: Passes, known: dict[int, Any], leaf: int, blocks: Blocks
) -> Iterator[tuple[int, jax.Array]]:
    """Runs the last pass over one leaf.

    Args:
      plan: from `passes`.
      known: from `statistics`.
      leaf: which leaf.
      blocks: as for `statistics`.

    Yields:
      (first row, the result's rows), in order.
    """
    out = plan.program.outputs[leaf]
    code = block(plan.program, plan.splits, [out], frozenset(known))
    for row, (value,) in _run(plan, code, leaf, known, blocks, sample=False):
        yield row, value


def flat(fn: Callable[..., Sequence[Any]], leaves: Sequence[Leaf]) -> Passes | None:
    """The passes over flattened leaves, where their shapes make no difference.

    They make none when the function, traced on the leaves as they are and as long
    axes, takes the same steps on values of the same sizes. Then blocks may begin
    anywhere, and leaves of one size share their executables.

    Args:
      fn: as for `passes`; it is called with leaves of either shape.
      leaves: what it will be called with.

    Returns:
      As `passes`, for leaves with all axes from the cut one on made one; or None.
    """

    def long(x: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        size = int(np.prod(x.shape[axis:], dtype=np.int64))
        return jax.ShapeDtypeStruct((*x.shape[:axis], size), x.dtype)

    flats = [
        Leaf(tuple(map(long, leaf.avals, leaf.axes)), leaf.axes) for leaf in leaves
    ]
    try:
        plan = passes(lambda *xs: [y.reshape(-1) for y in fn(*xs)], flats)
        avals = [x.avals for x in leaves]
        whole, _ = program(lambda *xs: list(fn(*xs)), *avals, keep=[KTH])
    except (TypeError, ValueError, IndexError):
        return None
    return plan if _steps(plan.program) == _steps(whole) else None


def leafwise(fn: Callable[[Any], Any], tree: Any) -> bool:
    """Does every output leaf depend on the input leaf of its own path alone?

    Args:
      fn: a function from a tree to a tree of the same paths.
      tree: an example, arrays or shapes, of at least two leaves.

    Returns:
      True where it does, as the jaxpr says.

    Example:
      >>> import jax.numpy as jnp
      >>> whole = lambda t: jax.tree.map(lambda x: x / jnp.max(t["a"]), t)
      >>> leafwise(whole, {"a": jnp.ones(2), "b": jnp.ones(2)})
      False
    """
    code, _ = program(fn, tree)
    feeds: dict[int, set[int]] = {v: {v} for v in code.inputs}
    for op in code.ops:
        sources = set().union(*(feeds.get(i, set()) for i in op.inputs))
        feeds.update(dict.fromkeys(op.outputs, sources))
    return all(
        feeds.get(out, set()) <= {own}
        for own, out in zip(code.inputs, code.outputs, strict=True)
    )


def _steps(code: Program) -> list[tuple[Any, ...]]:
    """The operations that compute, with the sizes of what they make."""
    return [
        (op.name, *(code.avals[o].size for o in op.outputs))
        for op in code.ops
        if op.name not in ("reshape", "squeeze")
    ]


def _run(
    plan: Passes,
    code: Block,
    group: int,
    known: dict[int, Any],
    blocks: Blocks,
    *,
    sample: bool,
) -> Iterator[tuple[int, list[Any]]]:
    """Calls a block's function on every block of a leaf."""
    first = sum(len(leaf.avals) for leaf in plan.leaves[:group])
    place = [plan.program.inputs.index(v) - first for v in code.blocks]
    values = [known[v] for v in code.known]
    for row, arrays in blocks(group, sample):
        yield row, code.run(np.uint64(row), values, [arrays[i] for i in place])


def _gather(
    plan: Passes, stats: Sequence[Stat], known: dict[int, Any], blocks: Blocks
) -> dict[int, Any]:
    """One stage: reduces over all blocks, in as many passes as the searches need."""
    totals: dict[int, np.ndarray] = {}
    searches: dict[int, list[Search]] = {}
    ready = frozenset(known)
    groups = sorted({g for s in stats for g in s.groups})
    codes = {g: _stage_code(plan, stats, g, ready) for g in groups}
    if any(s.how == "kth" for s in stats):
        searches = _searches(plan, stats, groups, codes, known, blocks)
    first = True
    while first or any(s.answer is None for rows in searches.values() for s in rows):
        for g in groups:
            code, own = codes[g]
            for _, values in _run(plan, code, g, known, blocks, sample=False):
                _count(plan, own, values, totals if first else {}, searches)
        for rows in searches.values():
            for search in rows:
                search.turn()
        first = False
    found = {v: np.array([s.answer for s in rows]) for v, rows in searches.items()}
    return {
        v: np.asarray(x, plan.program.avals[v].dtype).reshape(
            plan.program.avals[v].shape
        )
        for v, x in {**totals, **found}.items()
    }


def _stage_code(
    plan: Passes, stats: Sequence[Stat], group: int, ready: frozenset[int]
) -> tuple[Block, list[tuple[Stat, int]]]:
    """The function of a block that yields every part this leaf adds to a stage."""
    targets, own = [], []
    for stat in stats:
        if stat.how != "kth":
            mine = [stat.value] if group in stat.groups else []
        else:
            parts = stat.op.inputs[1:]
            mine = [v for v in parts if plan.splits.splits[v].group == group]
        targets += mine
        own += [(stat, v) for v in mine]
    return block(plan.program, plan.splits, targets, ready), own


def _count(
    plan: Passes,
    own: Sequence[tuple[Stat, int]],
    values: Sequence[Any],
    totals: dict[int, np.ndarray],
    searches: dict[int, list[Search]],
) -> None:
    """Adds one block's parts to the running totals and searches."""
    del plan
    join = {"sum": np.add, "max": np.maximum, "min": np.minimum}
    for (stat, _), value in zip(own, values, strict=True):
        part = np.asarray(value)
        if stat.how == "kth":
            for search, row in zip(searches[stat.value], part, strict=True):
                search.feed(row)
            continue
        wide = part.astype(_wide(part.dtype))
        old = totals.get(stat.value)
        totals[stat.value] = wide if old is None else join[stat.how](old, wide)


def _wide(dtype: np.dtype) -> Any:
    """Totals are kept in 64 bits."""
    return {"f": np.float64, "i": np.int64, "u": np.uint64, "b": np.bool_}.get(
        dtype.kind, np.float64
    )


def _searches(
    plan: Passes,
    stats: Sequence[Stat],
    groups: Sequence[int],
    codes: dict[int, tuple[Block, list[tuple[Stat, int]]]],
    known: dict[int, Any],
    blocks: Blocks,
) -> dict[int, list[Search]]:
    """Starts the searches of a stage, narrowed by a sample where the data is large."""
    out: dict[int, list[Search]] = {}
    kth = [s for s in stats if s.how == "kth"]
    total = {s.value: 0 for s in kth}
    for s in kth:
        for v in s.op.inputs[1:]:
            shape = plan.program.avals[v].shape
            total[s.value] += int(np.prod(shape[1:], dtype=np.int64))
        ranks = _ranks(plan, s, frozenset(known), known)
        dtype = plan.program.avals[s.value].dtype
        room = ROOM // max(1, len(ranks) * len(kth))
        out[s.value] = [Search(int(r), dtype, room) for r in ranks]
    large = [s for s in kth if any(total[s.value] > x.room for x in out[s.value])]
    if not large:
        return out
    samples: dict[int, list[np.ndarray]] = {s.value: [] for s in large}
    for g in groups:
        code, own = codes[g]
        for _, values in _run(plan, code, g, known, blocks, sample=True):
            for (stat, v), value in zip(own, values, strict=True):
                if stat.value in samples:
                    shape = plan.program.avals[v].shape
                    size = int(np.prod(shape[1:], dtype=np.int64))
                    part = np.asarray(value).reshape(shape[0], -1)
                    keep = max(1, round((1 << 20) * size / total[stat.value]))
                    step = max(1, part.shape[1] // keep)
                    samples[stat.value].append(part[:, ::step])
    for s in large:
        for search, row in zip(
            out[s.value], np.concatenate(samples[s.value], 1), strict=True
        ):
            search.guess(row, total[s.value])
    return out


def _ranks(
    plan: Passes, stat: Stat, ready: frozenset[int], known: dict[int, Any]
) -> np.ndarray:
    """The ranks of a search, which are known before its pass."""
    code = block(plan.program, plan.splits, [stat.op.inputs[0]], ready)
    (ranks,) = code.run(np.uint64(0), [known[v] for v in code.known], [])
    return np.asarray(ranks).reshape(-1)
