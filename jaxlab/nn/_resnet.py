"""Small residual networks for 32 x 32 images: those of two released checkpoints."""

from collections.abc import Sequence
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .. import tree
from ..types import Params
from ._layers import Shapes, Weights, like, linear, named
from ._small import Network


def resnet(
    *,
    widths: Sequence[int] = (16, 32, 64),
    blocks: int = 3,
    classes: int = 10,
    channels: int = 3,
) -> Network:
    """A CIFAR ResNet to be trained; its apply is `resnet20`.

    Args:
      widths: channels of each stage.
      blocks: of two convolutions, in each stage; 3 and three stages are ResNet-20.
      classes: m, outputs.
      channels: of the images.

    Returns:
      A network with the names and layouts of `resnet20`, flat. Kernels are drawn with
      variance 2 / fan-in (He et al., 2015), each from a key of its own name.

    Raises:
      ValueError: no widths, or widths that shrink: the shortcut has no weights.

    Example:
      >>> params = resnet(widths=(4, 8), blocks=1).init(jax.random.key(0))
      >>> params["layer2.0.conv1.weight"].shape
      (8, 4, 3, 3)
    """
    if list(widths) != sorted(widths) or not widths:
        raise ValueError(f"widths must not shrink, got {tuple(widths)}")
    shapes = _normed("conv1", "bn1", channels, widths[0])
    for stage, (before, m) in enumerate(itertools.pairwise((widths[0], *widths)), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            shapes |= _normed(f"{at}.conv1", f"{at}.bn1", m if block else before, m)
            shapes |= _normed(f"{at}.conv2", f"{at}.bn2", m, m)
    shapes |= {"linear.weight": (classes, widths[-1]), "linear.bias": (classes,)}

    def init(key: PRNGKeyArray) -> Params:
        keys = tree.keys_like(key, dict.fromkeys(shapes, 0))
        return {name: _start(name, shape, keys[name]) for name, shape in shapes.items()}

    return Network(init, resnet20)


def _normed(conv: str, norm: str, n: int, m: int) -> Shapes:
    """The tensors of a convolution and the batch norm behind it."""
    parts = ("weight", "bias", "running_mean", "running_var")
    vectors: Shapes = {f"{norm}.{part}": (m,) for part in parts}
    return {f"{conv}.weight": (m, n, 3, 3), **vectors}


def _start(name: str, shape: tuple[int, ...], key: PRNGKeyArray) -> Array:
    """Gaussian kernels, unit gains and variances, zeros elsewhere."""
    if len(shape) > 1:
        return jax.random.normal(key, shape) * math.sqrt(2 / math.prod(shape[1:]))
    return jnp.full(shape, float(name.endswith((".weight", ".running_var"))))


def resnet20(
    params: Params, images: Float[Array, "b h w c"], *, train: bool = False
) -> Float[Array, "b m"]:
    r"""The CIFAR ResNet with shortcuts that have no weights, in torch's layout.

    Depth and widths are read from the params: ResNet-20 to -1202, any width, any number
    of stages.

    Args:
      params: `conv1`, `bn1`, `layer<stage>.<block>.{conv1,bn1,conv2,bn2}`, `linear`,
        nested or flat; kernels OIHW, statistics of the norms included.
      images: `[b, h, w, c]`, normalised as the model wants them.
      train: normalise by the statistics of the batch instead of the stored ones.

    Returns:
      `[b, m]` logits.

    References:
      He et al., 2015, "Deep Residual Learning", https://arxiv.org/abs/1512.03385,
      Section 4.2, option A; the layout is Idelbayev's, whose eps is 1e-5.

    Example:
      >>> from jaxlab import nn
      >>> net = nn.resnet(widths=(4, 6), blocks=1, classes=3)
      >>> resnet20(net.init(jax.random.key(0)), jnp.ones((2, 8, 8, 3))).shape
      (2, 3)
    """
    w = named(params)
    norm = lambda name, x: _batch_norm(w, name, x, train)
    x = jax.nn.relu(norm("bn1", _conv(w["conv1.weight"], images)))
    for stage in itertools.count(1):
        if f"layer{stage}.0.conv1.weight" not in w:
            break
        for block in itertools.count():
            at = f"layer{stage}.{block}"
            if f"{at}.conv1.weight" not in w:
                break
            stride = 2 if stage > 1 and block == 0 else 1
            y = _conv(w[f"{at}.conv1.weight"], x, stride)
            y = jax.nn.relu(norm(f"{at}.bn1", y))
            y = norm(f"{at}.bn2", _conv(w[f"{at}.conv2.weight"], y))
            x = jax.nn.relu(y + _shortcut(x, y.shape[-1], stride))
    return linear(w, "linear", x.mean((1, 2)))


def _shortcut(x: Array, channels: int, stride: int) -> Array:
    """Every other pixel, and zeros for the channels that are new, on both sides."""
    x = x[:, ::stride, ::stride]
    if (more := channels - x.shape[-1]) == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))


