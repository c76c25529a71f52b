"""Test images to choose on and to report on; experts on their own tasks."""

from jaxtyping import Float
import numpy as np

from .. import data, tree
from ..types import Stacked
from ._experts import Experts
from ._fit import accuracy


def held_out(setting: Experts) -> tuple[Experts, Experts]:
    """Divides the test images of every task: every second one is there to choose on.

    Args:
      setting: what `experts` returned.

    Returns:
      `(choose, report)`: the setting twice, with disjoint halves of its test images.
    """
    halves = (
        tuple(
            d._replace(test=data.Split(d.test.x[i::2], d.test.y[i::2]))
            for d in setting.data
        )
        for i in (0, 1)
    )
    choose, report = (setting._replace(data=half) for half in halves)
    return choose, report


def own(setting: Experts, models: Stacked) -> Float[np.ndarray, " k"]:
    """The accuracy of every model on its own task alone.

    Args:
      setting: what `experts` returned.
      models: `[k, *leaf]` encoders, the i-th of the i-th task.

    Returns:
      `[k]` numbers in [0, 1]: of `accuracies`, the diagonal.
    """
    found = []
    for i, (d, model) in enumerate(
        zip(setting.data, tree.unstack(models), strict=True)
    ):
        found.append(accuracy(setting.apply, model, *d.test, np.int32(i)))
    return np.array(found)
