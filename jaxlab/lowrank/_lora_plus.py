"""LoRA+: Hayou et al., 2024."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    import optax


def lora_plus(
    optimizer: Callable[[Any], "optax.GradientTransformation"],
    *,
    learning_rate: Any,
    ratio: float = 16.0,
) -> "optax.GradientTransformationExtraArgs":
    r"""One optimiser for A, and one of a higher learning rate for B.

    $\eta_B = \lambda \eta_A$.

    Args:
      optimizer: of a learning rate, such as `optax.adam`.
      learning_rate: $\eta_A$, of all entries but B; a number or a schedule.
      ratio: $\lambda$, above 0: what the entries `b` and `bias` learn faster by.

    Returns:
      An optax transformation for a `State`.

    Raises:
      ValueError: a ratio of 0 or below.

    References:
      Hayou et al., 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models",
      https://arxiv.org/abs/2402.12354, and
      https://github.com/nikhil-ghosh-berkeley/loraplus.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx, s = lora_plus(optax.sgd, learning_rate=1.0, ratio=4.0), jnp.ones(1)
      >>> state = {"w": {"a": s, "b": s}}
      >>> updates, _ = tx.update(state, tx.init(state))
      >>> {name: v.item() for name, v in updates["w"].items()}
      {'a': -1.0, 'b': -4.0}
    """
    import optax  # slow to import

    if ratio <= 0:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    scheduled = lambda count: ratio * learning_rate(count)
    faster = scheduled if callable(learning_rate) else ratio * learning_rate
    parts: Any = {"a": optimizer(learning_rate), "b": optimizer(faster)}
    return optax.partition(parts, _labels)


def _labels(state: Any) -> Any:
    """Which entries learn faster: those labelled b."""
    name = lambda path: getattr(path[-1], "key", None)
    fast = lambda path, _: "b" if name(path) in ("b", "bias") else "a"
    return jax.tree_util.tree_map_with_path(fast, state)
