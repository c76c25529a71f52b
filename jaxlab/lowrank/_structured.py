"""Blocks on the diagonal: what orthogonal and Kronecker adapters share."""

from typing import Any

from jax import Array
import jax.numpy as jnp

from ._operands import Input


def is_plain(x: Any) -> bool:
    """Whether the rows of an input are the input itself: no patches, no look-up."""
    return not isinstance(x, Input) or x.op.use.primitive == "dot_general"


def block_sides(n: int, block_size: int | None, blocks: int | None) -> tuple[int, int]:
    """The blocks that n inputs have, and their size; raises where they do not fit."""
    if block_size is not None:
        number, size, rest = n // block_size, block_size, n % block_size
    else:
        assert blocks is not None
        number, size, rest = blocks, n // blocks, n % blocks
    if rest or size < 2:
        what = f"blocks={blocks}" if block_size is None else f"block_size={block_size}"
        raise ValueError(f"{what} does not divide {n} inputs into blocks of 2 or more")
    return number, size


def check_blocks(block_size: int | None, blocks: int | None) -> None:
    """Raises unless exactly one of the two is given, and is positive."""
    if (block_size is None) == (blocks is None):
        raise ValueError("either block_size or blocks is needed, and not both")
    if (block_size or blocks or 0) < 1:
        raise ValueError(f"block_size={block_size} and blocks={blocks}: below 1")


def skew(entries: Array, size: int) -> Array:
    """Skew-symmetric matrices of the entries above their diagonals, row by row."""
    rows, columns = jnp.triu_indices(size, 1)
    upper = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype)
    upper = upper.at[..., rows, columns].set(entries)
    return upper - jnp.swapaxes(upper, -1, -2)


def cayley(q: Array) -> Array:
    r"""The rotation $(I - Q)(I + Q)^{-1}$ of a skew-symmetric Q."""
    one = identities(q)
    return jnp.linalg.solve(one + q, one - q)


def identities(q: Array) -> Array:
    """As many identity matrices as q has matrices, of their size."""
    return jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=q.dtype), q.shape)


def turned(x: Array, blocks: Array) -> Array:
    """`x [..., n]` times the matrix of diagonal `blocks [n / b or 1, b, b]`."""
    size = blocks.shape[-1]
    parts = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    blocks = jnp.broadcast_to(blocks, (parts.shape[-2], size, size))
    return jnp.einsum("...rk,rkc->...rc", parts, blocks).reshape(x.shape)
