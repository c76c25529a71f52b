"""What every experiment shares: training, accuracy, intervals, and the record kept."""

from ._experts import (
    Experts as Experts,
    accuracies as accuracies,
    experts as experts,
)
from ._fit import accuracy as accuracy, cross_entropy as cross_entropy, fit as fit
from ._record import interval as interval, main as main
