"""Examples of several tasks together, and the factor of a task vector they choose."""

from collections.abc import Sequence
import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np

from .. import merge
from ..types import Params
from ._experts import Experts
from ._fit import cross_entropy

Batch = tuple[Array, Array, Array]
"""Images, labels and the number of each one's task."""


def examples(setting: Experts, count: int) -> Batch:
    """Training images of every task, the same ones at every call.

    Args:
      setting: what `experts` returned.
      count: how many of each task; the last ones of its training split.

    Returns:
      Images, labels and tasks, `[k * count, ...]`.
    """
    parts = [(d.train.x[-count:], d.train.y[-count:]) for d in setting.data]
    whose = [np.full(len(y), i, np.int32) for i, (_, y) in enumerate(parts)]
    x, y = (np.concatenate(a) for a in zip(*parts, strict=True))
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(np.concatenate(whose))


def batches(
    setting: Experts, steps: int, *, key: PRNGKeyArray, size: int = 16
) -> Batch:
    """Stacked batches of training images, drawn with replacement.

    Args:
      setting: what `experts` returned.
      steps: how many batches.
      key: of the draw.
      size: examples of each task in a batch.

    Returns:
      Images, labels and tasks, `[steps, k * size, ...]`.
    """
    draw = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    rows = [draw.integers(0, len(d.train.y), (steps, size)) for d in setting.data]
    pairs = list(zip(setting.data, rows, strict=True))
    x = np.concatenate([d.train.x[r] for d, r in pairs], 1)
    y = np.concatenate([d.train.y[r] for d, r in pairs], 1)
    whose = np.repeat(np.arange(len(pairs), dtype=np.int32), size)
    return jnp.asarray(x), jnp.asarray(y), jnp.asarray(np.tile(whose, (steps, 1)))


def loss(setting: Experts, params: Params, batch: Batch) -> Float[Array, ""]:
    """The cross-entropy of an encoder on examples of several tasks.

    Args:
      setting: what `experts` returned.
      params: the encoder.
      batch: images, labels and tasks.

    Returns:
      A scalar.
    """
    x, y, task = batch
    return cross_entropy(setting.apply(params, x, task), y)


def right(setting: Experts, params: Params, batch: Batch) -> Float[Array, ""]:
    """The accuracy of an encoder on examples of several tasks.

    Args:
      setting: what `experts` returned.
      params: the encoder.
      batch: images, labels and tasks.

    Returns:
      A scalar in [0, 1].
    """
    x, y, task = batch
    return jnp.mean(jnp.argmax(setting.apply(params, x, task), -1) == y)


def scaled(
    setting: Experts, delta: Params, scales: Sequence[float], *, count: int = 100
) -> tuple[Params, float]:
    """Adds a task vector to the base, times the factor that is best on a few labels.

    Args:
      setting: what `experts` returned.
      delta: `[*leaf]` task vector.
      scales: the factors to choose from.
      count: training images of every task that choose.

    Returns:
      The model and its factor; of factors that tie, the first.
    """
    scores = merge.score(
        jax.tree.map(lambda v: v[None], delta),
        examples(setting, count),
        method=merge.task_arithmetic,
        loss=ft.partial(right, setting),
        coefficients={"scale": jnp.asarray(scales, jnp.float32)},
        base=setting.base,
        at_once=1,
    )
    best = float(scales[int(jnp.argmax(scores))])
    return merge.add(setting.base, delta, scale=best), best
