"""Program transforms of pure functions, from their jaxprs."""

from ._evaluate import ROOM as ROOM, results as results, statistics as statistics
from ._passes import (
    Leaf as Leaf,
    Passes as Passes,
    flat as flat,
    leafwise as leafwise,
    lengthened as lengthened,
    passes as passes,
    refolded as refolded,
)
from ._rules import Refused as Refused
