"""A slice of the bits that `jax.random` draws, without drawing the rest.

`jax.random.bits(key, shape)` hashes the flat index of each entry with Threefry-2x32, so
any range of entries can be made alone, on any device, in any order.
"""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt32
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def bits_slice(
    key: PRNGKeyArray, shape: tuple[int, ...], axis: int, start: int, size: int
) -> UInt32[Array, "..."]:
    """`jax.random.bits(key, shape)[start : start + size]` along `axis`.

    The rounds are unrolled: on a CPU that is eight times as fast as the library's loop,
    and the bits are the same (Salmon et al., 2011, "Parallel Random Numbers: As Easy as
    1, 2, 3", section 4.2).
    """
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    outer = np.arange(int(np.prod(shape[:axis], dtype=np.int64)), dtype=np.uint64)
    first = (outer * np.uint64(shape[axis]) + np.uint64(start)) * np.uint64(inner)
    high, low = (first >> np.uint64(32)).astype(np.uint32), first.astype(np.uint32)
    local = (*shape[:axis], size, *shape[axis + 1 :])
    return _draw(jax.default_backend() == "cpu")(key, high, low, local)


def cpu_options(on_cpu: bool) -> dict[str, Any] | None:
    """Compiler options for a block's function on a CPU.

    Vectors as wide as they come hash 1.7 times as fast. Up to jax 0.10 there are two
    loop emitters, and the older keeps long fusions vectorised where the newer gives up:
    0.5 ms instead of 10 for a block of three models in DARE-TIES.
    """
    options: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}
    if jax.__version_info__ < (0, 11):
        options["xla_cpu_use_fusion_emitters"] = False
    return options if on_cpu else None


@ft.cache
def _draw(on_cpu: bool) -> Any:
    """Compiles once for every local shape; where the slice begins is an argument."""
    return jax.jit(_bits, static_argnums=3, compiler_options=cpu_options(on_cpu))


def _bits(
    key: PRNGKeyArray, high: Array, low: Array, local: tuple[int, ...]
) -> UInt32[Array, "..."]:
    count = int(np.prod(local, dtype=np.int64)) // len(high)
    within = jax.lax.broadcasted_iota(jnp.uint32, (len(high), count), 1)
    lo = low[:, None] + within
    hi = high[:, None] + (lo < low[:, None]).astype(jnp.uint32)
    data = jax.random.key_data(key)
    a, b = _threefry(data[0], data[1], hi, lo)
    return (a ^ b).reshape(local)


def _threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds, elementwise."""
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(r)) | (x1 >> np.uint32(32 - r))
            x1 = x1 ^ x0
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x0, x1
