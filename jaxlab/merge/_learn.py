"""Coefficients of a merge by gradient, and many of them scored at once."""

from collections.abc import Callable
import functools as ft
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..types import Params, Stacked
from ._base import on_base
from ._loop import loop

if TYPE_CHECKING:
    import optax

Loss = Callable[[Params, Any], Float[Array, ""]]
"""`loss(params, batch) -> scalar`."""


class Learned(NamedTuple):
    """A merge that was trained or searched for."""

    params: Params  # the merged model, at the coefficients
    coefficients: Any  # in the structure they started with
    losses: Float[Array, " t"]  # one per step, each before its update


def learn(
    models: Stacked,
    batches: Any,
    *,
    method: Callable[..., Params],
    loss: Loss,
    coefficients: dict[str, Any],
    optimiser: "optax.GradientTransformation",
    base: Params | None = None,
    epochs: int = 1,
) -> Learned:
    r"""Trains the coefficients of any differentiable merge against any loss.

    $c \leftarrow c - \eta\nabla_c\,\ell(m(\theta_1, \dots, \theta_k; c), B_t)$. Stacked
    batches make the whole training one program, a `lax.scan`; an iterator is fed to one
    compiled step. The models are arguments of the program and never constants in it.

    Args:
      models: `[k, *leaf]` models $\theta_k$, or whatever `method` takes first.
      batches: arrays `[t, ...]`, one batch per step, or an iterator of batches. May
        hold keys, where the loss is random.
      method: the merge $m$: `method(models, **coefficients)` gives what `loss` takes.
        Bind what is not trained with `functools.partial`.
      loss: $\ell$: `loss(params, batch)`, a scalar.
      coefficients: where $c$ starts: the keywords of `method`, each a number or a tree
        of arrays; `coefficients` and `by_leaf` make the usual ones.
      optimiser: any optax transformation.
      base: `[*leaf]` where given, `method` merges the task vectors from it and the
        result is added to it, as `on_base` does.
      epochs: passes over stacked batches.

    Returns:
      `Learned(params, coefficients, losses)`: the model at the last coefficients, these
      in their structure, and the loss `[epochs * t]` before each step.

    Raises:
      ValueError: batches that are not stacked, epochs below 1, or more than 1 of an
        iterator; and whatever `method` raises.

    Degenerate inputs:
      An iterator without batches leaves the coefficients. A loss of NaN is not hidden:
      it is in `losses`. What `method` holds constant (masks, ranks) has no gradient.

    References:
      Yang et al., 2023, "AdaMerging", https://arxiv.org/abs/2310.02575, Section 3; for
      any merge, loss and optimiser.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxlab import merge
      >>> found = learn({"w": jnp.array([[0.0], [1.0]])}, jnp.full(99, 0.3),
      ...     method=merge.linear, loss=lambda p, y: jnp.sum((p["w"] - y) ** 2),
      ...     coefficients={"weights": jnp.ones(2)}, optimiser=optax.sgd(1.0))
      >>> found.params["w"].round(3)
      Array([0.3], dtype=float32)
    """
    start = jax.tree.map(_trainable, coefficients)
    carry = start, optimiser.init(start)
    options = method, loss, optimiser
    carry, losses = loop(_step, options, (models, base), carry, batches, epochs=epochs)
    return Learned(_merged(method, models, base, carry[0]), carry[0], losses)


def score(
    models: Stacked,
    batch: Any,
    *,
    method: Callable[..., Params],
    loss: Callable[[Params, Any], Any],
    coefficients: dict[str, Any],
    base: Params | None = None,
    at_once: int | None = None,
) -> Any:
    r"""Scores many recipes in one compiled program.

    $\ell(m(\theta_1, \dots, \theta_k; c_i), B)$ for all i.

    Args:
      models: `[k, *leaf]` models, or whatever `method` takes first.
      batch: what every recipe is scored on.
      method: the merge: `method(models, **coefficients)`.
      loss: `loss(params, batch)`, an array or a tree of them: losses or metrics.
      coefficients: the keywords of `method`, every array with a leading axis
        `[p, ...]` of recipes.
      base: `[*leaf]` as in `learn`.
      at_once: how many are merged at a time, which bounds the memory at that many
        models; None for all p.

    Returns:
      What `loss` gives, with a leading axis `[p, ...]`.

    Raises:
      ValueError: coefficients whose leading axes differ; and whatever `method` raises.

    Degenerate inputs:
      A recipe whose loss is NaN scores NaN and disturbs no other.

    References:
      Wortsman et al., 2021, "Robust fine-tuning of zero-shot models",
      https://arxiv.org/abs/2109.01903: such a sweep, of one coefficient.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxlab import merge
      >>> score({"w": jnp.array([[0.0], [1.0]])}, 1.0, method=merge.wise_ft,
      ...     loss=lambda p, y: jnp.sum(p["w"] - y),
      ...     coefficients={"alpha": jnp.array([0.0, 0.5, 1.0])})
      Array([-1. , -0.5,  0. ], dtype=float32)
    """
    return _scored(models, batch, base, coefficients, method, loss, at_once)


@ft.partial(jax.jit, static_argnums=(4, 5, 6))
def _scored(
    models: Stacked,
    batch: Any,
    base: Params | None,
    coefficients: dict[str, Any],
    method: Callable[..., Params],
    loss: Callable[[Params, Any], Any],
    at_once: int | None,
) -> Any:
    """The program of `score`."""
    one = lambda recipe: loss(merged(method, models, base, recipe), batch)
    if at_once is None:
        return jax.vmap(one)(coefficients)
    return jax.lax.map(one, coefficients, batch_size=at_once)


def merged(
    method: Callable[..., Params],
    models: Stacked,
    base: Params | None,
    coefficients: dict[str, Any],
) -> Params:
    """The merge at some coefficients."""
    if base is None:
        return method(models, **coefficients)
    return on_base(method)(models, base, **coefficients)


_merged = jax.jit(merged, static_argnums=0)


def _step(
    data: tuple[Stacked, Params | None],
    carry: tuple[Any, Any],
    batch: Any,
    method: Callable[..., Params],
    loss: Loss,
    optimiser: "optax.GradientTransformation",
) -> tuple[Any, Array]:
    """One update of the coefficients."""
    import optax

    value = lambda c: loss(merged(method, *data, c), batch)
    c, state = carry
    now, slope = jax.value_and_grad(value)(c)
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        updates, state = optimiser.update(slope, state, c)
    return (optax.apply_updates(c, updates), state), now


def _trainable(c: Any) -> Array:
    """A coefficient as a floating-point array of a fixed dtype."""
    c = jnp.asarray(c)
    floating = jnp.issubdtype(c.dtype, jnp.floating)
    return jax.lax.convert_element_type(c, c.dtype if floating else jnp.float32)
