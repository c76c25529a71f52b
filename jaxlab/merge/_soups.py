"""Model soups, greedy and learned (Wortsman et al., 2022); `average` is the uniform."""

from collections.abc import Callable
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..types import Apply, Params, Stacked
from ._blocks import Per, by_leaf, coefficients
from ._coefficients import models as count, narrow, wide
from ._learn import Learned, learn
from ._linear import linear

if TYPE_CHECKING:
    import optax


def greedy_soup(
    models: Stacked, *, score: Callable[[Params], Any], keep_ties: bool = False
) -> tuple[Params, tuple[int, ...]]:
    r"""Averages the models, best first, that each make the soup better.

    From the best model on, $S \leftarrow S \cup \{\theta_i\}$ where
    $s(\mathrm{mean}(S \cup \{\theta_i\})) > s(\mathrm{mean}(S))$.

    Args:
      models: `[k, *leaf]` the ingredients $\theta_k$.
      score: $s$, on held-out data: a function of one model, larger is better. It is
        called from Python, 2k - 1 times, and may leave jax; jit it yourself.
      keep_ties: also keep an ingredient that leaves the score as it is.

    Returns:
      The soup `[*leaf]`, in the dtypes of `models`, and the indices of its
      ingredients, in the order they went in. The very model returned was scored: its
      score is at least that of every ingredient.

    Raises:
      ValueError: a leaf is not floating-point, or holds another number of models.

    Degenerate inputs:
      Equal scores go in by index. A score of NaN counts as the least of all. One model
      gives itself.

    References:
      Wortsman et al., 2022, "Model soups", https://arxiv.org/abs/2203.05482, Recipe 1,
      which keeps ties; the authors' code does not, and neither does the default here.

    Example:
      >>> import jax.numpy as jnp
      >>> models = {"w": jnp.array([0.0, 5.0, 1.5])}
      >>> greedy_soup(models, score=lambda p: -abs(p["w"] - 1))
      ({'w': Array(0.75, dtype=float32)}, (2, 0))
    """
    stacked = wide(models, name="models")
    k = count(stacked)
    one = lambda i: jax.tree.map(lambda x: x[i], models)
    scores = [_scored(score, one(i)) for i in range(k)]
    order = sorted(range(k), key=lambda i: (-scores[i], i))
    chosen, best = order[:1], scores[order[0]]
    soup, mean = one(order[0]), jax.tree.map(lambda x: x[order[0]], stacked)
    for i in order[1:]:
        share = 1 / (len(chosen) + 1)
        tasted = jax.tree.map(
            lambda m, x, i=i, s=share: m + s * (x[i] - m), mean, stacked
        )
        served = narrow(tasted, models)
        now = _scored(score, served)
        if now > best or (keep_ties and now == best):
            chosen, best, soup, mean = [*chosen, i], now, served, tasted
    return soup, tuple(chosen)


def learned_soup(
    models: Stacked,
    batches: Any,
    *,
    apply: Apply,
    loss: Callable[[Array, Any], Array],
    per: Per = "model",
    optimiser: "optax.GradientTransformation | None" = None,
    epochs: int = 1,
) -> Learned:
    r"""Learns the mixing weights of a soup, and a temperature, by gradient.

    $\min_{\alpha, \beta}\sum_t\ell(\beta f(\sum_k\mathrm{softmax}(\alpha)_k\theta_k;
    x_t), y_t)$.

    Args:
      models: `[k, *leaf]` the ingredients $\theta_k$.
      batches: held-out batches, arrays `[t, ...]` or an iterator.
      apply: $f$: `apply(params, batch)` gives logits.
      loss: $\ell$: `loss(logits, batch)` gives a scalar.
      per: what has weights of its own; "leaf" is the paper's soup by layer.
      optimiser: any optax transformation; None is Adam with learning rate 0.05.
      epochs: passes over stacked batches.

    Returns:
      `Learned(params, coefficients, losses)`: the soup; `{"weights": softmax(alpha),
      "temperature": beta}`; the loss before each step.

    Raises:
      ValueError: as `learn` does; `per="column"`.

    Degenerate inputs:
      It starts from the uniform soup with $\beta = 1$; one model stays itself.

    References:
      Wortsman et al., 2022, "Model soups", https://arxiv.org/abs/2203.05482, Appendix
      I, equation 2. The authors' code: per leaf, AdamW at 0.05 without decay, 5 epochs.

    Example:
      >>> import jax.numpy as jnp
      >>> got = learned_soup({"w": jnp.array([[0.0], [2.0]])}, jnp.ones((200, 1)),
      ...     apply=lambda p, x: p["w"] * x,
      ...     loss=lambda y, x: jnp.sum((y - 1.6) ** 2))
      >>> bool(abs(got.params["w"] * got.coefficients["temperature"] - 1.6)[0] < 1e-2)
      True
    """
    if per == "column":
        raise ValueError("per must be 'model', 'leaf', 'layer' or a function")
    if optimiser is None:
        import optax

        optimiser = optax.adam(0.05)
    start = {
        "weights": coefficients(models, per=per, fill=0.0),
        "temperature": jnp.ones((), jnp.float32),
    }
    served, weights, losses = learn(
        models,
        batches,
        method=_Soup(per),
        loss=_Tempered(apply, loss),
        coefficients=start,
        optimiser=optimiser,
        epochs=epochs,
    )
    shares = jax.tree.map(jax.nn.softmax, weights["weights"])
    return Learned(served[0], weights | {"weights": shares}, losses)


def _scored(score: Callable[[Params], Any], model: Params) -> float:
    """A score as a number that orders."""
    value = float(score(model))
    return -math.inf if math.isnan(value) else value


class _Soup(NamedTuple):
    """A merge by softmax weights that passes the temperature on."""

    per: Per

    def __call__(
        self, models: Stacked, *, weights: Any, temperature: Array
    ) -> tuple[Params, Array]:
        shares = jax.tree.map(jax.nn.softmax, weights)
        shares = by_leaf(shares, models, per=self.per)
        return linear(models, weights=shares, normalize=False), temperature


class _Tempered(NamedTuple):
    """The loss of the logits times the temperature."""

    apply: Apply
    loss: Callable[[Array, Any], Array]

    def __call__(self, soup: tuple[Params, Array], batch: Any) -> Array:
        logits = self.apply(soup[0], batch)
        return self.loss(soup[1].astype(logits.dtype) * logits, batch)
