"""An open checkpoint: tensors that have not been read, by name, in file order."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from ._errors import refuse, show

_ALIGNED = 64  # JAX takes a CPU buffer as it is where it starts on such a byte


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that has not been read.

    Attributes:
      name: as the file spells it, for example `model.layers.0.mlp.up_proj.weight`.
      shape: its shape.
      dtype: of numpy or ml_dtypes (bfloat16, the f8 types).
      file: the file it lies in, for error messages.
      read_into: `(buffer, first)` fills the one-dimensional uint8 `buffer` with the
        bytes of the tensor from byte `first` on. Threads may call it at once.

    Example:
      >>> fill = lambda buffer, first: buffer.fill(0)
      >>> Tensor("w", (2, 3), np.dtype("float32"), Path("a.safetensors"), fill)[1]
      array([0., 0., 0.], dtype=float32)
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    read_into: Callable[[np.ndarray, int], None] = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Reads the whole tensor.

        Returns:
          An array of its own memory, aligned for JAX to take without a copy.

        Raises:
          FormatError: the file no longer holds the tensor, or holds an invalid value.
        """
        return self._rows(0, self.size, self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the rows of axis 0 that `index` needs, and takes `index` of them."""
        keys = index if isinstance(index, tuple) else (index,)
        head, rest = (keys[0], keys[1:]) if keys else (Ellipsis, ())
        if not self.shape or not isinstance(head, int | np.integer | slice):
            return self.read()[index]
        rows = range(self.shape[0])
        if not isinstance(head, slice):
            try:
                row = rows[head]
            except IndexError:
                raise IndexError(f"{self!r} has no row {head}") from None
            return self._block(row, row + 1)[(0, *rest)]
        picked = rows[head]
        if not picked:
            return self._block(0, 0)[(slice(None), *rest)]
        low, high = min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1
        block = self._block(low, high)[:: picked.step]
        return block[(slice(None), *rest)]

    def __repr__(self) -> str:
        """Says name, dtype, shape and file."""
        dims = ", ".join(map(str, self.shape))
        return f"Tensor({show(self.name)}, {self.dtype}[{dims}], {str(self.file)!r})"

    def _block(self, low: int, high: int) -> np.ndarray:
        """Reads rows [low, high) of axis 0."""
        width = math.prod(self.shape[1:])
        return self._rows(low * width, high * width, (high - low, *self.shape[1:]))

    def _rows(self, low: int, high: int, shape: tuple[int, ...]) -> np.ndarray:
        """Reads entries [low, high) into an array of `shape`."""
        size = (high - low) * self.dtype.itemsize
        try:
            buffer = aligned(size)
        except MemoryError:
            raise refuse(
                self.file, f"no memory for {size} bytes", tensor=self.name
            ) from None
        if size:
            self.read_into(buffer, low * self.dtype.itemsize)
        return buffer.view(self.dtype).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint of any format; a context manager that closes its files.

    Attributes:
      path: the file or folder.
      format: "safetensors", "npz", "msgpack", "orbax" or "compeft".
      tensors: by name, in file order.
      metadata: the string pairs of the file.
      config: the parsed config.json of a Hugging Face model folder.
      carried: the config, tokenizer, generation and chat-template files of such a
        folder, which go with the model wherever it is saved.
      shut: closes the files; called once, by `close`.

    Example:
      >>> with Checkpoint(Path("a.npz"), "npz", {}, {}) as checkpoint:
      ...     print(checkpoint)
      Checkpoint('a.npz', npz, 0 tensors, 0.0 MB)
    """

    path: Path
    format: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    carried: tuple[Path, ...] = ()
    shut: Callable[[], None] = lambda: None
    _exit: ExitStack = dataclasses.field(default_factory=ExitStack, init=False)

    def __post_init__(self) -> None:
        self._exit.callback(self.shut)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def close(self) -> None:
        """Closes the files. Tensors cannot be read after; a second call does nothing.

        Example:
          >>> Checkpoint(Path("a.npz"), "npz", {}, {}).close()
        """
        self._exit.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        """Says path, format and size."""
        size = f"{len(self.tensors)} tensors, {self.nbytes / 1e6:.1f} MB"
        return f"Checkpoint({str(self.path)!r}, {self.format}, {size})"


def aligned(size: int) -> np.ndarray:
    """An uninitialised uint8 buffer that starts on a 64-byte boundary."""
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size]
