"""Images changed in named ways, for shifted tasks and for robustness."""

from collections.abc import Callable
import re
import zlib

from jaxtyping import Float
import numpy as np

Images = Float[np.ndarray, "n h w *c"]
Draw = np.random.Generator

_AMOUNT = {
    # severities 1..5, as Hendrycks & Dietterich (2019) have them, for small grey images
    "noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "blur": (0.5, 0.75, 1.0, 1.5, 2.0),
    "contrast": (0.6, 0.45, 0.3, 0.2, 0.1),
    "fog": (0.2, 0.3, 0.4, 0.5, 0.6),
    "pixelate": (0.8, 0.6, 0.45, 0.35, 0.25),
    "shot": (60, 25, 12, 5, 3),
    "impulse": (0.03, 0.06, 0.1, 0.17, 0.27),
}


def _noise(x: Images, amount: float, draw: Draw) -> Images:
    return x + amount * draw.standard_normal(x.shape, np.float32)


def _blur(x: Images, amount: float, _: Draw) -> Images:
    from scipy import ndimage

    return ndimage.gaussian_filter(x, amount, axes=(1, 2))


def _contrast(x: Images, amount: float, _: Draw) -> Images:
    mean = x.mean((1, 2), keepdims=True)
    return mean + amount * (x - mean)


def _fog(x: Images, amount: float, draw: Draw) -> Images:
    from scipy import ndimage

    cloud = draw.standard_normal(x.shape, np.float32)
    cloud = ndimage.gaussian_filter(cloud, 4, axes=(1, 2), mode="wrap")
    cloud = cloud - cloud.min((1, 2), keepdims=True)
    cloud = cloud / np.maximum(cloud.max((1, 2), keepdims=True), 1e-6)
    return (1 - amount) * x + amount * cloud


def _pixelate(x: Images, amount: float, _: Draw) -> Images:
    size = x.shape[1:3]
    rows, columns = (
        (np.floor((np.arange(n) + 0.5) * amount) / amount).astype(int).clip(0, n - 1)
        for n in size
    )
    return x[:, rows][:, :, columns]


def _shot(x: Images, amount: float, draw: Draw) -> Images:
    return draw.poisson(np.clip(x, 0, 1) * amount).astype(np.float32) / amount


def _impulse(x: Images, amount: float, draw: Draw) -> Images:
    roll = draw.random(x.shape, np.float32)
    return np.where(roll < amount / 2, 0, np.where(roll > 1 - amount / 2, 1, x))


def _rotate(x: Images, degrees: float, _: Draw) -> Images:
    from scipy import ndimage

    return ndimage.rotate(x, degrees, axes=(1, 2), reshape=False, order=1)


def _permute(x: Images, number: float, _: Draw) -> Images:
    pixels = x.shape[1] * x.shape[2]
    order = np.random.default_rng(int(number)).permutation(pixels)
    flat = x.reshape(len(x), pixels, *x.shape[3:])
    return flat[:, order].reshape(x.shape)


def _invert(x: Images, _: float, __: Draw) -> Images:
    return 1 - x


def _flip(x: Images, _: float, __: Draw) -> Images:
    return x[:, :, ::-1]


def _stripes(x: Images, _: float, __: Draw) -> Images:
    rows = (np.arange(x.shape[1]) % 2).reshape(1, -1, 1, *[1] * (x.ndim - 3))
    return np.maximum(x, 0.7 * rows)


_CHANGES: dict[str, Callable[[Images, float, Draw], Images]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "fog": _fog,
    "pixelate": _pixelate,
    "shot": _shot,
    "impulse": _impulse,
    "rotate": _rotate,
    "permute": _permute,
    "invert": _invert,
    "flip": _flip,
    "stripes": _stripes,
}
CORRUPTIONS = tuple(_AMOUNT)
"""The changes that take a severity from 1 to 5."""


def corrupt(x: Images, change: str, *, seed: int = 0) -> Images:
    """Changes every image in a named way.

    Args:
      x: `[n h w]` or `[n h w c]` images in [0, 1].
      change: a name and a number: `noise`, `blur`, `contrast`, `fog`, `pixelate`,
        `shot` and `impulse` take a severity from 1 to 5 ("noise3"); `rotate` takes
        degrees ("rotate30"), `permute` the seed of its order of pixels ("permute1");
        `invert`, `flip` and `stripes` take none.
      seed: of random changes; one seed and change always draw the same.

    Returns:
      float32 images of the same shape, in [0, 1].

    Raises:
      ValueError: no such change, or a severity outside 1..5.

    References:
      Hendrycks & Dietterich, 2019, "Benchmarking Neural Network Robustness to Common
      Corruptions", https://arxiv.org/abs/1903.12261, whose kinds these are; the
      severities are chosen anew, for 28 by 28 pixels.

    Example:
      >>> import numpy as np
      >>> float(corrupt(np.zeros((1, 8, 8), np.float32), "invert").mean())
      1.0
    """
    match = re.fullmatch(r"([a-z]+)(-?\d+)?", change)
    name, number = match.groups() if match else (change, None)
    if name not in _CHANGES:
        raise ValueError(f"no change {change!r}; there are {', '.join(_CHANGES)}")
    amount = float(number or 0)
    if name in _AMOUNT:
        if not 1 <= amount <= 5:
            raise ValueError(f"{change!r} needs a severity from 1 to 5, as in {name}3")
        amount = _AMOUNT[name][int(amount) - 1]
    draw = np.random.default_rng([seed, zlib.crc32(change.encode())])
    return np.clip(_CHANGES[name](x, amount, draw), 0, 1).astype(np.float32)
