"""Any merge of low-rank updates in a small space they share: Core Space, KnOTS."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jax import Array
import jax.numpy as jnp

from ._algebra import check_alike
from ._compress import balanced, compress
from ._factors import Factors, Update
from ._randomized import product, t

Space = Literal["core", "knots", "dense"]
"""Where updates meet: cores `[R, R]`, KnOTS' `[n, R]`, whole matrices `[n, m]`."""
Back = Callable[[Array], tuple[Array, Array]]


def combine(
    updates: Sequence[Update],
    *,
    method: Callable[[Any], Any],
    space: Space = "core",
    rank: int | None = None,
) -> Update:
    r"""Merges low-rank updates by any method, in a space that they share.

    "core": with $U$ and $V$ the singular bases of $[A_1, \dots, A_K]$ and $[B_1; \dots;
    B_K]$, $\Delta W_k = U M_k V^\top$ exactly for $M_k = U^\top A_k B_k V$, and the
    result is $U\,m(M_1, \dots, M_K)\,V^\top$. "knots": $V$ is the basis of the stacked
    updates and the method gets $\Delta W_k V$. "dense": it gets the updates themselves,
    which takes their memory.

    Args:
      updates: from `factors`, of any ranks.
      method: a merge of stacked trees, `[k, ...]` -> `[...]`, its hyperparameters and
        its key bound: `functools.partial(merge.ties, density=0.5)`. It gets one tree of
        all leaves: `{"update": {path: [k, *stacked, *batch, R, R]}}`, and where there
        are any "gain", "bias" and "delta" beside it.
      space: as above.
      rank: compress the result to this rank; without it that is up to $\sum_k r_k$ (up
        to min(n, m) for "dense").

    Returns:
      `{path: Factors}` of the merged update.

    Raises:
      ValueError: no updates, or of other leaves; an unknown space; from the method; a
        rank above min(n, m) (names the leaf).

    Degenerate inputs:
      A method that is linear gives the same in every space, that of `linear`. Where
      singular values coincide, the basis is whichever the decomposition finds.

    References:
      Panariello et al., 2025, "Accurate and Efficient Low-Rank Model Merging in Core
      Space", https://arxiv.org/abs/2509.17786, section 3. Stoica et al., 2024, "Model
      merging with SVD to tie the Knots", https://arxiv.org/abs/2410.19735, section 4;
      both from factors, by QR, where the authors decompose whole matrices.

    Example:
      >>> import jax
      >>> one = {"w": Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
      >>> mean = lambda stacked: jax.tree.map(lambda x: x.mean(0), stacked)
      >>> got = combine([one, one], method=mean, rank=1)["w"]
      >>> round(float((got.a @ got.b)[0, 0]), 4)
      1.0
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {sorted(SPACES)}, got {space!r}")
    updates = list(updates)
    check_alike(updates)
    stacked: dict[str, dict[str, Array]] = {}
    back: dict[str, Back] = {}
    for path in updates[0]:
        parts = [u[path] for u in updates]
        if parts[0].a is not None:
            cores, back[path] = SPACES[space](parts)
            stacked.setdefault("update", {})[path] = cores
        for name in Factors._fields[2:]:
            given = [getattr(f, name) for f in parts]
            if any(v is not None for v in given):
                stacked.setdefault(name, {})[path] = _filled(given)
    merged = method(stacked)
    out = {}
    for path in updates[0]:
        a, b = back[path](merged["update"][path]) if path in back else (None, None)
        rest = {n: merged.get(n, {}).get(path) for n in Factors._fields[2:]}
        out[path] = Factors(a, b, **rest)
    return out if rank is None else compress(out, rank=rank)


def _core(parts: Sequence[Factors]) -> tuple[Array, Back]:
    """The cores of one leaf, and the update of a merged one."""
    u, v = _basis([f.a for f in parts]), t(_basis([t(f.b) for f in parts]))
    cores = [product(product(t(u), f.a), product(f.b, t(v))) for f in parts]
    return jnp.stack(cores), lambda core: (product(u, core), v)


def _knots(parts: Sequence[Factors]) -> tuple[Array, Back]:
    """The updates of one leaf in the basis of outputs that they share."""
    tall = [product(jnp.linalg.qr(f.a, mode="r"), f.b) for f in parts]
    _, s, vt = svd_of(jnp.concatenate(tall, -2))
    size = sum(f.a.shape[-2] for f in parts), parts[0].b.shape[-1]
    least = max(size) * jnp.finfo(s.dtype).eps * s[..., :1]
    vt = jnp.where((s > least)[..., None], vt, 0)
    shared = [product(f.a, product(f.b, t(vt))) for f in parts]
    return jnp.stack(shared), lambda merged: (merged, vt)


def _dense(parts: Sequence[Factors]) -> tuple[Array, Back]:
    """The updates of one leaf, whole."""

    def back(merged: Array) -> tuple[Array, Array]:
        u, s, vt = jnp.linalg.svd(merged, full_matrices=False)
        return balanced(u, s, vt, s.shape[-1])

    return jnp.stack([product(f.a, f.b) for f in parts]), back


SPACES = {"core": _core, "knots": _knots, "dense": _dense}


def svd_of(x: Array) -> tuple[Array, Array, Array]:
    """The thin decomposition of a wide matrix, by the QR of its transpose."""
    q, r = jnp.linalg.qr(t(x))
    u, s, vt = jnp.linalg.svd(t(r), full_matrices=False)
    return u, s, product(vt, t(q))


def _basis(columns: Sequence[Array]) -> Array:
    """The left singular vectors of matrices side by side."""
    wide = jnp.concatenate(columns, -1)
    return t(svd_of(t(wide))[2])


def _filled(given: Sequence[Array | None]) -> Array:
    """Those that are there, and zeros for the others, stacked."""
    like = next(v for v in given if v is not None)
    return jnp.stack([jnp.zeros_like(like) if v is None else v for v in given])
