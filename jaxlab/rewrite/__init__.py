"""Program transforms of pure functions, from their jaxprs."""

from ._capture import capture as capture
from ._continuous import continuous as continuous
from ._evaluate import ROOM as ROOM, results as results, statistics as statistics
from ._groups import (
    Continuous as Continuous,
    Factor as Factor,
    Group as Group,
    Member as Member,
    Pick as Pick,
    Place as Place,
    Segment as Segment,
    Symmetries as Symmetries,
    describe as describe,
)
from ._matrix import (
    Use as Use,
    as_matrix as as_matrix,
    from_matrix as from_matrix,
)
from ._memory import live_bytes as live_bytes
from ._passes import (
    Leaf as Leaf,
    Passes as Passes,
    flat as flat,
    leafwise as leafwise,
    lengthened as lengthened,
    passes as passes,
    refolded as refolded,
)
from ._permute import (
    fold as fold,
    identity as identity,
    permute as permute,
    random_permutations as random_permutations,
    select as select,
    unfold as unfold,
)
from ._resize import resized as resized
from ._rules import Refused as Refused
from ._substitute import Operation as Operation, substitute as substitute
from ._symmetries import symmetries as symmetries
from ._transform import transform as transform
from ._uses import uses as uses
from ._verify import verify as verify
