"""MultiColorMNIST: digits beside patches whose colours give the class away, or not."""

import functools as ft

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
import numpy as np

CLASSES = 10
PATCH = 4  # pixels: 32 of them frame an image of 28 x 28


def multicolor(
    images: Float[Array, "b h w"],
    labels: Int[Array, " b"],
    *,
    key: PRNGKeyArray,
    correlation: float,
    patches: int = 32,
) -> Float[Array, "b hh ww 3"]:
    """Digits framed by colour patches, each a spurious feature of its own.

    Patch j has its own random assignment of ten colours to the classes. In each image
    it shows the colour of the image's class with probability `correlation`, and else
    one of the ten at random, independently of the other patches.

    Args:
      images: `[b, h, w]` gray images in [0, 1].
      labels: `[b]` their classes, 0 to 9.
      key: consumed. The assignment of colours comes from `assignment`, not from the
        key: a training and a shifted test set of two keys belong together.
      correlation: in [0, 1]; 1 makes every patch predict the class alone, 0 none.
      patches: how many; 32 in the paper.

    Returns:
      `[b, h + 8 r, w + 8 r, 3]`: the image in the middle of r rings of patches of 4 x 4
      pixels, as many rings as hold the patches; places without a patch are black. Of
      32 around 28 x 28 pixels, one ring: `[b, 36, 36, 3]`, in float32.

    Raises:
      ValueError: a correlation out of range, no patch, or images that 4 does not
        divide.

    References:
      Lin et al., 2023, "Spurious Feature Diversification Improves Out-of-distribution
      Generalization", https://arxiv.org/abs/2309.17230: MultiColorMNIST. The sizes,
      the places and the colours are ours.
    """
    h, w = images.shape[1:]
    if not 0 <= correlation <= 1 or patches < 1:
        raise ValueError(
            f"correlation must be in [0, 1] and patches at least 1, got {correlation} "
            f"and {patches}"
        )
    if h % PATCH or w % PATCH:
        raise ValueError(f"images of {h} x {w} do not divide into {PATCH} x {PATCH}")
    return _painted(images, labels, key, float(correlation), patches)


@ft.partial(jax.jit, static_argnames="patches")
def _painted(
    images: Array, labels: Array, key: PRNGKeyArray, correlation: float, patches: int
) -> Array:
    """The program of `multicolor`."""
    (b, h, w), shape = images.shape, (len(labels), patches)
    rings, places = _places(h // PATCH, w // PATCH, patches)
    follow, other = jax.random.split(key)
    follows = jax.random.bernoulli(follow, correlation, shape)
    random = jax.random.randint(other, shape, 0, CLASSES)
    told = jnp.asarray(assignment(patches), random.dtype)[:, labels].T
    colours = jnp.asarray(palette())[jnp.where(follows, told, random)]
    grid = jnp.zeros((b, h // PATCH + 2 * rings, w // PATCH + 2 * rings, 3))
    grid = grid.at[:, places[:, 0], places[:, 1]].set(colours)
    canvas = jnp.repeat(jnp.repeat(grid, PATCH, axis=1), PATCH, axis=2)
    gray = jnp.broadcast_to(images[..., None], (b, h, w, 3)).astype(canvas.dtype)
    edge = rings * PATCH
    return canvas.at[:, edge : edge + h, edge : edge + w].set(gray)


def assignment(patches: int) -> Int[np.ndarray, "j 10"]:
    """The colour that each patch gives to each class: ten permuted, patch by patch.

    Args:
      patches: how many.

    Returns:
      `[patches, 10]`; the first rows do not depend on how many follow.
    """
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(CLASSES) for _ in range(patches)])


def palette() -> Float[np.ndarray, "10 3"]:
    """Ten colours, no two alike.

    Returns:
      `[10, 3]` red, green, blue in [0, 1].
    """
    hex_ = "ff0000 00ff00 0000ff ffff00 ff00ff 00ffff ff8000 8000ff 808080 ffffff"
    return np.array([[*bytes.fromhex(c)] for c in hex_.split()], np.float32) / 255


def _places(
    rows: int, columns: int, patches: int
) -> tuple[int, Int[np.ndarray, "j 2"]]:
    """How many rings are needed, and the grid places of the patches, inside out."""
    rings, places = 0, []
    while len(places) < patches:
        rings += 1
        low, bottom, right = -rings, rows + rings - 1, columns + rings - 1
        square = np.ndindex(rows + 2 * rings, columns + 2 * rings)
        at = [(i - rings, j - rings) for i, j in square]
        places += [(i, j) for i, j in at if low in (i, j) or i == bottom or j == right]
    return rings, np.array(places[:patches]) + rings
