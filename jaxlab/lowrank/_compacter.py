"""Compacter: Karimi Mahabadi et al., 2021; for vision and language, Sung et al."""

import math
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._adapters import FORMS, Form, check_form
from ._module import shifted
from ._operands import like
from ._rank import check_least, check_rank, plus, wide


def compacter(
    *, rank: int, divisions: int = 4, factors: int = 1, form: Form = "gelu"
) -> Adapter:
    r"""A bottleneck after a layer, of sums of Kronecker products.

    $y \leftarrow y + f(y D + b_d) U + b_u$, where D and U are
    $\sum_{i=1}^{n} A_i \otimes (s_i t_i)$: the $A_i$ (n, n) are one set for all layers
    and both matrices, $s_i t_i$ is of rank `factors`. A layer has
    2 q (m + r) + m + r numbers, and $n^3$ are shared. D and U are never formed.

    Args:
      rank: r, the width of the bottleneck, a multiple of `divisions`.
      divisions: n, which divides r and the layer's m.
      factors: q, the rank of $s_i t_i$.
      form: f.

    Returns:
      An adapter with state `down_left [n, m/n, q]`, `down_right [n, q, r/n]`,
      `down_bias [r]`, likewise `up_`, and the shared `rule [n, n, n]`; it has no
      merged weight.

    Raises:
      ValueError: a rank, divisions or factors below 1; an unknown form; `divisions`
        does not divide the rank, or (from `init`) the outputs of the layer.

    Degenerate inputs:
      Fresh, the rule is of the order of 1e-4, and the layer changes by some 1e-8.

    References:
      Karimi Mahabadi et al., 2021, "Compacter", https://arxiv.org/abs/2106.04647,
      equations 4 to 6. Sung et al., 2021, "VL-Adapter",
      https://arxiv.org/abs/2112.06825, whose code draws the rule from a normal of 1e-4
      and the factors as Glorot.

    Example:
      >>> s = compacter(rank=4, divisions=2).init(jax.random.key(0), jnp.ones((4, 6)))
      >>> s["down_left"].shape, s["down_right"].shape
      ((2, 3, 1), (2, 1, 2))
    """
    check_rank(rank)
    check_form(form)
    for name, value in (("divisions", divisions), ("factors", factors)):
        check_least(name, value)
    if rank % divisions:
        raise ValueError(f"divisions {divisions} does not divide rank {rank}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        m, dtype = w.shape[1], wide(w)
        if m % divisions:
            raise ValueError(f"divisions {divisions} does not divide the {m} outputs")
        keys = iter(jax.random.split(key, 4))

        def glorot(rows: int, columns: int) -> Array:
            limit = math.sqrt(6 / (rows + columns))
            shape = (divisions, rows, columns)
            return jax.random.uniform(next(keys), shape, dtype, -limit, limit)

        outer, inner = m // divisions, rank // divisions
        return {
            "down_left": glorot(outer, factors),
            "down_right": glorot(factors, inner),
            "down_bias": jnp.zeros(rank, dtype),
            "up_left": glorot(inner, factors),
            "up_right": glorot(factors, outer),
            "up_bias": jnp.zeros(m, dtype),
        }

    def shared(key: Array, sizes: Any) -> dict[str, Any]:
        del sizes
        return {"rule": 1e-4 * jax.random.normal(key, (divisions,) * 3)}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        y = x @ w
        rule = s["rule"]
        z = _multiplied(y, rule, s["down_left"], s["down_right"])
        z = FORMS[form](shifted(z, s["down_bias"]))
        z = _multiplied(z, rule, s["up_left"], s["up_right"])
        return plus(y, shifted(z, s["up_bias"]))

    config = (("rank", rank), ("divisions", divisions), ("factors", factors))
    config = ("compacter", *config, ("form", form))
    return Adapter(init, apply, None, shared=shared, config=config)


def _multiplied(x: Array, rule: Array, left: Array, right: Array) -> Array:
    """`x @ sum_i kron(rule[i], left[i] @ right[i])`, from the smallest side on."""
    rule, left, right = (like(v, x) for v in (rule, left, right))
    cut = x.reshape(*x.shape[:-1], rule.shape[1], left.shape[1])
    z = jnp.einsum("...ak,ikq->...aiq", cut, left)
    z = jnp.einsum("...aiq,iac->...ciq", z, rule)
    return jnp.einsum("...ciq,iqp->...cp", z, right).reshape(*x.shape[:-1], -1)
