"""The few tree operations that jax.tree lacks.

A path reads `block_0/attn/kernel`: the keys of a leaf, joined by slashes.
"""

from ._algebra import (
    add as add,
    cosine as cosine,
    dot as dot,
    norm as norm,
    scale as scale,
    subtract as subtract,
    widen as widen,
)
from ._keys import keys_like as keys_like, path_number as path_number
from ._order import count as count, kth_largest as kth_largest
from ._paths import (
    check_like as check_like,
    combine as combine,
    glob as glob,
    partition as partition,
    path_map as path_map,
    paths as paths,
    stack as stack,
    unstack as unstack,
)
