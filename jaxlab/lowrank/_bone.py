"""Bone: Kang, 2024."""

from typing import Any, Literal

from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._operands import dense, is_float, like, rows
from ._rank import check_least, plus, wide

Form = Literal["column", "row"]


def bone(*, block: int, form: Form = "column") -> Adapter:
    r"""Affine maps of a weight's blocks: $W'_{ba} = W_{ba} + C W_{ba} + C$.

    W is cut into blocks of r × r, b along its n inputs and a along its m outputs. The
    same C moves all the blocks of an output group, $C_a$ ("column"), or of an input
    group, $C_b$ ("row"). In the row form
    $y_a = \sum_b (x_b + x_b C_b) W_{ba} + \sum_b x_b C_b$, which is how it is computed.

    Args:
      block: r, a divisor of n and m.
      form: "column", m / r blocks; or "row", n / r.

    Returns:
      An adapter with state `c [m / r, r, r]` or `[n / r, r, r]`.

    Raises:
      ValueError: an unknown form; a block below 1, or (from `init`) one that does not
        divide n and m.

    Degenerate inputs:
      Fresh, C = 0: the layer is unchanged.

    References:
      Kang, 2024, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning
      Methods for Large Language Models", https://arxiv.org/abs/2409.15371, versions 1
      to 3, Bone-col and Bone-row of the authors' code; the transpose of their blocks,
      as their weight is `[m, n]`. PEFT has the column form as MiSS with
      `init_weights="bat"`; what later versions call Bone is MiSS itself.

    Example:
      >>> import jax
      >>> adapter = bone(block=2, form="row")
      >>> adapter.init(jax.random.key(0), jnp.ones((6, 4)))["c"].shape
      (3, 2, 2)
    """
    check_least("block", block)
    if form not in ("column", "row"):
        raise ValueError(f"form must be 'column' or 'row', got {form!r}")
    axis = "b" if form == "row" else "a"

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        n, m = w.shape
        if n % block or m % block:
            raise ValueError(f"blocks of {block} do not divide a weight [{n}, {m}]")
        groups = (n if form == "row" else m) // block
        return {"c": jnp.zeros((groups, block, block), wide(w))}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        n, m = w.shape
        c = s["c"]
        blocks = w.astype(wide(w, c)).reshape(n // block, block, m // block, block)
        moved = jnp.einsum(f"{axis}ij,bjak->biak", c, blocks)
        constant = c[:, :, None] if form == "row" else c.transpose(1, 0, 2)[None]
        return plus(w, (moved + constant).reshape(n, m))

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        matrix = dense(w)
        if not is_float(x if isinstance(x, Array) else x.x):  # a look-up
            return x @ merge(matrix, s)
        inputs = rows(x)
        cut = inputs.reshape(*inputs.shape[:-1], -1, block)
        moved = jnp.einsum("...bi,bij->...bj", cut, like(s["c"], inputs))
        turned = plus(inputs, moved.reshape(inputs.shape))
        constant = jnp.tile(moved.sum(-2), matrix.shape[1] // block)
        return plus(turned @ like(matrix, inputs), constant)

    config = ("bone", ("block", block), ("form", form))
    return Adapter(init, apply if form == "row" else None, merge, config=config)
