"""ConTraCon: Roy et al., 2023."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._rank import check_least, wide


def contracon(
    *, heads: int, kernel: int = 9, dilation: int = 1, drawn: bool = False
) -> Adapter:
    r"""A new task's K, Q or V weights as convolutions of an old one's, head by head.

    $W_h \leftarrow C_h * W_h + c_h + \sigma(g_h) W_h$: the n x m/h matrix of each head
    is an image, convolved with a k x k kernel and passed on by a gate: h (k k + 2)
    numbers. The layer norms (`full`) and the classifier are each task's own.

    Args:
      heads: h, which divides m.
      kernel: k, an odd side.
      dilation: between the kernel's entries.
      drawn: start from random kernels, as the authors do; by default from the kernels
        that give the base.

    Returns:
      An adapter with state `kernel [h, k, k]` (inputs first), `shift [h]`, `gate [h]`.

    Raises:
      ValueError: an even kernel, heads or a dilation below 1; `heads` does not divide
        m (from `init`).

    Degenerate inputs:
      Fresh, g = 1 and the kernel is $1 - \sigma(1)$ in its middle: the weight is the
      base's; with `drawn` it is not.

    References:
      Roy et al., 2023, "Exemplar-Free Continual Transformer with Convolutions",
      https://arxiv.org/abs/2308.11357, section 3.1. The bias of a layer, which theirs
      lack, is left.

    Example:
      >>> w = jnp.ones((4, 6))
      >>> adapter = contracon(heads=2, kernel=3)
      >>> bool((adapter.merge(w, adapter.init(jax.random.key(0), w)) == w).all())
      True
    """
    for name, value in (("heads", heads), ("dilation", dilation)):
        check_least(name, value)
    if kernel % 2 == 0 or kernel < 1:
        raise ValueError(f"kernel must be odd, got {kernel}")

    def init(key: Array, w: Array) -> dict[str, Any]:
        m, dtype = w.shape[1], wide(w)
        if m % heads:
            raise ValueError(f"heads {heads} does not divide the {m} outputs")
        gate = jnp.ones(heads, dtype)
        if drawn:
            keys, shape = jax.random.split(key), (heads, kernel, kernel)
            c = jax.random.uniform(keys[0], shape, dtype, -1 / kernel, 1 / kernel)
            shift = jax.random.uniform(
                keys[1], (heads,), dtype, -1 / kernel, 1 / kernel
            )
            return {"kernel": c, "shift": shift, "gate": gate}
        c = jnp.zeros((heads, kernel, kernel), dtype)
        c = c.at[:, kernel // 2, kernel // 2].set(1 - jax.nn.sigmoid(gate))
        return {"kernel": c, "shift": jnp.zeros(heads, dtype), "gate": gate}

    def merge(w: Array, s: dict[str, Any]) -> Array:
        (n, m), dtype = w.shape, wide(w, s["kernel"])
        image = w.astype(dtype).reshape(1, n, heads, m // heads).swapaxes(2, 3)
        moved = jax.lax.conv_general_dilated(
            image,
            jnp.moveaxis(s["kernel"], 0, -1)[:, :, None].astype(dtype),
            (1, 1),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=heads,
            precision=jax.lax.Precision.HIGHEST,
        )
        by_head = lambda v: v.astype(dtype).reshape(1, 1, 1, heads)
        gate = jax.nn.sigmoid(by_head(s["gate"]))
        moved = moved + by_head(s["shift"]) + gate * image
        return moved.swapaxes(2, 3).reshape(n, m).astype(w.dtype)

    config = (("heads", heads), ("kernel", kernel), ("dilation", dilation))
    config = ("contracon", *config, ("drawn", drawn))
    return Adapter(init, None, merge, config=config)


def contracon_task(logits: Sequence[Array]) -> Array:
    r"""Which task an input is of: the one whose model is surest of its augmentations.

    $\arg\min_t H(\mathrm{softmax}(\frac1a \sum_i f_t(x_i)))$.

    Args:
      logits: by task, those of all augmentations of each input, `[a, ..., classes]`;
        the number of classes may differ.

    Returns:
      `[...]`, the index of a task.

    Raises:
      ValueError: no tasks.

    Degenerate inputs:
      The first of tasks that are equally sure.

    References:
      Roy et al., 2023, https://arxiv.org/abs/2308.11357, section 3.3. The authors'
      code counts the input itself six times beside ten augmentations, and adds 1e-4
      in the logarithm, as here.

    Example:
      >>> sure, unsure = jnp.array([[9.0, 0.0]]), jnp.array([[0.1, 0.0]])
      >>> int(contracon_task([unsure, sure]))
      1
    """
    if not logits:
        raise ValueError("contracon_task needs the logits of at least one task")

    def entropy(one: Array) -> Array:
        p = jax.nn.softmax(one.astype(wide(one)).mean(0))
        return -(p * jnp.log(p + 1e-4)).sum(-1)

    return jnp.stack([entropy(one) for one in logits]).argmin(0)
