"""AdaMerging (Yang et al., 2023)."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..types import Apply, Params, PerModel, Stacked
from ._base import add, task_vectors
from ._blocks import Per, by_leaf, coefficients
from ._coefficients import wide
from ._fuse import elect
from ._learn import Learned, learn
from ._objectives import entropy
from ._task_arithmetic import task_arithmetic
from ._trim import trim

if TYPE_CHECKING:
    import optax


def adamerging(
    models: Stacked,
    batches: Any,
    *,
    base: Params,
    apply: Apply,
    per: Per = "leaf",
    density: PerModel | None = None,
    start: float = 0.3,
    optimiser: "optax.GradientTransformation | None" = None,
    epochs: int = 1,
) -> Learned:
    r"""Task arithmetic by coefficients that make predictions on unlabelled data sure.

    $\theta^l = \theta_0^l + \sum_k\lambda_k^l\tau_k^l$ with $\lambda$ from
    $\min_\lambda\sum_k H(f(\theta; X_k))$, from a common start on.

    Args:
      models: `[k, *leaf]` tuned models.
      batches: unlabelled batches, arrays `[t, ...]` or an iterator; each holds the
        inputs of all tasks.
      base: `[*leaf]` the model $\theta_0$ they were tuned from.
      apply: `apply(params, batch)` gives logits, or a tree of logits by task.
      per: "leaf" is the paper's layer-wise AdaMerging, "model" its task-wise.
      density: where given, AdaMerging++: the task vectors are trimmed to this
        fraction and rid of the entries against the elected sign, as `ties` does.
      start: the first value of all $\lambda$.
      optimiser: any optax transformation; None is Adam with learning rate 0.001.
      epochs: passes over stacked batches.

    Returns:
      `Learned(params, coefficients, losses)`: the model in the dtypes of `base`; the
      coefficients as `coefficients(models, per=per)` has them; the entropies.

    Raises:
      ValueError: the trees differ, a density out of range, or as `learn` does.

    Degenerate inputs:
      Models equal to the base merge to it, with coefficients of no gradient.

    References:
      Yang et al., 2023, "AdaMerging: Adaptive Model Merging for Multi-Task Learning",
      https://arxiv.org/abs/2310.02575, Section 3.2; start, optimiser and 500 steps are
      the authors'.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w = jnp.ones((9, 1, 1)), jnp.array([[[1.0, 0.0]], [[0.0, 0.2]]])
      >>> got = adamerging({"w": w}, x, base={"w": jnp.zeros((1, 2))}, per="model",
      ...     apply=lambda p, x: x @ p["w"])
      >>> [round(float(c), 3) for c in got.coefficients]  # the first makes it surer
      [0.309, 0.291]
    """
    deltas = task_vectors(wide(models, name="models"), base)
    if density is not None:
        trimmed = trim(deltas, density=density)
        keep = lambda x, agree: jnp.where(agree, x, jnp.zeros_like(x))
        deltas = jax.tree.map(keep, trimmed, elect(trimmed))
    if optimiser is None:
        import optax

        optimiser = optax.adam(1e-3)
    return _unwrapped(
        learn(
            (deltas, base),
            batches,
            method=_Scaled(per),
            loss=_Entropy(apply),
            coefficients={"weights": coefficients(deltas, per=per, fill=start)},
            optimiser=optimiser,
            epochs=epochs,
        )
    )


def _unwrapped(learned: Learned) -> Learned:
    """The same, with the only coefficient in place of the dict that holds it."""
    return learned._replace(coefficients=learned.coefficients["weights"])


class _Scaled(NamedTuple):
    """The base and the weighted task vectors, added."""

    per: Per

    def __call__(self, data: tuple[Stacked, Params], *, weights: Any) -> Params:
        deltas, base = data
        weights = by_leaf(weights, deltas, per=self.per)
        return add(base, task_arithmetic(deltas, weights=weights))


class _Entropy(NamedTuple):
    """The entropy of what a model predicts."""

    apply: Apply

    def __call__(self, params: Params, batch: Any) -> Array:
        return entropy(self.apply(params, batch))
