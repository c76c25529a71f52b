"""Adapters from two models: the low-rank part of what training changed."""

from collections.abc import Mapping, Sequence
import functools as ft
from typing import Any, Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
import numpy as np

from .. import rewrite
from ..types import Params
from ._compress import balanced, check_energy, check_sides, needed_rank
from ._factors import check_paths
from ._full import full
from ._lora import lora
from ._places import named
from ._randomized import exact_svd, random_matrix, randomized_svd
from ._rank import wide
from ._state import Place, Spec, State, by_path, fingerprint

BLOCK = 2**16  # entries that are compared at once
FIRST = 16  # the rank that a search by energy starts from
TINY = np.finfo(np.float64).tiny


class Extracted(NamedTuple):
    """Adapters, and how much of the difference is in them."""

    state: State
    """`lora` of every matrix that differs, and `full` of other leaves, if kept."""
    energy: dict[str, float]
    """By path, the share of the squared Frobenius norm that the adapter holds."""
    skipped: tuple[str, ...]
    """Leaves that differ and have no adapter."""


class Search(NamedTuple):
    """How the singular triplets of a difference are found, and how many are kept."""

    rank: int | None
    energy: float | None
    exact: bool
    power: int
    oversample: int


def extract(
    base: Params,
    tuned: Params,
    uses: Mapping[str, Sequence[rewrite.Use]] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    exact: bool = False,
    power: int = 1,
    oversample: int = 32,
    rest: Literal["keep", "skip"] = "keep",
    key: PRNGKeyArray | None = None,
) -> Extracted:
    r"""LoRA adapters that turn one model into another, as nearly as a rank allows.

    $W' - W \approx A B$ with $A = U_r \Sigma_r^{1/2}$, $B = \Sigma_r^{1/2} V_r^\top$ of
    the singular value decomposition of the difference, which is taken in float32.

    Args:
      base: the model before, arrays of any float dtype.
      tuned: the model after, of the same structure.
      uses: what `rewrite.uses` says of the leaves; those that are in no matrix product
        (or not in it) are no matrices. Without it, leaves of two axes are matrices
        `[n, m]` as they are.
      rank: r, of every matrix.
      energy: instead, the least share of the squared Frobenius norm of each difference
        that its adapter holds, in (0, 1); each leaf gets the rank it needs.
      exact: decompose fully, in place of a random sketch of `rank + oversample`
        columns.
      power: q, power iterations of the sketch; each sharpens a flat spectrum.
      oversample: columns of the sketch beyond the rank.
      rest: "keep" the other leaves that differ whole, by `full`; or "skip" them.
      key: consumed; needed where a sketch is drawn, the same for matrices of one m.

    Returns:
      `Extracted(state, energy, skipped)`. Look at the energy: where the spectrum is
      flat (full fine-tuning, white noise) a low rank holds little of the difference,
      and a sketch finds less than there is.

    Raises:
      ValueError: the models differ in structure; not exactly one of `rank` and
        `energy`, or one out of range; no key; NaN or infinity (names the leaf);
        nothing differs.

    Degenerate inputs:
      A leaf that does not differ gets no adapter; one that is used twice (a tied
      embedding) gets one, for both places. Layers and experts of one leaf have one
      rank, the largest that one needs. Arrays must be concrete, not traced.

    References:
      Halko, Martinsson & Tropp, 2011, "Finding structure with randomness",
      https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1. mergekit's
      `extract-lora` subtracts in the dtype of the files and decomposes fully.

    Example:
      >>> base, step = jnp.ones((4, 3)), jnp.arange(4.0)[:, None] * jnp.ones((1, 3))
      >>> got = extract({"w": base}, {"w": base + step}, rank=1, exact=True)
      >>> round(got.energy["w"], 4), got.state["w"]["a"].shape
      (1.0, (4, 1))
    """
    search = checked(rank, energy, exact, power, oversample)
    old, new = by_path(base), by_path(tuned)
    check_paths(new, old, "tuned")
    places, entries, shares, skipped = [], {}, {}, []
    for path, w in old.items():
        place = named(path, _place, path, w, new[path], uses)
        if not differs(w, new[path]):
            continue
        if place.use is None:
            if rest == "skip" or not jnp.issubdtype(w.dtype, jnp.floating):
                skipped.append(path)
                continue
            place, entries[path] = place._replace(adapter=full()), _whole(new[path])
        else:
            pair = (rewrite.as_matrix(x, place.use) for x in (w, new[path]))
            a, b, shares[path] = named(path, lora_factors, *pair, search, key)
            entries[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
            place = place._replace(adapter=lora(rank=a.shape[-1]))
        places.append(place)
    if not places:
        raise ValueError("there is nothing to extract: no leaf differs")
    spec = Spec(tuple(places), fingerprint({p.path: old[p.path] for p in places}))
    return Extracted(State(entries, {}, spec), shares, tuple(skipped))


def differs(w: Any, tuned: Any) -> bool:
    """Whether any entry does; 0 and -0 are one."""
    x, y = (np.asarray(v).reshape(-1) for v in (w, tuned))
    for start in range(0, x.size, BLOCK):
        a, b = x[start : start + BLOCK], y[start : start + BLOCK]
        if a.tobytes() != b.tobytes() and bool(np.any(a != b)):
            return True
    return False


def checked(
    rank: int | None, energy: float | None, exact: bool, power: int, oversample: int
) -> Search:
    """The options, after a check."""
    if (rank is None) == (energy is None):
        raise ValueError("extract takes one of rank and energy")
    check_energy(energy)
    if power < 0 or oversample < 0:
        raise ValueError(
            f"power and oversample must be at least 0, got {power} and {oversample}"
        )
    return Search(rank, energy, exact, power, oversample)


def lora_factors(
    w: Any, tuned: Any, search: Search, key: PRNGKeyArray | None
) -> tuple[Any, Any, float]:
    """The factors of a difference `[*, n, m]`, and the share that they hold."""
    n, m = w.shape[-2:]
    if search.rank is not None:
        check_sides(search.rank, n, m)
    count = (search.rank or FIRST) + search.oversample
    while True:
        whole = search.exact or count >= min(n, m)
        omega = None if whole else _sketch(key, m, count)
        found = _triplets(w, tuned, omega, search.power, search.rank)
        left, s, right = (np.asarray(x) for x in found[:3])
        squares = np.asarray(s, np.float64) ** 2
        total = np.maximum(np.asarray(found[3], np.float64), squares.sum(-1))
        if not np.isfinite(total).all():
            raise ValueError("a model holds NaN or infinity")
        rank = search.rank
        if search.energy is not None:
            if not whole and np.any(squares.sum(-1) < search.energy * total):
                count *= 2  # the sketch does not hold that share: a wider one
                continue
            rank = needed_rank(s, 1 - search.energy, None if whole else total)
            left, right = balanced(left, s, right, rank)
        kept = squares[..., :rank].sum()
        return left, right, float(kept / max(total.sum(), TINY))


def _sketch(key: PRNGKeyArray | None, m: int, count: int) -> np.ndarray:
    """A random test matrix; raises where there is no key."""
    if key is None:
        raise ValueError("a random sketch needs key=; or ask for exact=True")
    return random_matrix(key, m, count)


@ft.partial(jax.jit, static_argnums=(3, 4))
def _triplets(
    w: Array, tuned: Array, omega: Array | None, power: int, rank: int | None
) -> tuple[Array, Array, Array, Array]:
    """The singular triplets of a difference, and its squared norm.

    With a rank its factors take the place of the singular vectors.
    """
    dtype = wide(w, tuned)
    d = tuned.astype(dtype) - w.astype(dtype)
    if omega is None:
        u, s, vt = exact_svd(d)
    else:
        u, s, vt = randomized_svd(d, omega.astype(dtype), power)
    if rank is not None:
        u, vt = balanced(u, s, vt, rank)
    return u, s, vt, jnp.sum(d * d, (-2, -1))


def _place(path: str, w: Array, tuned: Array, uses: Any) -> Place:
    """How a leaf is a matrix, or that it is none; its adapter is put in later."""
    if w.shape != tuned.shape:
        raise ValueError(f"shape {tuned.shape} in tuned, but {w.shape} in base")
    use = None
    if not jnp.issubdtype(w.dtype, jnp.floating):
        use = None
    elif uses is not None:
        use = next((u for u in uses.get(path, ()) if u.contracted and u.free), None)
    elif w.ndim == 2:
        use = rewrite.Use(path, "dot_general", (), (), (0,), (1,), tuple(w.shape))
    return Place(path, full(), tuple(w.shape), use, None)


def _whole(w: Array) -> dict[str, Any]:
    """The state of a leaf that is trained as it is."""
    return {"w": jnp.asarray(w).astype(wide(w))}
