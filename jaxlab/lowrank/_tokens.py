"""Trainable tokens: single rows of an embedding."""

from typing import Any

import jax
from jax import Array
import numpy as np

from ..types import Adapter
from ._operands import dense, like
from ._rank import plus, wide


def trainable_tokens(*, indices: tuple[int, ...]) -> Adapter:
    r"""Trains the rows of chosen tokens: $E'_i = e_i$ for i in `indices`.

    $y = x E + (x_{\cdot I}) (e - E_I)$: neither a copy nor a gradient of the table.

    Args:
      indices: the rows I, each once. Of a table that is also the output layer, the
        tokens' outputs are trained too.

    Returns:
      An adapter of tables [n, m] with state `rows [k, m]`.

    Raises:
      ValueError: no index, or one twice; (from `init`) one that the table lacks.

    Degenerate inputs:
      Fresh, the rows are those of the table.

    References:
      The method of `TrainableTokensConfig` in PEFT 0.15,
      https://huggingface.co/docs/peft/package_reference/trainable_tokens.

    Example:
      >>> import jax.numpy as jnp
      >>> s = {"rows": jnp.array([[7.0]])}
      >>> trainable_tokens(indices=(1,)).merge(jnp.zeros((3, 1)), s).tolist()
      [[0.0], [7.0], [0.0]]
    """
    indices = tuple(indices)
    if not indices or len(set(indices)) < len(indices) or min(indices) < 0:
        raise ValueError(f"indices must be rows of the table, each once: {indices}")
    at = np.array(indices)

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        if max(indices) >= w.shape[0]:
            raise ValueError(f"index {max(indices)} is no row of [{w.shape[0]}, ...]")
        return {"rows": w[at].astype(wide(w))}

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        table = dense(w)
        update = s["rows"] - table[at].astype(s["rows"].dtype)
        chosen = jax.nn.one_hot(at, table.shape[0], axis=0, dtype=update.dtype)
        return plus(x @ w, (x @ like(chosen, x)) @ like(update, x))

    def merge(w: Array, s: dict[str, Any]) -> Array:
        return w.at[at].set(s["rows"].astype(w.dtype))

    config = ("trainable_tokens", ("indices", indices))
    return Adapter(init, apply, merge, config=config)
