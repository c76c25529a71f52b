"""Training of the demo's models: one scan per run, one vmap over the experts."""

import functools as ft

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray
import optax

from ..types import Apply, Params, Stacked

BATCH = 64


@ft.partial(jax.jit, static_argnames=("apply", "rate", "steps"))
def train(
    params: Params,
    x: Float[Array, "n d"],
    y: Int[Array, " n"],
    *,
    apply: Apply,
    rate: float,
    steps: int,
    key: PRNGKeyArray,
) -> Params:
    """AdamW with a cosine decay on batches drawn with replacement."""
    optimiser = optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=0.01)

    def loss(params: Params, rows: Int[Array, " b"]) -> Float[Array, ""]:
        logits = apply(params, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, x.shape[0])
        slope = jax.grad(loss)(params, rows)
        with jax.numpy_dtype_promotion("standard"):  # optax: float ** integer
            updates, state = optimiser.update(slope, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, optimiser.init(params))
    return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]


@ft.partial(jax.jit, static_argnames=("apply", "rate", "steps"))
def finetune(
    base: Params,
    x: Float[Array, "k n d"],
    y: Int[Array, " n"],
    *,
    apply: Apply,
    rate: float,
    steps: int,
    key: PRNGKeyArray,
) -> Stacked:
    """One expert per row of `x`, all from `base`, trained side by side."""
    one = lambda x, key: train(base, x, y, apply=apply, rate=rate, steps=steps, key=key)
    return jax.vmap(one)(x, jax.random.split(key, x.shape[0]))
