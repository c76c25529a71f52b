"""Values known when a program is read: folded in numpy, and what permutes them."""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from ._terms import Term, chain, fresh

ROOM = 2**24  # entries of a constant that is worth folding
SQUARE = 2**22  # entries of one that is worth comparing with its transpose


class Facts(NamedTuple):
    """How a constant may be permuted, per axis."""

    runs: tuple[tuple[int, ...] | None, ...]  # lengths of equal slices; None: one run
    pairs: tuple[tuple[int, int], ...]  # axes that may be permuted only together


_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs, "add": np.add, "add_any": np.add, "and": np.bitwise_and,
    "ceil": np.ceil, "copy": np.positive, "copy_p": np.positive, "cos": np.cos,
    "eq": np.equal, "exp": np.exp, "exp2": np.exp2, "expm1": np.expm1,
    "floor": np.floor, "ge": np.greater_equal, "gt": np.greater,
    "is_finite": np.isfinite, "le": np.less_equal, "log": np.log, "log1p": np.log1p,
    "lt": np.less, "max": np.maximum, "min": np.minimum, "mul": np.multiply,
    "ne": np.not_equal, "neg": np.negative, "not": np.invert, "or": np.bitwise_or,
    "pow": np.power, "rem": np.fmod, "sign": np.sign, "sin": np.sin, "sqrt": np.sqrt,
    "square": np.square, "stop_gradient": np.positive, "sub": np.subtract,
    "tan": np.tan, "tanh": np.tanh, "xor": np.bitwise_xor,
    "convert_element_type": lambda x: x, "reduce_precision": lambda x: x,
    "rsqrt": lambda x: 1 / np.sqrt(x), "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}  # fmt: skip
_NUMPY |= {n: lambda x: x for n in ("copy", "copy_p", "stop_gradient")}
_REDUCE: dict[str, Callable[..., Any]] = {
    "reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min,
    "reduce_prod": np.prod, "reduce_and": np.all, "reduce_or": np.any,
}  # fmt: skip


