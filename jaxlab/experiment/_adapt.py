"""Pre-trained on some tasks, adapted to another: the setting of the lowrank claims."""

from collections.abc import Callable, Mapping, Sequence
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray
import numpy as np
import optax

from .. import data, lowrank, nn, tree
from ..types import Adapter, Apply, Params, Stacked
from ._fit import cross_entropy, fit

CLASSES = 10  # of every new head; tasks with fewer leave the rest unused
_ADAM = optax.scale_by_adam()


class Adaptation(NamedTuple):
    """A task adapted to from k bases, one per seed, at the best learning rate."""

    accuracies: np.ndarray
    """`[k]`, on the task's test images."""
    rate: float
    """The learning rate, of those tried the best on held-out training images."""
    trained: int
    """How many numbers one state has, the head's left out."""
    adapted: Any
    """The adapted function, with what it keeps fixed on axis 0."""
    states: Any
    """The trained states, `[k, ...]` on axis 0 of every leaf."""
    bases: Stacked
    """The bases with the new head they were attached to, `[k, *leaf]`."""


def pretrained(
    tasks: Sequence[str],
    *,
    keys: PRNGKeyArray,
    train: int = 4000,
    steps: int = 600,
    rate: float = 2e-3,
    **sizes: Any,
) -> tuple[Apply, Stacked]:
    """Small transformers trained on several tasks at once, one per key.

    Args:
      tasks: names for `data.load`, of images of one size. Their classes are told apart
        by one head.
      keys: `[k]`, of initialisation and batches.
      train: the most training images of a task.
      steps: of AdamW, 128 images each.
      rate: the first learning rate of the cosine decay.
      **sizes: of `nn.small_vit`; the size of the image and the outputs are known.

    Returns:
      `(apply, bases)`, bases stacked `[k, *leaf]`.
    """
    sets = [data.load(task) for task in tasks]
    offset = np.cumsum([0, *(d.classes for d in sets)])
    x = np.concatenate([d.train.x[:train] for d in sets])
    y = np.concatenate(
        [d.train.y[:train] + o for d, o in zip(sets, offset[:-1], strict=True)]
    )
    sizes = {"size": x.shape[1], "outputs": int(offset[-1])} | sizes
    init, apply = nn.small_vit(**sizes)
    loss = _cross_entropy(apply)
    one = lambda key: fit(loss, init(key), (x, y), key=key, steps=steps, rate=rate)
    return apply, tree.stack([one(key) for key in keys])


@ft.cache
def _cross_entropy(apply: Apply) -> Callable[..., Array]:
    return lambda params, x, y: cross_entropy(apply(params, x), y)


