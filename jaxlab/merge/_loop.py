"""A training loop that compiles once: a scan over stacked batches, or step by step."""

from collections.abc import Callable, Iterator
import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Step = Callable[..., tuple[Any, Float[Array, ""]]]
"""`step(data, carry, batch, *options) -> (carry, loss)`; the options are hashable."""


def loop(
    step: Step,
    options: tuple[Any, ...],
    data: Any,
    carry: Any,
    batches: Any,
    *,
    epochs: int,
) -> tuple[Any, Float[Array, " t"]]:
    """Runs a step over `[t, ...]` batches, `epochs` times, or over an iterator once."""
    if not isinstance(batches, Iterator):
        _check(batches, epochs)
        return _scan(step, options, data, carry, batches, epochs)
    if epochs != 1:
        raise ValueError(f"an iterator of batches is run once, got epochs={epochs}")
    losses = []
    for batch in batches:
        carry, loss = _once(step, options, data, carry, batch)
        losses.append(loss)
    return carry, jnp.stack(losses) if losses else jnp.zeros(0)


@ft.partial(jax.jit, static_argnums=(0, 1, 5))
def _scan(
    step: Step, options: tuple, data: Any, carry: Any, batches: Any, epochs: int
) -> tuple[Any, Array]:
    """All epochs in one program."""
    one = lambda c, batch: step(data, c, batch, *options)
    epoch = lambda c, _: jax.lax.scan(one, c, batches)
    carry, losses = jax.lax.scan(epoch, carry, length=epochs)
    return carry, losses.reshape(-1)


@ft.partial(jax.jit, static_argnums=(0, 1))
def _once(
    step: Step, options: tuple, data: Any, carry: Any, batch: Any
) -> tuple[Any, Array]:
    """One step."""
    return step(data, carry, batch, *options)


def _check(batches: Any, epochs: int) -> None:
    """Raises where the batches are not stacked, or the epochs no count."""
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be a whole number of at least 1, got {epochs}")
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"batches must be arrays [t, ...] that share t, or an iterator; got the "
            f"leading axes {sorted(sizes)}"
        )