def fold(eqn: Any, xs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The results of an operation on known values; None where it is not worth it.

    What is broadcast stays a view of stride 0, so that masks cost nothing.
    """
    avals = [v.aval for v in eqn.outvars]
    if any(math.prod(a.shape) > ROOM or _typed(a) for a in avals):
        return None
    name, params = eqn.primitive.name, eqn.params
    dtype, shape = avals[0].dtype, avals[0].shape
    with np.errstate(all="ignore"):
        if name in _NUMPY or name in ("div", "integer_pow", "select_n"):
            return [_elementwise(name, params, xs, shape).astype(dtype, copy=False)]
        if name in _REDUCE:
            out = _REDUCE[name](_core(xs[0], params["axes"]), axis=params["axes"])
            return [np.broadcast_to(out, shape).astype(dtype, copy=False)]
    if name in _MOVES:
        return [_MOVES[name](params, xs, shape)]
    if name == "iota":
        d, size = params["dimension"], shape[params["dimension"]]
        row = np.arange(size).astype(dtype)
        return [np.broadcast_to(row.reshape([-1] + [1] * (len(shape) - d - 1)), shape)]
    return _evaluate(eqn, xs)


def is_range(x: np.ndarray) -> int | None:
    """The axis along which a constant counts 0, 1, 2..., if it is uniform along others.

    None if there is no such axis.
    """
    if x.dtype.kind not in "iu":
        return None
    wide = [k for k, (n, s) in enumerate(zip(x.shape, x.strides, strict=True))
            if n > 1 and s]  # fmt: skip
    for k in wide or [k for k, n in enumerate(x.shape) if n > 1]:
        row = np.moveaxis(x, k, -1)
        if (row == np.arange(x.shape[k])).all():
            return k
    return None


def uniform(x: Any) -> Any:
    """The value of a constant whose entries are all equal, or None."""
    if not isinstance(x, np.ndarray) or not x.size:
        return None
    core = _strideless(x)
    return core.flat[0] if core.size == 1 else None


def facts(x: np.ndarray) -> Facts:
    """How the entries of a constant may be permuted."""
    core = _strideless(x)
    if core.dtype.kind not in "biuf":
        core = core.astype(np.float64) if core.dtype.kind != "c" else core
    runs = tuple(_runs(core, k) if core.shape[k] > 1 else None for k in range(x.ndim))
    open_axes = [k for k, r in enumerate(runs) if r is not None]
    pairs = [
        (i, j) for n, i in enumerate(open_axes) for j in open_axes[n + 1 :]
        if _interchangeable(core, i, j)
    ]  # fmt: skip
    return Facts(runs, tuple(pairs))


def terms(known: Facts, shape: Sequence[int]) -> tuple[Term | None, ...]:
    """A term for each axis of one use of a constant; None where it is uniform."""
    out: list[Term | None] = [None] * len(shape)
    for k, runs in enumerate(known.runs):
        if runs is not None:
            alone = len(runs) == shape[k]
            out[k] = fresh(shape[k], pinned=True) if alone else chain(map(fresh, runs))
    paired: set[int] = set()
    for pair in known.pairs:
        if not paired & set(pair):
            out[pair[0]] = out[pair[1]] = fresh(shape[pair[0]])
            paired |= set(pair)
    return tuple(out)


def _typed(aval: Any) -> bool:
    """Is it a random key or another value that numpy does not hold?"""
    return not isinstance(aval.dtype, np.dtype)


def _strideless(x: np.ndarray) -> np.ndarray:
    """The array with length 1 along the axes that only repeat it."""
    return x[tuple(slice(0, 1) if s == 0 else slice(None) for s in x.strides)]


def _core(x: np.ndarray, keep: Sequence[int]) -> np.ndarray:
    """The array with length 1 along the axes that only repeat it, but for `keep`."""
    cut = [slice(0, 1) if s == 0 and k not in keep else slice(None)
           for k, s in enumerate(x.strides)]  # fmt: skip
    return x[tuple(cut)]


def _elementwise(
    name: str, params: dict[str, Any], xs: Sequence[np.ndarray], shape: tuple[int, ...]
) -> np.ndarray:
    xs = [_strideless(x) for x in xs]
    if name == "select_n":
        which, *cases = xs
        if len(cases) == 2:
            out = np.where(which.astype(bool), cases[1], cases[0])
        else:
            out = np.choose(which, cases)
    elif name == "integer_pow":
        out = xs[0] ** params["y"] if params["y"] >= 0 else 1 / xs[0] ** -params["y"]
    elif name == "div":
        exact = xs[0].dtype.kind not in "iu"
        out = xs[0] / xs[1] if exact else np.trunc(xs[0] / xs[1])
    else:
        out = _NUMPY[name](*xs)
    return np.broadcast_to(out, shape)


def _broadcast(params: dict, xs: Sequence[np.ndarray], shape: tuple) -> np.ndarray:
    dims = params["broadcast_dimensions"]
    sizes = [1] * len(shape)
    for i, d in enumerate(dims):
        sizes[d] = xs[0].shape[i]
    return np.broadcast_to(xs[0].reshape(sizes), shape)


def _slice(params: dict, xs: Sequence[np.ndarray], shape: tuple) -> np.ndarray:
    strides = params["strides"] or (1,) * len(shape)
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return xs[0][tuple(slice(*e) for e in ends)]


def _reshape(params: dict, xs: Sequence[np.ndarray], shape: tuple) -> np.ndarray:
    del params
    return xs[0].reshape(shape)


_MOVES: dict[str, Callable[..., np.ndarray]] = {
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "reshape": _reshape,
    "expand_dims": _reshape,
    "squeeze": _reshape,
    "transpose": lambda p, xs, _: xs[0].transpose(p["permutation"]),
    "concatenate": lambda p, xs, _: np.concatenate(xs, p["dimension"]),
    "rev": lambda p, xs, _: np.flip(xs[0], p["dimensions"]),
}


def _evaluate(eqn: Any, xs: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """The results by JAX itself: any primitive, but slow at first."""
    try:
        with jax.ensure_compile_time_eval():
            out = eqn.primitive.bind(*xs, **eqn.params)
        return [
            np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])
        ]
    except Exception:  # not understood as a constant: then it is a value like others
        return None


def _runs(core: np.ndarray, axis: int) -> tuple[int, ...] | None:
    """The lengths of the runs of equal slices; None if there is but one."""
    n = core.shape[axis]
    rows = np.moveaxis(core, axis, 0).reshape(n, -1)
    differ = rows[1:] != rows[:-1]
    if core.dtype.kind == "f":  # NaN equals NaN: a variance of no entries is one
        differ &= ~(np.isnan(rows[1:]) & np.isnan(rows[:-1]))
    cuts = np.flatnonzero(differ.any(1)) + 1
    ends = [0, *cuts.tolist(), n]
    return tuple(np.diff(np.array(ends)).tolist()) if len(cuts) else None


def _interchangeable(core: np.ndarray, i: int, j: int) -> bool:
    """Is it a I + b 1 1^T on two axes, so that both may be permuted alike?"""
    n = core.shape[i]
    if n != core.shape[j] or core.size > SQUARE:
        return False
    m = np.moveaxis(core, (i, j), (0, 1)).reshape(n, n, -1)
    if not (m[0, 1] == m[1, 0]).all() or not (m[0, 0] == m[n - 1, n - 1]).all():
        return False
    want = np.broadcast_to(m[0, 1], m.shape).copy()
    want[np.arange(n), np.arange(n)] = m[0, 0]
    return bool((m == want).all())
