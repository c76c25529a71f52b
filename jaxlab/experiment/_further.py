"""A base that has seen more, and its experts: another version of a setting."""

import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray
import numpy as np

from .. import tree
from ..types import Params
from ._examples import examples, loss
from ._experts import Experts
from ._fit import fit


def further(
    setting: Experts,
    count: int,
    *,
    key: PRNGKeyArray,
    steps: int = 400,
    rate: float = 3e-4,
) -> Experts:
    """Trains the base of a setting on all tasks further, then an expert of it on each.

    The heads stay as they are.

    Args:
      setting: what `experts` returned.
      count: the training images of each task that the base sees now.
      key: of the batches.
      steps: of training the base, and of tuning each expert.
      rate: the learning rate of tuning the experts.

    Returns:
      The setting with the new base and its experts.
    """

    def on(p: Params, x: Array, y: Int[Array, " b"], task: Array) -> Float[Array, ""]:
        return loss(setting, p, (x, y, task))

    more = tuple(np.asarray(a) for a in examples(setting, count))
    base = fit(on, setting.base, more, key=key, steps=steps)
    tuned = []
    for i, d in enumerate(setting.data):
        rows = *d.train, np.full(len(d.train.y), i, np.int32)
        now = jax.random.fold_in(key, i)
        tuned.append(fit(on, base, rows, key=now, steps=steps, rate=rate))
    return setting._replace(base=base, models=tree.stack(tuned))
