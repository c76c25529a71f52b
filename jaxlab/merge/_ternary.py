"""Arithmetic of ternary task vectors in their two bit planes (Yadav et al., 2023)."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt
import numpy as np

from .. import tree
from ..types import Params, PerModel, Stacked
from . import _bits
from ._coefficients import rows, spread, total
from ._compeft import Ternary


def ternary_restore(small: Ternary, like: Stacked) -> Stacked:
    r"""The dense task vectors $s(P - N)$ of two bit planes and a scale.

    Args:
      small: what `ternary` gave.
      like: `[k, *leaf]` arrays, or `jax.ShapeDtypeStruct`s, of the shapes and dtypes
        wanted.

    Returns:
      `[k, *leaf]` task vectors in the dtypes of `like`: those of `compeft`.

    Raises:
      ValueError: `like` is not what the planes were taken from; names the leaf.

    Degenerate inputs:
      No bit set gives 0.

    References:
      Yadav et al., 2023, "ComPEFT", https://arxiv.org/abs/2311.13171, Section 2.2.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> x = {"w": jnp.array([[3.0, -3.0, 1.0, -1.0, 0.0, 0.0]])}
      >>> ternary_restore(merge.ternary(x, density=0.4), x)["w"]
      Array([[ 2., -2.,  0.,  0.,  0.,  0.]], dtype=float32)
    """
    _check(small, like)

    def leaf(x: Any, p: Array, n: Array, s: Array) -> Array:
        return (_signs(p, n, x.shape, s.dtype) * _last(s, len(x.shape))).astype(x.dtype)

    return jax.tree.map(leaf, like, *small)


def ternary_dot(a: Ternary, b: Ternary) -> Float[Array, ""]:
    r"""The inner product of two ternary task vectors, from counts of bits.

    $\sum_\ell s_a s_b\,(|P_a \wedge P_b| + |N_a \wedge N_b| - |P_a \wedge N_b| -
    |N_a \wedge P_b|)$ over the leaves $\ell$.

    Args:
      a: one task vector: `jax.tree.map(lambda x: x[i], small)` of what `ternary` gave.
        Under `jax.vmap`, a stack.
      b: another of the same structure.

    Returns:
      A scalar, at least float32; the counts are exact.

    Raises:
      ValueError: the two have other leaves, or several models on axis 0.

    Degenerate inputs:
      Task vectors without a common entry give 0; so does an empty tree.

    References:
      Yadav et al., 2023, https://arxiv.org/abs/2311.13171, Section 2.2: AND and POPCNT.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> x = {"w": jnp.array([[1.0, -1.0], [2.0, 2.5]])}
      >>> small = merge.ternary(x, density=1.0)
      >>> one, two = (jax.tree.map(lambda x, i=i: x[i], small) for i in (0, 1))
      >>> float(ternary_dot(one, two)), round(float(ternary_dot(one, one)), 6)
      (0.0, 4.0)
    """
    tree.check_like(b, a, name="b")
    for s in jax.tree.leaves(a.scale):
        if s.ndim:
            raise ValueError(
                f"a holds {s.shape[0]} task vectors; take one of each, or use jax.vmap"
            )

    def leaf(p: Array, n: Array, s: Array, q: Array, m: Array, t: Array) -> Array:
        same = _bits.count(p & q) + _bits.count(n & m)
        opposite = _bits.count(p & m) + _bits.count(n & q)
        dtype = np.promote_types(s.dtype, t.dtype)
        with jax.enable_x64(True):
            overlap = (same - opposite).astype(dtype)
        return s.astype(dtype) * t.astype(dtype) * overlap

    parts = jax.tree.leaves(jax.tree.map(leaf, *a, *b))
    dtype = np.result_type(np.float32, *(p.dtype for p in parts))
    return total([jnp.zeros((), dtype), *(p.astype(dtype) for p in parts)])


def ternary_sum(
    small: Ternary, like: Params, *, weights: PerModel = 1.0, scale: PerModel = 1.0
) -> Params:
    r"""Task arithmetic of ternary task vectors: $\lambda\sum_k w_k s_k(P_k - N_k)$.

    Only one dense task vector is held: the sum.

    Args:
      small: what `ternary` gave for k models.
      like: `[*leaf]` arrays, or `jax.ShapeDtypeStruct`s, of one model: the shapes and
        dtypes wanted.
      weights: $w_k$: a scalar, `[k]`, or a tree of either by leaf. May be traced.
      scale: $\lambda$: a scalar, or a tree of scalars by leaf. May be traced.

    Returns:
      `[*leaf]` merged task vector, in the dtypes of `like`, rounded once.

    Raises:
      ValueError: `like` is not one model of what the planes were taken from.

    Degenerate inputs:
      No bit set gives 0.

    References:
      Yadav et al., 2023, https://arxiv.org/abs/2311.13171, Sections 2.2 and 3.7.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> x = {"w": jnp.array([[1.0, -1.0], [2.0, 4.0]])}
      >>> ternary_sum(merge.ternary(x, density=1.0), {"w": x["w"][0]})
      {'w': Array([2.828427, 0.      ], dtype=float32)}
    """
    k = next((s.shape[0] for s in jax.tree.leaves(small.scale)), 1)
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((k, *x.shape), x.dtype), like)
    _check(small, stack)
    w = spread(weights, small.scale, name="weights")
    lam = spread(scale, small.scale, name="scale", per_model=False)

    def leaf(x: Any, p: Array, n: Array, s: Array, c: Any, f: Any) -> Array:
        each = zip(p, n, s, rows(c, s), strict=True)
        shape = x.shape or (1,)
        parts = [_signs(p, n, shape, v.dtype) * (v * c) for p, n, v, c in each]
        return (f.astype(s.dtype) * total(parts)).reshape(x.shape).astype(x.dtype)

    return jax.tree.map(leaf, like, *small, w, lam)


def ternary_vote(small: Ternary) -> Ternary:
    r"""The sign that most ternary task vectors have, still in two bit planes.

    $P = [\sum_k P_k > \sum_k N_k]$, $N = [\sum_k P_k < \sum_k N_k]$, with the mean
    scale. The sums are binary counters with one plane per digit: no entry is unpacked.

    Args:
      small: what `ternary` gave for k models.

    Returns:
      One task vector: planes `[*lead, words]` and scales `[]`.

    Raises:
      ValueError: the scales are not stacked on axis 0.

    Degenerate inputs:
      A tie gives 0. One model gives itself.

    References:
      Yadav et al., 2023, https://arxiv.org/abs/2311.13171, Section 3.7, with the
      election of "TIES-Merging", https://arxiv.org/abs/2306.01708, by count.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> x = {"w": jnp.array([[1.0, -1.0], [2.0, -2.0], [-1.0, 3.0]])}
      >>> vote = ternary_vote(merge.ternary(x, density=1.0))
      >>> vote.positive["w"], vote.negative["w"]
      (Array([1], dtype=uint32), Array([2], dtype=uint32))
    """
    if any(not s.ndim for s in jax.tree.leaves(small.scale)):
        raise ValueError("a vote needs task vectors stacked on axis 0")
    pairs = jax.tree.map(_majority, small.positive, small.negative)
    pick = lambda i: jax.tree.map(lambda _, pair: pair[i], small.scale, pairs)
    return Ternary(pick(0), pick(1), jax.tree.map(lambda s: s.mean(0), small.scale))


def _majority(p: UInt[Array, "k ..."], n: UInt[Array, "k ..."]) -> tuple[Array, Array]:
    """Where more planes of one stack than of the other are 1, and the other way."""
    digits = p.shape[0].bit_length()
    more = less = jnp.zeros_like(p[0])
    for a, b in zip(_sum(p, digits)[::-1], _sum(n, digits)[::-1], strict=True):
        open_ = ~(more | less)
        more, less = more | (open_ & a & ~b), less | (open_ & b & ~a)
    return more, less


def _sum(planes: UInt[Array, "k ..."], digits: int) -> list[Array]:
    """How many of k planes are 1, bit by bit: the digits of a counter, lowest first."""

    def add(counter: list[Array], plane: Array) -> list[Array]:
        out, carry = [], plane
        for digit in counter:
            out.append(digit ^ carry)
            carry = digit & carry
        return out

    zero = [jnp.zeros_like(planes[0])] * digits
    return ft.reduce(add, list(planes), zero)


def _signs(p: Array, n: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """-1, 0 and 1 of two bit planes."""
    one = lambda words: _bits.unpack(words, shape).astype(dtype)
    return one(p) - one(n)


def _last(s: Array, ndim: int) -> Array:
    """A scale per model, to multiply a stacked leaf."""
    return s.reshape(s.shape + (1,) * (ndim - s.ndim))


def _check(small: Ternary, like: Stacked) -> None:
    """Refuses planes of other shapes than those of the stacked leaves."""
    want = jax.tree.map(_bits.words_like, like)
    tree.check_like(small.positive, want, name="small.positive")
    tree.check_like(small.negative, want, name="small.negative")
