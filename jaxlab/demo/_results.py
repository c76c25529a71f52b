"""What a run of the demo found."""

from typing import NamedTuple

import numpy as np

from ._measure import Conflict


class Results(NamedTuple):
    """Everything the table, the figures and the page show.

    Attributes:
      tasks: the names of the tasks, "plain" first.
      experts: the names of the shifted tasks, one expert each.
      accuracy: per model the accuracy on every task `[tasks]`: "base", the experts by
        the name of their task, then the merges, best mean first.
      recipes: the YAML of every merge.
      steps: how far from the base to the merge `[l]`; 1 is the merge.
      paths: per merge the accuracies at those steps `[l, tasks]`.
      conflicts: sign conflicts of the experts, by weight.
      samples: a digit per class under every task `[tasks, 10, 8, 8]`.
      tested: the number of test images per task.
      seed: of everything random.
      seconds: wall time by phase.
    """

    tasks: list[str]
    experts: list[str]
    accuracy: dict[str, np.ndarray]
    recipes: dict[str, str]
    steps: np.ndarray
    paths: dict[str, np.ndarray]
    conflicts: list[Conflict]
    samples: np.ndarray
    tested: int
    seed: int
    seconds: dict[str, float]

    @property
    def merges(self) -> list[str]:
        """The merges, best mean first."""
        return [m for m in self.accuracy if m in self.recipes]

    def mean(self, model: str) -> float:
        """The mean accuracy of a model over all tasks."""
        return float(np.mean(self.accuracy[model]))

    def best_expert(self) -> str:
        """The expert with the best mean."""
        return max(self.experts, key=self.mean)

    def at_home(self) -> tuple[float, float]:
        """The experts' mean accuracy on their own shift, and on the others'."""
        columns = [self.tasks.index(name) for name in self.experts]
        table = np.array([self.accuracy[name][columns] for name in self.experts])
        own = np.eye(len(table), dtype=bool)
        return float(table[own].mean()), float(table[~own].mean())
