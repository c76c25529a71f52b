"""Program transforms of pure functions, from their jaxprs."""

from ._passes import (
    Leaf as Leaf,
    Passes as Passes,
    flat as flat,
    leafwise as leafwise,
    passes as passes,
    results as results,
    statistics as statistics,
)
