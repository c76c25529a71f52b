"""Several tasks, one base, an expert per task: the setting of most merging claims."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
import numpy as np

from .. import data, nn, tree
from ..types import Params, Stacked
from ._fit import accuracy, cross_entropy, fit

CLASSES = 10  # of every head; tasks with fewer leave the rest unused
SEEN = 50  # the base sees every n-th training example of a task


class Experts(NamedTuple):
    """An encoder tuned on each task; the heads are trained with the base, then frozen.

    `apply(params, x, task)` gives the logits `[b 10]` of an encoder's params under the
    head of a task, a number or one per example.
    """

    tasks: tuple[str, ...]
    data: tuple[data.Dataset, ...]
    base: Params
    models: Stacked  # the experts, [k, *leaf]
    heads: Params  # kernel [k, width, 10] and bias [k, 10]
    apply: Callable[..., Float[Array, "b m"]]


def experts(
    tasks: Sequence[str],
    *,
    key: PRNGKeyArray,
    width: int = 512,
    train: int = 4000,
    test: int = 1000,
    steps: int = 400,
    rate: float = 3e-4,
) -> Experts:
    """Trains a weak generalist on all tasks, then an expert of it on each.

    The base and one head per task are trained jointly on a fiftieth of the data, as a
    foundation model has seen a little of everything; the heads are then frozen, and the
    encoder alone is fine-tuned on each task.

    Args:
      tasks: names for `data.load`, of images of one size.
      key: of initialisation and batches, and of the splits.
      width: of the encoder's hidden layers, of which there are two.
      train: the most training images of a task.
      test: the most test images of a task.
      steps: of fine-tuning each expert; the base takes as many on all tasks together.
      rate: the learning rate of fine-tuning.

    Returns:
      The data, the base, the experts `[k, *leaf]` and the heads.

    Raises:
      ValueError: a task has more than 10 classes, or images of another size.
    """
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    sets = tuple(data.load(t, seed=seed, train=train, test=test) for t in tasks)
    pixels = {int(np.prod(s.train.x.shape[1:])) for s in sets}
    if len(pixels) != 1 or max(s.classes for s in sets) > CLASSES:
        raise ValueError(f"tasks differ in size, or have over {CLASSES} classes")
    keys = jax.random.split(key, 4)
    init, _ = nn.mlp((pixels.pop(), width, width))
    kernel = jax.random.normal(keys[1], (len(tasks), width, CLASSES)) / np.sqrt(width)
    heads = {"kernel": kernel, "bias": jnp.zeros((len(tasks), CLASSES))}
    few = [_rows(s, i, every=SEEN) for i, s in enumerate(sets)]
    joint = tuple(map(np.concatenate, zip(*few, strict=True)))
    start = (init(keys[0]), heads)
    base, heads = fit(_joint_loss, start, joint, key=keys[2], steps=steps)
    apply = _headed(heads)

    def loss(params: Params, x: Array, y: Array, task: Array) -> Array:
        return cross_entropy(apply(params, x, task), y)

    tune = lambda i, s: fit(
        loss,
        base,
        _rows(s, i),
        key=jax.random.fold_in(keys[3], i),
        steps=steps,
        rate=rate,
    )
    tuned = tree.stack([tune(i, s) for i, s in enumerate(sets)])
    return Experts(tuple(tasks), sets, base, tuned, heads, apply)


def accuracies(setting: Experts, params: Params) -> Float[np.ndarray, " k"]:
    """A model's accuracy on the test images of every task, with the task's own head.

    Args:
      setting: what `experts` returned.
      params: an encoder.

    Returns:
      `[k]` numbers in [0, 1].
    """
    return np.array(
        [
            accuracy(setting.apply, params, s.test.x, s.test.y, np.int32(i))
            for i, s in enumerate(setting.data)
        ]
    )


def _headed(heads: Params) -> Callable[..., Array]:
    """The encoder followed by the head of each example's task."""

    def apply(params: Params, x: Array, task: Int[Array, "..."]) -> Array:
        hidden = jax.nn.relu(nn.mlp_apply(params, standardised(x)))
        kernel, bias = heads["kernel"][task], heads["bias"][task]
        if kernel.ndim == 2:
            return hidden @ kernel + bias[None]
        return jnp.einsum("bn,bnm->bm", hidden, kernel) + bias

    return apply


def standardised(x: Float[Array, "b *image"]) -> Float[Array, "b n"]:
    """Each image flattened, with mean 0 and variance 1."""
    return jax.nn.standardize(x.reshape(x.shape[0], -1), axis=-1)


def _joint_loss(both: tuple, x: Array, y: Array, task: Array) -> Float[Array, ""]:
    """Cross-entropy of encoder and heads together."""
    params, heads = both
    return cross_entropy(_headed(heads)(params, x, task), y)


def _rows(one: data.Dataset, task: int, every: int = 1) -> tuple:
    """Images, labels and task number of every n-th training example."""
    x, y = one.train.x[::every], one.train.y[::every]
    return x, y, np.full(len(y), task, np.int32)
