"""The few tree operations that jax.tree lacks.

A path reads `block_0/attn/kernel`: the keys of a leaf, joined by slashes.
"""

from collections.abc import Callable, Sequence
import fnmatch
import functools as ft
import re
from typing import Any, Literal
import zlib

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, Shaped
import numpy as np

from .types import Params, Stacked, Where

__all__ = [
    "add",
    "check_like",
    "combine",
    "cosine",
    "count",
    "dot",
    "glob",
    "keys_like",
    "kth_largest",
    "norm",
    "partition",
    "path_map",
    "paths",
    "scale",
    "stack",
    "subtract",
    "unstack",
    "widen",
]


def path_map(fn: Callable[..., Any], tree: Params, *rest: Params) -> Any:
    """Maps `fn(path, leaf, *leaves)` over trees of one structure.

    Args:
      fn: called once per leaf, with its slash path first.
      tree: the tree that gives the structure.
      *rest: trees of which `tree` is a prefix.

    Returns:
      The tree of results.

    Example:
      >>> path_map(lambda path, x: f"{path}={x}", {"a": {"b": 1}})
      {'a': {'b': 'a/b=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda p, *xs: fn(_slash(p), *xs), tree, *rest
    )


def paths(tree: Params) -> list[str]:
    """The slash path of every leaf, in leaf order.

    Args:
      tree: any pytree.

    Returns:
      One string per leaf, in the order of `jax.tree.leaves`.

    Example:
      >>> paths({"b": 0, "a": [1, 2]})
      ['a/0', 'a/1', 'b']
    """
    return [_slash(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def glob(*patterns: str) -> Where:
    """A predicate that holds where the path matches any of the patterns.

    `*` matches within one path component, `**` any number of components.

    Args:
      *patterns: for example `"**/attn/*"`.

    Returns:
      A predicate on (path, leaf).

    Raises:
      ValueError: no pattern, or an empty one.

    Example:
      >>> where = glob("**/attn/*", "head/kernel")
      >>> [where(p, None) for p in ("b_0/attn/q", "attn/q", "head/bias")]
      [True, True, False]
    """
    if not patterns or not all(patterns):
        raise ValueError("glob needs at least one pattern, and none may be empty")
    regex = re.compile("|".join(f"(?:{_regex(p)})" for p in patterns))

    def where(path: str, leaf: Any) -> bool:
        del leaf
        return regex.fullmatch(path) is not None

    return where


def stack(trees: Sequence[Params]) -> Stacked:
    """Stacks k models of one structure on a new axis 0.

    Args:
      trees: k trees with the same paths and shapes.

    Returns:
      A tree of `[k, *leaf]`.

    Raises:
      ValueError: no tree, or two that differ; names the first leaf that does.

    Example:
      >>> stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
      (2, 2)
    """
    if not trees:
        raise ValueError("stack needs at least one tree")
    for i, other in enumerate(trees[1:], 1):
        check_like(other, trees[0], name=f"trees[{i}]")
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def unstack(stacked: Stacked) -> list[Params]:
    """The k models of a stack: the inverse of `stack`.

    Args:
      stacked: a tree of `[k, *leaf]`.

    Returns:
      A list of k trees.

    Raises:
      ValueError: a leaf has no axis 0, or two leaves disagree on k.

    Example:
      >>> [t["w"].shape for t in unstack({"w": jnp.zeros((3, 2))})]
      [(2,), (2,), (2,)]
    """
    k = _models(stacked)
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(k)]


def check_like(tree: Params, ref: Params, *, name: str = "tree") -> None:
    """Raises where the two trees differ in structure or shape.

    Args:
      tree: the tree to check.
      ref: the tree it should look like.
      name: what the error calls `tree`.

    Raises:
      ValueError: names the first path, in sorted order, that differs.

    Example:
      >>> check_like({"w": jnp.zeros(3)}, {"w": jnp.zeros(2)}, name="b")
      Traceback (most recent call last):
      ValueError: b differs at 'w': shape (3,), expected (2,)
    """
    got, want = _shapes(tree), _shapes(ref)
    for path in sorted(got.keys() | want.keys()):
        if path not in got:
            raise ValueError(f"{name} has no leaf {path!r}")
        if path not in want:
            raise ValueError(f"{name} has an extra leaf {path!r}")
        if got[path] != want[path]:
            raise ValueError(
                f"{name} differs at {path!r}: shape {got[path]}, expected {want[path]}"
            )
    if jax.tree.structure(tree) != jax.tree.structure(ref):
        raise ValueError(
            f"{name} has the paths but not the containers of the other tree: "
            f"{jax.tree.structure(tree)} against {jax.tree.structure(ref)}"
        )


def keys_like(key: PRNGKeyArray, tree: Params) -> Params:
    """One key per leaf, folded from its path: a new leaf disturbs no other draw.

    Args:
      key: consumed.
      tree: the tree to make keys for.

    Returns:
      A tree of keys.

    Example:
      >>> one = keys_like(jax.random.key(0), {"w": 0})
      >>> two = keys_like(jax.random.key(0), {"a": 0, "w": 0})
      >>> bool(one["w"] == two["w"])
      True
    """
    return path_map(
        lambda path, _: jax.random.fold_in(key, zlib.crc32(path.encode())), tree
    )


def widen(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Casts to at least float32: accumulate wide, return narrow.

    Args:
      x: a floating-point array of any width.

    Returns:
      `x` in float32, or as it is where it is that wide already.

    Raises:
      ValueError: `x` is not floating-point.

    Example:
      >>> widen(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected floating-point values, got {x.dtype}")
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def add(a: Params, b: Params) -> Params:
    """Adds two trees leaf by leaf, in at least float32, in the dtypes of `a`.

    Args:
      a: one tree; its leaves give the result's dtypes.
      b: another of the same structure.

    Returns:
      $a + b$.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> add({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
      {'w': Array([2., 2.], dtype=float32)}
    """
    check_like(b, a, name="b")
    return jax.tree.map(lambda x, y: _together(jnp.add, x, y), a, b)


def subtract(a: Params, b: Params) -> Params:
    """Subtracts two trees leaf by leaf, in at least float32, in the dtypes of `a`.

    Args:
      a: one tree; its leaves give the result's dtypes.
      b: another of the same structure.

    Returns:
      $a - b$.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> subtract({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
      {'w': Array([0., 0.], dtype=float32)}
    """
    check_like(b, a, name="b")
    return jax.tree.map(lambda x, y: _together(jnp.subtract, x, y), a, b)


def scale(tree: Params, factor: ArrayLike) -> Params:
    """Multiplies every leaf by one number, in at least float32.

    Args:
      tree: any tree of floating-point leaves.
      factor: a scalar; may be traced.

    Returns:
      The tree times `factor`, in its own dtypes.

    Example:
      >>> scale({"w": jnp.ones(2)}, 3.0)
      {'w': Array([3., 3.], dtype=float32)}
    """

    def leaf(x: Array) -> Array:
        wide = widen(x)
        return (wide * jnp.asarray(factor, wide.dtype)).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def dot(a: Params, b: Params) -> Float[Array, ""]:
    r"""The inner product $\sum_i a_i b_i$ of two trees.

    Args:
      a: one tree.
      b: another of the same structure.

    Returns:
      A scalar, accumulated in at least float32; 0 for trees without leaves.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> float(dot({"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}))
      3.0
    """
    check_like(b, a, name="b")
    parts = jax.tree.map(lambda x, y: jnp.sum(widen(x) * widen(y)), a, b)
    return _total(parts)


def norm(tree: Params, *, ord: Literal[1, 2, "inf"] = 2) -> Float[Array, ""]:  # noqa: A002  (numpy's word)
    r"""The vector norm of a whole tree.

    Args:
      tree: any tree of floating-point leaves.
      ord: 1 is $\sum|x_i|$, 2 is $\sqrt{\sum x_i^2}$, "inf" is $\max|x_i|$.

    Returns:
      A scalar, accumulated in at least float32; 0 for a tree without leaves. Its
      gradient at 0 is 0.

    Raises:
      ValueError: an unknown `ord`.

    Example:
      >>> float(norm({"a": jnp.array([3.0]), "b": jnp.array([4.0])}))
      5.0
    """
    if ord == 1:
        return _total(jax.tree.map(lambda x: jnp.sum(jnp.abs(widen(x))), tree))
    if ord == "inf":
        sizes = [
            jnp.max(jnp.abs(widen(x)), initial=0.0).astype(widen(x).dtype)
            for x in jax.tree.leaves(tree)
        ]
        return ft.reduce(jnp.maximum, sizes, jnp.zeros((), jnp.float32))
    if ord == 2:
        square = _total(jax.tree.map(lambda x: jnp.sum(jnp.square(widen(x))), tree))
        safe = jnp.where(square > 0, square, jnp.ones_like(square))
        return jnp.where(square > 0, jnp.sqrt(safe), jnp.zeros_like(square))
    raise ValueError(f"ord must be 1, 2 or 'inf', got {ord!r}")


def cosine(a: Params, b: Params) -> Float[Array, ""]:
    r"""The cosine $\langle a, b\rangle / (\|a\|\,\|b\|)$ of two trees.

    Args:
      a: one tree.
      b: another of the same structure.

    Returns:
      A scalar in [-1, 1]; 0 where either norm is 0.

    Raises:
      ValueError: the trees differ; names the first leaf that does.

    Example:
      >>> float(cosine({"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([2.0, 0.0])}))
      1.0
    """
    na, nb = norm(a), norm(b)
    unit = lambda x, n: scale(x, 1 / jnp.where(n > 0, n, jnp.ones_like(n)))
    return jnp.clip(dot(unit(a, na), unit(b, nb)), -1, 1)


def partition(tree: Params, where: Where) -> tuple[Params, Params]:
    """Splits a tree in two, with None for the missing leaves.

    Args:
      tree: any pytree without None leaves.
      where: which leaves go first; `glob` is the usual way to make one.

    Returns:
      (selected, rest), each with the containers of `tree`; `combine` joins them.

    Raises:
      ValueError: the predicate selects no leaf.

    Example:
      >>> partition({"a": 1, "b": 2}, glob("a"))
      ({'a': 1, 'b': None}, {'a': None, 'b': 2})
    """
    hit = path_map(lambda path, x: bool(where(path, x)), tree)
    if not any(jax.tree.leaves(hit)):
        raise ValueError(f"{where} selects no leaf of {paths(tree)[:5]}...")
    yes = jax.tree.map(lambda h, x: x if h else None, hit, tree)
    no = jax.tree.map(lambda h, x: None if h else x, hit, tree)
    return yes, no


def combine(*trees: Params) -> Params:
    """Joins trees whose missing leaves are None: the inverse of `partition`.

    Args:
      *trees: trees with the same containers, each leaf present in exactly one.

    Returns:
      The joined tree.

    Raises:
      ValueError: a leaf is in several trees, or in none.

    Example:
      >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
      {'a': 1, 'b': 2}
    """

    def pick(path: Any, *xs: Any) -> Any:
        found = [x for x in xs if x is not None]
        if len(found) != 1:
            raise ValueError(f"leaf {_slash(path)!r} is in {len(found)} of the trees")
        return found[0]

    return jax.tree_util.tree_map_with_path(pick, *trees, is_leaf=lambda x: x is None)


def count(fraction: ArrayLike, total: int) -> Int[ArrayLike, "*k"]:
    r"""How many of `total` entries a fraction keeps: $\max(1, \lfloor f n\rfloor)$.

    Exact in float64: the same integer as Python's `max(1, int(f * n))`, of any size.

    Args:
      fraction: $f$, scalar or `[k]`, in [0, 1]. May be traced.
      total: $n$, the number of entries.

    Returns:
      An integer, or `[k]` of them; int64 where the fraction is concrete.

    Degenerate inputs:
      A fraction of 0 keeps 0; any positive fraction keeps at least 1.

    Example:
      >>> int(count(0.29, 100)), int(count(0.001, 100)), int(count(0.0, 100))
      (28, 1, 0)
    """
    if not isinstance(fraction, Tracer):
        exact = np.asarray(fraction, np.float64)
        kept = np.maximum(1, np.floor(exact * total)).astype(np.int64)
        return np.where(exact > 0, np.minimum(kept, total), 0)
    with jax.enable_x64(True):
        exact = jnp.asarray(fraction, jnp.float64)
        kept = jnp.maximum(1, jnp.floor(exact * np.float64(total))).astype(jnp.int64)
        return jnp.where(exact > 0, jnp.minimum(kept, total), 0)


def kth_largest(
    tree: Params,
    k: ArrayLike,
    *,
    per: Literal["tree", "leaf"] = "tree",
    stacked: bool = False,
) -> Any:
    r"""The exact k-th largest value of a nonnegative tree, without a sort.

    Bisects the bits of the value: a nonnegative float orders as its bit pattern does,
    so each round fixes one bit by counting the entries above it. Counts are 64-bit, so
    more than $2^{31}$ entries are exact; nothing is gathered or reshaped, so any
    sharding works. The gradient is that of a constant.

    Args:
      tree: nonnegative leaves `[*leaf]`, or `[k, *leaf]` where `stacked`.
      k: the rank, 1 for the maximum; scalar, or one per model where `stacked`; a tree
        of either with `per="leaf"`. May be traced.
      per: "tree" ranks all entries together, "leaf" each leaf alone.
      stacked: rank each model of axis 0 alone.

    Returns:
      The value $v$ with $|\{x > v\}| < k \le |\{x \ge v\}|$: a scalar, `[k]` where
      `stacked`, or with `per="leaf"` a tree of those. At least float32.

    Raises:
      ValueError: an unknown `per`, or a tree without leaves.

    Degenerate inputs:
      Ties: `x >= v` holds for every entry equal to the k-th, so it may select more than
      k. A rank of 0 gives infinity (nothing is selected); one beyond the size gives 0
      (all is). NaN ranks above infinity.

    Example:
      >>> float(kth_largest({"a": jnp.array([1.0, 5.0]), "b": jnp.array([3.0])}, 2))
      3.0
    """
    if per == "leaf":
        ranks = k if jax.tree.structure(k) == jax.tree.structure(tree) else None
        if ranks is None:
            ranks = jax.tree.map(lambda _: k, tree)
        one = lambda x, r: kth_largest([x], r, stacked=stacked)
        return jax.tree.map(one, tree, ranks)
    if per != "tree":
        raise ValueError(f"per must be 'tree' or 'leaf', got {per!r}")
    leaves = [widen(x) for x in jax.tree.leaves(tree)]
    if not leaves:
        raise ValueError("kth_largest of a tree without leaves")
    wide = jnp.result_type(*leaves)
    rows = [x.astype(wide) if stacked else x.astype(wide)[None] for x in leaves]
    rows = [jax.lax.stop_gradient(x) for x in rows]
    with jax.enable_x64(True):
        rank = jnp.broadcast_to(jnp.asarray(k, jnp.int64), rows[0].shape[:1])
        value = kth_largest_rows(rank, *rows)
    return value if stacked else value[0]


@jax.jit
def kth_largest_rows(
    rank: Int[Array, " k"], *rows: Float[Array, "k ..."]
) -> Float[Array, " k"]:
    """`kth_largest` per row; `rewrite.passes` knows it by name and counts in blocks."""
    dtype = rows[0].dtype
    width = jnp.finfo(dtype).bits
    word = jnp.uint32 if width == 32 else jnp.uint64
    bits = [jax.lax.bitcast_convert_type(x, word) for x in rows]

    def round_(i: Array, low: Array) -> Array:
        level = low | (jnp.array(1 << (width - 2), word) >> i.astype(word))
        counts = [_count(b >= _lift(level, b.ndim)) for b in bits]
        return jnp.where(ft.reduce(jnp.add, counts) >= rank, level, low)

    zero = jnp.zeros(rows[0].shape[:1], word)
    low = jax.lax.fori_loop(0, width - 1, round_, zero)
    value = jax.lax.bitcast_convert_type(low, dtype)
    return jnp.where(rank > 0, value, jnp.full_like(value, jnp.inf))


def _count(mask: Bool[Array, "k ..."]) -> Int[Array, " k"]:
    """How many hold, per row, in 64 bits: innermost axis first, in 32 bits there."""
    inner = mask.ndim > 1 and mask.shape[-1] < 2**31
    small = jnp.sum(mask, axis=-1, dtype=jnp.int32) if inner else mask
    with jax.enable_x64(True):
        return jnp.sum(small, axis=tuple(range(1, small.ndim)), dtype=jnp.int64)


def _lift(x: Shaped[Array, " k"], ndim: int) -> Shaped[Array, "k ..."]:
    """Appends axes of length 1 until there are `ndim`."""
    return x.reshape(x.shape + (1,) * (ndim - 1))


def _together(op: Callable[..., Array], x: Array, y: Array) -> Array:
    """Applies `op` in the wider of the two float types; returns `x`'s type."""
    wide = jnp.promote_types(widen(x).dtype, widen(y).dtype)
    return op(x.astype(wide), y.astype(wide)).astype(x.dtype)


def _total(parts: Params) -> Float[Array, ""]:
    """The sum of a tree of scalars."""
    return ft.reduce(jnp.add, jax.tree.leaves(parts), jnp.zeros((), jnp.float32))


def _slash(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_slash(p): tuple(np.shape(x)) for p, x in leaves}


def _models(stacked: Stacked) -> int:
    """k, the length that axis 0 of every leaf shares."""
    sizes = {p: shape[:1] for p, shape in _shapes(stacked).items()}
    first = next(iter(sizes.values()), ())
    for path, size in sizes.items():
        if not size or size != first:
            raise ValueError(f"leaf {path!r} is not stacked on axis 0 as the others")
    return first[0] if first else 0


def _regex(pattern: str) -> str:
    """A glob as a regular expression: `*` stays within a component, `**` does not."""
    parts = pattern.split("/")
    out = []
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            out.append(".*" if last else "(?:[^/]+/)*")
        else:
            body = fnmatch.translate(part)
            body = body.replace(".*", "[^/]*") if "*" in part else body
            body = body.removeprefix("(?s:").removesuffix(")\\Z").removesuffix(")\\z")
            out.append(body + ("" if last else "/"))
    return "".join(out)
