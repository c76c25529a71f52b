"""How much memory a function's values take, from its jaxpr."""

from collections.abc import Callable
from typing import Any

from jax.extend import core as jex
import numpy as np

from ._program import Program, program


def live_bytes(fn: Callable[..., Any], *avals: Any) -> int:
    """The most bytes of values that are alive at once while a function runs.

    A value lives from the operation that makes it to the last one that reads it;
    inputs and results live throughout. Values that a compiler never stores count too,
    and so does the workspace of a singular value decomposition.

    Args:
      fn: any function of arrays.
      *avals: what it is called with, arrays or shapes.

    Returns:
      A number of bytes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> row = jax.ShapeDtypeStruct((100,), jnp.float32)
      >>> live_bytes(lambda x: jnp.sum(x * 2), row)
      804
    """
    code, _ = program(fn, *avals)
    return _peak(code, sum(_bytes(code.avals[v]) for v in code.inputs))


def _peak(code: Program, held: int) -> int:
    """The most that is alive at once, given that `held` is before the first step."""
    last = {v: i for i, op in enumerate(code.ops) for v in op.inputs}
    stays = {*code.inputs, *code.outputs, *code.consts}
    most = held
    for i, (op, params) in enumerate(zip(code.ops, code.params, strict=True)):
        held += sum(_bytes(code.avals[v]) for v in op.outputs)
        most = max(most, held + _workspace(code, op.name, op.inputs, params))
        done = {v for v in (*op.inputs, *op.outputs) if last.get(v, i) == i}
        held -= sum(_bytes(code.avals[v]) for v in done - stays)
    return most


def _workspace(
    code: Program, name: str, inputs: tuple[int, ...], params: dict[str, Any]
) -> int:
    """What an operation needs beside its inputs and results."""
    if name == "svd":  # LAPACK's gesdd: a copy, and some squares of the shorter side
        aval = code.avals[inputs[0]]
        one = aval.shape[-2] * aval.shape[-1] + 5 * min(aval.shape[-2:]) ** 2
        return one * aval.dtype.itemsize
    body = params.get("jaxpr")
    if name != "scan" or body is None:
        return 0
    inner, _ = program(jex.jaxpr_as_fun(body), *body.in_avals)
    return _peak(inner, 0)


def _bytes(aval: Any) -> int:
    if not isinstance(aval.dtype, np.dtype):
        return 8  # a key
    return int(np.prod(aval.shape, dtype=np.int64)) * aval.dtype.itemsize