def _conv(kernel: Array, x: Array, stride: int = 1) -> Array:
    """A convolution by an OIHW kernel of odd size, padded alike on all sides."""
    pads = [(side // 2, side // 2) for side in kernel.shape[2:]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "OIHW", "NHWC")
    )


def _batch_norm(w: Weights, name: str, x: Array, train: bool) -> Array:
    if train:
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    else:
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    gain = w[f"{name}.weight"] * jax.lax.rsqrt(var + 1e-5)
    return (x - like(mean, x)) * like(gain, x) + like(w[f"{name}.bias"], x)


# Convolution, its norm and stride, in Keras's order: (main path, shortcut) by stage.
_STAGES = (
    (((2, 3, 1), (4, 5, 1)), None),
    (((6, 7, 2), (8, 10, 1)), (9, 2)),
    (((11, 12, 2), (13, 15, 1)), (14, 2)),
)


def resnet8(params: Params, images: Float[Array, "b h w c"]) -> Float[Array, "b 10"]:
    r"""The CIFAR-10 ResNet-8 of MLPerf Tiny, in Keras's layout.

    Args:
      params: `NN_Conv2D_{kernel,bias}`, `NN_BatchNormalization_{gamma,beta,moving_mean,
        moving_variance}` and `16_Dense_{kernel,bias}`, NN counting Keras's layers;
        kernels HWIO.
      images: `[b, 32, 32, 3]` raw values, 0 to 255.

    Returns:
      `[b, 10]` logits, before the softmax.

    References:
      Banbury et al., 2021, "MLPerf Tiny Benchmark", https://arxiv.org/abs/2106.07597;
      the released model is mlcommons/tiny's `resnet_v1_eembc`, whose eps is 1e-3.

    Example:
      >>> import numpy as np
      >>> weights = dict(np.load("A_pretrained_HEAD.npz"))  # doctest: +SKIP
      >>> resnet8(weights, images).argmax(-1)  # doctest: +SKIP
    """
    w = params
    x = jax.nn.relu(_keras_norm(w, 1, _keras_conv(w, 0, images, 1)))
    for ((c1, n1, s1), (c2, n2, s2)), short in _STAGES:
        y = jax.nn.relu(_keras_norm(w, n1, _keras_conv(w, c1, x, s1)))
        y = _keras_norm(w, n2, _keras_conv(w, c2, y, s2))
        x = x if short is None else _keras_conv(w, short[0], x, short[1])
        x = jax.nn.relu(x + y)
    y = jnp.einsum("bn,nm->bm", x.mean((1, 2)), w["16_Dense_kernel"])
    return y + like(w["16_Dense_bias"], y)


def _keras_conv(w: Params, number: int, x: Array, stride: int) -> Array:
    y = jax.lax.conv_general_dilated(
        x,
        w[f"{number:02}_Conv2D_kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + like(w[f"{number:02}_Conv2D_bias"], y)


def _keras_norm(w: Params, number: int, x: Array) -> Array:
    at = f"{number:02}_BatchNormalization"
    gain = w[f"{at}_gamma"] * jax.lax.rsqrt(w[f"{at}_moving_variance"] + 1e-3)
    centred = x - like(w[f"{at}_moving_mean"], x)
    return centred * like(gain, x) + like(w[f"{at}_beta"], x)
