"""One operation per file: Pallas kernels, a pure-JAX reference, one dispatch rule."""

from ._kth_magnitude import kth_magnitude as kth_magnitude
from ._trim_elect_merge import trim_elect_merge as trim_elect_merge
