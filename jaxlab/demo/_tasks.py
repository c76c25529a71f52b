"""The demo's data: scikit-learn's digits, plain and under four shifts."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

TEST_FRACTION = 0.3
TILT = 30.0  # degrees
SHADE = 0.85  # of black, at the right edge


class Task(NamedTuple):
    """One task: images flattened to `[n 64]`, in [0, 1], and labels `[n]`."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def plain(images: np.ndarray) -> np.ndarray:
    """The digits as scanned."""
    return images


def tilted(images: np.ndarray) -> np.ndarray:
    """The digits turned by 30 degrees."""
    from scipy import ndimage

    return ndimage.rotate(images, TILT, axes=(1, 2), reshape=False, order=1)


def striped(images: np.ndarray) -> np.ndarray:
    """The digits behind horizontal stripes."""
    rows = np.arange(images.shape[1]) % 2
    return np.maximum(images, 0.7 * rows[:, None])


def shaded(images: np.ndarray) -> np.ndarray:
    """The digits on paper that darkens from left to right."""
    return np.clip(images + np.linspace(0, SHADE, images.shape[2]), 0, 1)


def bold(images: np.ndarray) -> np.ndarray:
    """The digits in a thicker pen: each pixel is the darkest of a 2 by 2 patch."""
    from scipy import ndimage

    return ndimage.grey_dilation(images, size=(1, 2, 2))


SHIFTS = {f.__name__: f for f in (tilted, striped, shaded, bold)}


def load(*, seed: int) -> dict[str, Task]:
    """Plain digits and every shift of them, with one split into train and test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.asarray(digits.images) / 16  # pyright: ignore
    labels = np.asarray(digits.target, np.int32)  # pyright: ignore
    order = np.random.default_rng(seed).permutation(len(images))
    held = int(TEST_FRACTION * len(images))
    test, train = order[:held], order[held:]

    def task(shift: Callable[[np.ndarray], np.ndarray]) -> Task:
        x = shift(images).reshape(len(images), -1).astype(np.float32)
        return Task(x[train], labels[train], x[test], labels[test])

    return {"plain": task(plain), **{n: task(f) for n, f in SHIFTS.items()}}
