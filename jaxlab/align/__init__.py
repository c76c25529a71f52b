"""Brings models onto one another: permutations of hidden units, and what they allow.

`rewrite.symmetries` says which units may be permuted together. A matching finds
permutations that bring one model's units in front of another's, and `rewrite.permute`
applies them. `pleas` merges matched units, and `merge_features` those of one model.
"""

from ._activation_matching import activation_matching as activation_matching
from ._feature_merging import Features as Features, merge_features as merge_features
from ._pleas import Pleas as Pleas, pleas as pleas
from ._report import (
    Alignment as Alignment,
    report as report,
    singular_vectors as singular_vectors,
)
from ._straight_through import straight_through_matching as straight_through_matching
from ._tables import compose as compose, inverse as inverse
from ._weight_matching import (
    match_many as match_many,
    weight_matching as weight_matching,
)
