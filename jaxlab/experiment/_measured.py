"""A sample as two metrics: its mean and how far to trust it."""

from collections.abc import Iterable

from ._record import Metrics, interval


def measured(name: str, values: Iterable[float]) -> Metrics:
    """The mean of a sample under a name, and its 95 % half-width under `name +-`.

    Args:
      name: of the metric.
      values: one number per seed.

    Returns:
      One metric or two.

    Degenerate inputs:
      A single value has no half-width: only the mean.

    Example:
      >>> measured("gain", [1.0, 1.0]), measured("gain", [2.0])
      ({'gain': 1.0, 'gain +-': 0.0}, {'gain': 2.0})
    """
    sample = list(values)
    mean, half = interval(sample)
    return {name: mean} | ({f"{name} +-": half} if len(sample) > 1 else {})
