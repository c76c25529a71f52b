"""aTLAS: task vectors by learned anisotropic scaling (Zhang et al., 2024)."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .. import tree
from ..types import Params, Stacked
from ._base import add, task_vectors
from ._blocks import Per, anisotropic, by_leaf, coefficients
from ._coefficients import models as count, wide
from ._learn import Learned, Loss, learn
from ._task_arithmetic import task_arithmetic

if TYPE_CHECKING:
    import optax


def atlas(
    models: Stacked,
    batches: Any,
    *,
    base: Params,
    loss: Loss,
    per: Per = "leaf",
    parts: Params | None = None,
    optimiser: "optax.GradientTransformation | None" = None,
    epochs: int = 1,
) -> Learned:
    r"""Composes task vectors by one trained coefficient per parameter block of each.

    $\theta = \theta_0 + \sum_k\Lambda_k\tau_k$, $\Lambda_k =
    \mathrm{diag}(\lambda_k^1 I, \dots, \lambda_k^l I)$, from $\lambda = 0$ on. The
    coefficients are all that is trained: a fine-tuning of few parameters, for few
    labels (`loss` a cross-entropy) or none (`entropy`, `pseudo_label`).

    Args:
      models: `[k, *leaf]` models tuned on other tasks.
      batches: batches of the target task, arrays `[t, ...]` or an iterator.
      base: `[*leaf]` the model $\theta_0$ they were tuned from.
      loss: `loss(params, batch)`, a scalar.
      per: the blocks: "leaf" is the paper's; "model", "layer", "column" or a function
        from a path to a block.
      parts: aTLAS x K: the part of every entry, as `random_parts` deals them, not
        traced; each part of each leaf then has its own coefficient, and `per` must be
        "leaf".
      optimiser: any optax transformation; None is AdamW with learning rate 0.1 and
        decay 0.1.
      epochs: passes over stacked batches.

    Returns:
      `Learned(params, coefficients, losses)`: the model in the dtypes of `base`; the
      coefficients as `coefficients(models, per=per)` has them, or `[k, K]` by leaf with
      `parts`; the loss before each step.

    Raises:
      ValueError: the trees differ, `parts` with another `per`, or as `learn` does.

    Degenerate inputs:
      A block in which a model equals the base keeps the coefficient's start, but for
      the optimiser's decay.

    References:
      Zhang et al., 2024, "Knowledge Composition using Task Vectors with Learned
      Anisotropic Scaling", https://arxiv.org/abs/2407.02880. The authors' code also
      anneals the rate by a cosine and clips the gradient's norm to 1: chain them.

    Example:
      >>> import jax.numpy as jnp
      >>> models, base = {"w": jnp.array([[2.0], [4.0]])}, {"w": jnp.ones(1)}
      >>> got = atlas(models, 3 * jnp.ones((300, 1)), base=base,
      ...     loss=lambda p, x: jnp.sum((p["w"] - x) ** 2))
      >>> bool(abs(got.params["w"][0] - 3) < 0.1)
      True
    """
    if parts is not None and per != "leaf":
        raise ValueError(f"parts have coefficients by leaf, but per is {per!r}")
    deltas = task_vectors(wide(models, name="models"), base)
    start = coefficients(deltas, per=per, fill=0.0)
    if parts is not None:
        tree.check_like(parts, base, name="parts")
        k, most = count(deltas), max(int(jnp.max(p)) for p in jax.tree.leaves(parts))
        start = jax.tree.map(lambda _: jnp.zeros((k, most + 1)), deltas)
    if optimiser is None:
        import optax

        optimiser = optax.adamw(0.1, weight_decay=0.1)
    learned = learn(
        (deltas, base, parts),
        batches,
        method=_Composed(per),
        loss=loss,
        coefficients={"scale": start},
        optimiser=optimiser,
        epochs=epochs,
    )
    return learned._replace(coefficients=learned.coefficients["scale"])


class _Composed(NamedTuple):
    """The base and the anisotropically scaled task vectors, added."""

    per: Per

    def __call__(
        self, data: tuple[Stacked, Params, Params | None], *, scale: Any
    ) -> Params:
        deltas, base, parts = data
        if parts is None:
            scale = by_leaf(scale, deltas, per=self.per)
        else:
            scale = jax.tree.map(_dealt, scale, parts)
        return add(base, task_arithmetic(anisotropic(deltas, scale=scale)))


def _dealt(scale: Array, part: Array) -> Array:
    """Coefficients `[k, K]` of the parts, as `[k, *leaf]` of the entries."""
    return jnp.take(scale, part, axis=1)
