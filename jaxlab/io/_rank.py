"""The effective rank of a matrix that is read in blocks of rows."""

from collections.abc import Callable

import numpy as np

BLOCK = 2**22  # entries: 32 MB of float64

# A singular value from a Gram matrix carries an error near the square root of the
# float64 epsilon times the largest; below that it is rounding, not rank.
FLOOR = 1e-7


def effective_rank(
    read: Callable[[int, int], np.ndarray], rows: int, columns: int
) -> float:
    r"""How many directions a matrix spreads over, counted by their size.

    $\mathrm{erank}(D) = \exp(-\sum_i p_i \log p_i)$ with
    $p_i = \sigma_i / \sum_j \sigma_j$: r for r equal singular values, and otherwise
    between 1 and the rank. The singular values are the square roots of the eigenvalues
    of the Gram matrix of the smaller side, in float64.

    Args:
      read: rows [low, high) of the matrix, as float64.
      rows: m.
      columns: n.

    Returns:
      A number in [1, min(m, n)].

    Degenerate inputs:
      0 for a zero or empty matrix. Singular values below 1e-7 of the largest count
      as 0.

    References:
      Roy & Vetterli, 2007, The effective rank: a measure of effective dimensionality,
      EUSIPCO, definition 1.

    Example:
      >>> effective_rank(lambda low, high: np.eye(3)[low:high], 3, 3)
      3.0
    """
    if not rows or not columns:
        return 0.0
    gram = _tall if columns <= rows else _wide
    values = np.linalg.eigvalsh(gram(read, rows, columns))
    sigma = np.sqrt(np.maximum(values, 0.0))
    sigma = sigma[sigma > FLOOR * sigma[-1]]
    if not sigma.size:
        return 0.0
    p = sigma / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))).round(12))


def _tall(
    read: Callable[[int, int], np.ndarray], rows: int, columns: int
) -> np.ndarray:
    r"""$D^\top D$, adding up blocks of rows."""
    gram = np.zeros((columns, columns))
    for block in _spans(rows, columns):
        x = read(*block)
        gram += x.T @ x
    return gram


def _wide(
    read: Callable[[int, int], np.ndarray], rows: int, columns: int
) -> np.ndarray:
    r"""$D D^\top$, by pairs of blocks of rows."""
    gram = np.zeros((rows, rows))
    for low, high in (spans := _spans(rows, columns)):
        x = read(low, high)
        gram[low:high, low:high] = x @ x.T
        for left, right in spans:
            if left >= high:
                y = read(left, right)
                gram[low:high, left:right] = x @ y.T
                gram[left:right, low:high] = gram[low:high, left:right].T
    return gram


def _spans(rows: int, columns: int) -> list[tuple[int, int]]:
    """Blocks of rows of at most BLOCK entries, and of at least one row."""
    step = max(1, BLOCK // columns)
    return [(low, min(low + step, rows)) for low in range(0, rows, step)]
