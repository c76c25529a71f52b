"""Checkpoints: safetensors, Hugging Face folders, Orbax, npz, msgpack and ComPEFT.

Names are dotted in files and slashed in trees: `layers.0.weight` is `layers/0/weight`.
"""

from ._align import align as align
from ._checkpoint import Checkpoint as Checkpoint, Tensor as Tensor
from ._compression import compression as compression
from ._errors import FormatError as FormatError
from ._load import load as load
from ._merge import merge as merge
from ._open import open as open  # noqa: A004  (it does what open does)
from ._run import Report as Report, stream as stream
from ._save import save as save
