"""The one rule of where a kernel runs.

JAX 0.11 announces the end of Pallas's Triton backend (a DeprecationWarning when a GPU
kernel is lowered); the pinned range, up to 0.12, has it.
"""

from collections.abc import Callable
import functools as ft
from typing import Any, Literal, TypeVar

import jax

Use = Literal["auto", "reference", "pallas"]
T = TypeVar("T")


def dispatch(
    use: Use,
    *args: Any,
    reference: Callable[..., T],
    gpu: Callable[..., T],
    tpu: Callable[..., T],
) -> T:
    """Runs the reference on CPU, the kernel on NVIDIA GPU and TPU.

    "pallas" takes the kernel everywhere: where there is neither, Pallas interprets it.

    The platform is the one the program is lowered for, not the default backend of the
    process, so ahead-of-time lowering for another platform takes its kernel.
    """
    if use == "reference":
        return reference(*args)
    if use == "auto":
        return jax.lax.platform_dependent(*args, cuda=gpu, tpu=tpu, default=reference)
    if use == "pallas":
        shown = ft.partial(gpu, interpret=True)
        return jax.lax.platform_dependent(*args, cuda=gpu, tpu=tpu, default=shown)
    raise ValueError(f"use must be 'auto', 'reference' or 'pallas', got {use!r}")


def check_float(name: str, x: jax.Array) -> None:
    """Raises unless `x` is of a type that the kernels read."""
    if x.dtype.name not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16, got {x.dtype.name}"
        )
