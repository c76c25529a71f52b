"""MiSS: Kang and Yin, 2025."""

from typing import Any, Literal

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._direct import check_divides, direct
from ._operands import dense, like, rows
from ._rank import check_rank, plus, wide

Mode = Literal["miss", "bat", "mini"]


def miss(*, rank: int, mode: Mode = "miss", width: int = 1) -> Adapter:
    r"""One shard for all blocks of r inputs: $y = x W + (\sum_i x_{[i]}) D$.

    $x_{[i]}$ is the i-th block of r entries of x, the last one padded with zeros, so
    the update of W repeats $D\,[r, m]$ down its rows. With "mini", D itself repeats
    $[r, \mathrm{width}]$ along its columns. With "bat" the update depends on W: its
    block $\Delta_{io} = B_o^\top W_{io} + B_o^\top$, of r by r.

    Args:
      rank: r, from 1 to n; a divisor of n and m with "bat".
      mode: which update.
      width: of D with "mini", a divisor of m.

    Returns:
      An adapter with state `d`: [r, m], [r, width], or [m / r, r, r], block o being
      $B_o$ as it multiplies a weight [out, in] from the right.

    Raises:
      ValueError: an unknown mode; (from `init`) a rank above n, sides that are no
        multiples.

    Degenerate inputs:
      Fresh, D = 0: the layer is unchanged.

    References:
      Kang and Yin, 2025, "MiSS: Revisiting the Trade-off in LoRA with an Efficient
      Shard-Sharing Structure", https://arxiv.org/abs/2409.15371 (once "Bone");
      `mode` as the `init_weights` of its implementation in PEFT.

    Example:
      >>> s = {"d": jnp.array([[1.0], [10.0]])}
      >>> miss(rank=2).merge(jnp.zeros((4, 1)), s).tolist()
      [[1.0], [10.0], [1.0], [10.0]]
    """
    check_rank(rank)
    if mode not in ("miss", "bat", "mini"):
        raise ValueError(f'mode must be "miss", "bat" or "mini", got {mode!r}')

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        return {"d": jnp.zeros(_shape(w, rank, mode, width), wide(w))}

    def shard(s: dict[str, Any], m: int) -> Array:
        return jnp.tile(s["d"], (1, m // s["d"].shape[1]))

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        y = x @ w
        return plus(y, _folded(x, w, rank) @ like(shard(s, y.shape[-1]), x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        if mode == "bat":
            return plus(w, _turned(w, s["d"]))
        n, m = w.shape
        return plus(w, shard(s, m)[jnp.arange(n) % rank])

    config = ("miss", ("rank", rank), ("mode", mode), ("width", width))
    return Adapter(init, None if mode == "bat" else apply, merge, config=config)


def _shape(w: Array, rank: int, mode: Mode, width: int) -> tuple[int, ...]:
    """The shape of D for a weight; raises where there is none."""
    n, m = w.shape
    if rank > n:
        raise ValueError(f"rank {rank} is above the {n} inputs")
    if mode == "bat":
        check_divides(rank, w, "rank")
        return m // rank, rank, rank
    if mode == "mini" and m % width:
        raise ValueError(f"width {width} does not divide the {m} outputs")
    return rank, width if mode == "mini" else m


def _folded(x: Any, w: Any, rank: int) -> Array:
    """The sum of the blocks of x, `[..., r]`."""
    if not direct(x):
        return x @ like(jnp.eye(rank)[jnp.arange(dense(w).shape[0]) % rank], x)
    x = rows(x)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % rank)])
    blocks = x.reshape(*x.shape[:-1], -1, rank)
    return blocks.sum(-2, dtype=wide(x)).astype(x.dtype)


def _turned(w: Array, d: Array) -> Array:
    """The update by "bat", of blocks `d [m / r, r, r]`."""
    (n, m), r = w.shape, d.shape[-1]
    blocks = w.astype(wide(w, d)).reshape(n // r, r, m // r, r)
    update = jnp.einsum("isop,osq->iqop", blocks, d)
    return (update + d.transpose(2, 0, 1)[None]).reshape(n, m)
