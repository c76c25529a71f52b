"""DR-Tune: Zhou et al., 2023."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from ._rank import wide


class FeatureBank(NamedTuple):
    """The last K features of the pretrained and of the tuned encoder."""

    pretrained: Array
    """`[K, d]`."""
    tuned: Array
    """`[K, d]`, of the same inputs."""
    labels: Array
    """`[K]`; -1 where nothing has been put yet."""
    at: Array
    """Where the next go."""


class DRTune(NamedTuple):
    """Distribution regularisation with semantic calibration, by parts."""

    init: Callable[..., FeatureBank]
    """`(dim) -> bank`."""
    push: Callable[..., FeatureBank]
    """`(bank, pretrained [b, d], tuned [b, d], labels [b]) -> bank`."""
    rotation: Callable[..., Array]
    """`(bank) -> R [d, d]`: the pretrained features as the tuned are turned."""
    calibrate: Callable[..., Array]
    """`(bank, prototypes [d, c], norm, rotation=None) -> features [K, d]`."""
    loss: Callable[..., Array]
    """`(logits [b, c], labels [b], bank_logits [K, c], bank_labels [K]) -> loss`."""


def dr_tune(*, size: int) -> DRTune:
    r"""A head that must also classify the pretrained features, calibrated to the tuned.

    The loss is the mean cross-entropy over the batch and a bank of K pretrained
    features. Those are first brought to where the tuned ones have drifted, all of unit
    length: turned by the R of $\min_R \sum_k \|R p_k - t_k\|^2$ about their means, then
    each class moved from its mean to the mean of its tuned features weighted by
    $\mathrm{softmax}(\cos(t_k, w_c))$, and scaled to the length of the batch's
    features. Gradients pass through the bank's logits to the head alone.

    Args:
      size: K, of the bank.

    Returns:
      `DRTune(init, push, rotation, calibrate, loss)`; in `calibrate`, `prototypes` are
      the head's weights and `norm` is the mean length of the batch's features. Without
      a rotation nothing is turned: it is dear, and the authors do it every tenth step.

    Raises:
      ValueError: a size below 1; from `push`, a batch larger than the bank.

    Degenerate inputs:
      A class with no feature in the bank is not moved; empty places do not count in
      the loss.

    References:
      Zhou et al., 2023, "DR-Tune: Improving Fine-tuning of Pretrained Visual Models by
      Distribution Regularization with Semantic Calibration",
      https://arxiv.org/abs/2308.12058, equations 4 to 11, and the authors' code.

    Example:
      >>> bank = dr_tune(size=4).init(2)
      >>> x, y = jnp.ones((3, 2)), jnp.array([0, 1, 0])
      >>> dr_tune(size=4).push(bank, x, x, y).labels.tolist()
      [0, 1, 0, -1]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")

    def init(dim: int) -> FeatureBank:
        zero = jnp.zeros((size, dim))
        return FeatureBank(zero, zero, jnp.full(size, -1), jnp.zeros((), jnp.int32))

    def push(bank: FeatureBank, pretrained: Array, tuned: Array, labels: Array) -> Any:
        count = len(labels)
        if count > size:
            raise ValueError(f"a batch of {count} is larger than a bank of {size}")
        places = (bank.at + jnp.arange(count)) % size
        put = lambda old, new: old.at[places].set(
            jax.lax.stop_gradient(new).astype(old.dtype)
        )
        return FeatureBank(
            put(bank.pretrained, pretrained),
            put(bank.tuned, tuned),
            put(bank.labels, labels),
            (bank.at + count) % size,
        )

    return DRTune(init, push, _rotation, _calibrate, _loss)


def _rotation(bank: FeatureBank) -> Array:
    """The proper rotation that brings the pretrained features nearest to the tuned."""
    filled = (bank.labels >= 0)[:, None].astype(bank.tuned.dtype)
    number = jnp.maximum(filled.sum(), 1)

    def centred(x: Array) -> Array:
        x = _unit(x)
        return (x - (x * filled).sum(0, keepdims=True) / number) * filled

    u, _, vt = jnp.linalg.svd(centred(bank.pretrained).T @ centred(bank.tuned))
    sign = jnp.sign(jnp.linalg.det(vt.T @ u.T))
    last = jnp.ones(len(vt), vt.dtype).at[-1].set(sign)
    return (vt.T * last[None]) @ u.T


def _calibrate(
    bank: FeatureBank, prototypes: Array, norm: Array, rotation: Array | None = None
) -> Array:
    """The pretrained features where the tuned are."""
    features, tuned = _unit(bank.pretrained), _unit(bank.tuned)
    if rotation is not None:
        features = features @ rotation.T
    classes = jnp.arange(prototypes.shape[1])
    member = bank.labels[:, None] == classes[None]  # [K, c]
    share = jax.nn.softmax(tuned @ _unit(prototypes.T).T, axis=0, where=member)
    share = jnp.where(member, share, 0)
    number = jnp.maximum(member.sum(0), 1).astype(features.dtype)
    member = member.astype(features.dtype)
    step = share.T @ tuned - member.T @ features / number[:, None]
    features = _unit(features + member @ step) * norm
    return jax.lax.stop_gradient(features)


def _loss(
    logits: Array, labels: Array, bank_logits: Array, bank_labels: Array
) -> Array:
    """The mean cross-entropy over the batch and the filled places of the bank."""
    labels = jnp.concatenate([labels, bank_labels])
    logits = jnp.concatenate([logits, bank_logits])
    logs = jax.nn.log_softmax(logits.astype(wide(logits)))
    filled = labels >= 0
    chosen = jnp.take_along_axis(logs, jnp.where(filled, labels, 0)[:, None], 1)[:, 0]
    return -jnp.where(filled, chosen, 0).sum() / filled.sum().astype(logs.dtype)


def _unit(x: Array) -> Array:
    """Rows of unit length."""
    square = (x * x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, 1e-24))
