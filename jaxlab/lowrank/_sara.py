"""SaRA: Hu et al., 2024."""

from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._rank import wide


def sara(*, density: float) -> Adapter:
    r"""Trains a weight's smallest entries, which do little as they are.

    $W' = W \odot (1 - M) + P \odot M$, M the fraction `density` of the entries that is
    smallest in magnitude. The state is the entries P alone: their gradient is gathered
    from that of one weight at a time, and neither it nor an optimiser's moments are
    ever kept for the rest.

    Args:
      density: the fraction of the entries that is trained, in (0, 1].

    Returns:
      An adapter with state `values [k]`, and fixed `indices [k]` into the flat weight.

    Raises:
      ValueError: density outside (0, 1]; from `init`, a weight of more than 2^31
        entries.

    Degenerate inputs:
      Fresh, the values are the weight's own: the layer is unchanged. At least one
      entry is trained.

    References:
      Hu et al., 2024, "SaRA: High-Efficient Diffusion Model Fine-tuning with
      Progressive Sparse Low-Rank Adaptation", https://arxiv.org/abs/2409.06633. The
      paper takes all entries below one threshold; a fraction of each weight keeps
      shapes static: `density = (abs(w) < threshold).mean()` is the same choice.
      `sara_penalty` and `sara_reselect` are its other two parts.

    Example:
      >>> w = jnp.array([[3.0, 0.1], [-0.2, 4.0]])
      >>> sara(density=0.5).init(jax.random.key(0), w)["indices"].tolist()
      [1, 2]
    """
    _check(density)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        if w.size > 2**31:
            raise ValueError(f"a weight of {w.size} entries is beyond 32-bit indices")
        flat = w.astype(wide(w)).ravel()
        indices = _smallest(flat, _count(density, w.size))
        return {"values": flat[indices], "indices": indices}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        flat = (
            w.ravel()
            .at[s["indices"]]
            .set(
                s["values"].astype(w.dtype),
                unique_indices=True,
                indices_are_sorted=True,
            )
        )
        return flat.reshape(w.shape)

    config = ("sara", ("density", density))
    return Adapter(init, None, merge, fixed=("indices",), config=config)


def sara_penalty(w: Array, s: dict[str, Any]) -> Array:
    r"""The nuclear norm of the trained entries: $\| P \odot M \|_*$.

    Its gradient is $U V^\top$ at the trained places, from the singular vectors with
    nonzero singular values.

    Args:
      w: the weight `[n, m]`, for its shape.
      s: `values` and `indices` of `sara`.

    Returns:
      A scalar.

    Degenerate inputs:
      Zero singular values have zero slope.

    References:
      Hu et al., 2024, https://arxiv.org/abs/2409.06633, section 3.3; the authors' code
      takes it of one weight a step, chosen at random.

    Example:
      >>> s = {"values": jnp.array([3.0, 4.0]), "indices": jnp.array([0, 3])}
      >>> float(sara_penalty(jnp.zeros((2, 2)), s))
      7.0
    """
    flat = jnp.zeros(w.size, s["values"].dtype).at[s["indices"]].set(s["values"])
    return _nuclear_norm(flat.reshape(w.shape))


def sara_reselect(
    w: Array, s: dict[str, Any], *, density: float
) -> tuple[Array, dict[str, Any]]:
    r"""The second stage: trains on only those entries that are still small.

    Entries that have grown are settled into the weight; of the entries trained so far,
    the `density * n * m` smallest become the state of `sara(density=density)` on it.

    Args:
      w: the weight `[n, m]`.
      s: its state.
      density: the new fraction of the weight's entries, at most the old one.

    Returns:
      `(w', s')`: the merged weight, and a state with which it is unchanged.

    Raises:
      ValueError: density outside (0, 1], or above that of `s`.

    References:
      Hu et al., 2024, https://arxiv.org/abs/2409.06633, section 3.4, progressive
      parameter adjustment.

    Example:
      >>> s = {"values": jnp.array([3.0, 0.1]), "indices": jnp.array([0, 3])}
      >>> w, s = sara_reselect(jnp.ones((2, 2)), s, density=0.25)
      >>> w.tolist(), s["indices"].tolist()
      ([[3.0, 1.0], [1.0, 0.10000000149011612]], [3])
    """
    _check(density)
    count, old = _count(density, w.size), s["indices"].shape[-1]
    if count > old:
        raise ValueError(f"density {density} is {count} entries, above the {old} of s")
    merged = sara(density=density).merge
    assert merged is not None
    w = merged(w, s)
    kept = _smallest(s["values"], count)
    indices = s["indices"][kept]
    return w, {"values": w.ravel()[indices].astype(wide(w)), "indices": indices}


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


def _count(density: float, size: int) -> int:
    return max(1, round(density * size))


def _smallest(flat: Array, count: int) -> Array:
    """The places of the `count` smallest magnitudes, in order."""
    _, places = jax.lax.top_k(-jnp.abs(flat), count)
    return jnp.sort(places).astype(jnp.int32)


@jax.custom_vjp
def _nuclear_norm(matrix: Array) -> Array:
    return jnp.linalg.svd(matrix, compute_uv=False).sum()


def _forward(matrix: Array) -> tuple[Array, Array]:
    u, sizes, v = jnp.linalg.svd(matrix, full_matrices=False)
    floor = jnp.finfo(sizes.dtype).eps * max(matrix.shape) * sizes.max()
    return sizes.sum(), (u * (sizes > floor)[None].astype(u.dtype)) @ v


def _backward(direction: Array, slope: Array) -> tuple[Array]:
    return (slope * direction,)


_nuclear_norm.defvjp(_forward, _backward)