def adaptation(
    apply: Apply,
    bases: Stacked,
    adapters: Mapping[str, Adapter],
    task: data.Dataset,
    *,
    keys: PRNGKeyArray,
    steps: int = 200,
    rates: Sequence[float] = (3e-3, 1e-2),
    head_rate: float | None = None,
    batch: int = 32,
    statistics: Any = None,
) -> Adaptation:
    """Adapts k bases to a task, at each learning rate, side by side in one program.

    The base's head is put away; a new one, of zeros, is trained beside the adapters. A
    fifth of the training images is held out, to choose the rate by.

    Args:
      apply: the function of `pretrained`.
      bases: `[k, *leaf]`, with a leaf `head`.
      adapters: by glob, as for `lowrank.attach`; empty for a linear probe.
      task: the data set, of at most ten classes.
      keys: `[k]`, of the adapters and of the batches.
      steps: of Adam with a cosine decay.
      rates: first learning rates, of which the best is chosen.
      head_rate: that of the new head; by default, that of the rest.
      batch: images per step.
      statistics: for `lowrank.attach`, with an axis k in front.

    Returns:
      Accuracies, sizes and the trained states.
    """
    k, width = len(keys), bases["head"]["kernel"].shape[-2]
    head = {"kernel": jnp.zeros((k, width, CLASSES)), "bias": jnp.zeros((k, CLASSES))}
    bases = {**bases, "head": head}
    every = {"head/*": lowrank.full(), **adapters}
    shapes = jax.ShapeDtypeStruct((1, *task.train.x.shape[1:]), jnp.float32)

    def start(base: Params, key: Array, statistic: Any) -> Any:
        known = {} if statistic is None else {"statistics": statistic}
        return lowrank.attach(apply, base, every, shapes, key=key, **known)

    adapted, states = jax.jit(jax.vmap(start))(bases, keys, statistics)
    many = lambda v: jnp.repeat(v[None], len(rates), 0)
    states = jax.tree.map(many, states)
    moments = jax.vmap(jax.vmap(_ADAM.init))(states)
    seen, held = _split(task.train)
    draw = np.random.default_rng(np.asarray(jax.random.key_data(keys)).ravel())
    for i in range(steps):
        rows = draw.integers(len(seen.x), size=(k, batch))
        head = rates if head_rate is None else [head_rate] * len(rates)
        both = np.array([rates, head])
        now = np.float32(0.5 * (1 + np.cos(np.pi * i / steps)) * both.T)
        examples = seen.x[rows], seen.y[rows]
        states, moments = _step(adapted, bases, states, moments, now, *examples)
    score = _accuracies(adapted, bases, states, held).mean(1)
    best = int(score.argmax())
    states = jax.tree.map(lambda v: v[best], states)
    right = _accuracies(
        adapted, bases, jax.tree.map(lambda v: v[None], states), task.test
    )
    sizes = {p: sum(v.size for v in s.values()) for p, s in _entries(states).items()}
    trained = sum(n for path, n in sizes.items() if not path.startswith("head/"))
    return Adaptation(right[0], rates[best], trained // k, adapted, states, bases)


@ft.partial(jax.jit, donate_argnums=(2, 3))
def _step(
    adapted: Any, bases: Any, states: Any, moments: Any, rates: Any, x: Any, y: Any
) -> Any:
    """One update of every state `[rates, k]`."""

    def one(
        adapted: Any, base: Any, state: Any, moment: Any, rate: Any, *xy: Any
    ) -> Any:
        loss = lambda s: cross_entropy(adapted(base, s, xy[0]), xy[1])
        updates, moment = _ADAM.update(jax.grad(loss)(state), moment)
        new = lambda path: "'head/" in jax.tree_util.keystr(path)
        move = lambda path, u: -rate[1 if new(path) else 0] * u
        updates = jax.tree_util.tree_map_with_path(move, updates)
        return optax.apply_updates(state, updates), moment

    seeds = jax.vmap(one, (0, 0, 0, 0, None, 0, 0))
    each = jax.vmap(seeds, (None, None, 0, 0, 0, None, None))
    return each(adapted, bases, states, moments, rates, x, y)


def _split(train: data.Split) -> tuple[data.Split, data.Split]:
    """Four fifths to train on, and the rest."""
    order = np.random.default_rng(0).permutation(len(train.x))
    cut = len(order) // 5
    part = lambda rows: data.Split(train.x[rows], train.y[rows])
    return part(order[cut:]), part(order[:cut])


def _entries(states: Any) -> dict[str, dict[str, Array]]:
    """The trained entries by leaf, and those shared by method."""
    return {**states.leaves, **{f"shared/{n}": s for n, s in states.shared.items()}}


def _accuracies(adapted: Any, bases: Any, states: Any, test: data.Split) -> np.ndarray:
    """`[rates, k]`, by a fixed number of images at a time."""
    parts, size = [], 256
    for at in range(0, len(test.x), size):
        x = np.resize(test.x[at : at + size], (size, *test.x.shape[1:]))
        parts.append(_predicted(adapted, bases, states, x))
    return (np.concatenate(parts, -1)[..., : len(test.y)] == test.y).mean(-1)


@jax.jit
def _predicted(adapted: Any, bases: Any, states: Any, x: Any) -> Any:
    one = lambda a, p, s: a(p, s, x).argmax(-1)
    return jax.vmap(jax.vmap(one), (None, None, 0))(adapted, bases, states)
