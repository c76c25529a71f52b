"""Merging during training (Jang et al., 2024)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..types import Params, Stacked


def periodic(method: Callable[..., Params], *, period: int) -> Callable[..., Stacked]:
    r"""A step of joint training: every so often, all models go on from their merge.

    $\theta_k \leftarrow m(\theta_1, \dots, \theta_k)$ at the steps that `period`
    divides; in between, the models stay as they are.

    Args:
      method: a merge $m$ of stacked models, its hyperparameters bound or left
        to the call; `on_base(model_stock)` gives Model Stock's periodic merging.
      period: the number of steps from one merge to the next, such as an epoch.

    Returns:
      A function `(models, *data, step, **hyperparameters) -> models` of stacked trees;
      `step` counts from 0 and may be traced. The dtypes of `models` are kept.

    Raises:
      ValueError: a period below 1.

    Degenerate inputs:
      At step 0 nothing is merged. With k = 1 the one model becomes its merge.

    References:
      Jang et al., 2024, "Model Stock: All we need is just a few fine-tuned models",
      https://arxiv.org/abs/2403.19522, Section 4, "periodic merging".

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> sync = periodic(merge.average, period=10)
      >>> models = {"w": jnp.array([[1.0], [3.0]])}
      >>> sync(models, step=9)["w"][:, 0], sync(models, step=10)["w"][:, 0]
      (Array([1., 3.], dtype=float32), Array([2., 2.], dtype=float32))
    """
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")

    def sync(
        models: Stacked, *data: Any, step: int | Int[Array, ""], **options: Any
    ) -> Stacked:
        def merged(models: Stacked) -> Stacked:
            one = method(models, *data, **options)
            copy = lambda x, m: jnp.broadcast_to(m.astype(x.dtype), x.shape)
            return jax.tree.map(copy, models, one)

        due: bool | Bool[Array, ""] = (step % period == 0) & (step > 0)
        if isinstance(due, bool):
            return merged(models) if due else models
        return jax.lax.cond(due, merged, lambda models: models, models)

    return sync
