"""Objectives without labels, for merges that adapt at test time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .. import tree


def entropy(logits: Any) -> Float[Array, ""]:
    r"""The mean entropy of predictions: $-\frac1b\sum_b\sum_m p_{bm}\log p_{bm}$.

    Args:
      logits: `[b, m]`, any leading axes, or a tree of those, one per task.

    Returns:
      A scalar in at least float32, summed over tasks.

    Raises:
      ValueError: logits without a class axis.

    Degenerate inputs:
      A class of probability 0 adds 0, also where its logit is -inf.

    References:
      Yang et al., 2023, "AdaMerging", https://arxiv.org/abs/2310.02575, Section 3.2.
      The authors' code is the same.

    Example:
      >>> import jax.numpy as jnp
      >>> float(jnp.exp(entropy(jnp.zeros((5, 10)))).round(3))
      10.0
    """

    def one(x: Float[Array, "*b m"]) -> Float[Array, ""]:
        if not x.ndim:
            raise ValueError("logits must have a class axis, got a scalar")
        x = tree.widen(x)
        log = jax.nn.log_softmax(x)
        possible = jnp.isfinite(log)
        log = jnp.where(possible, log, jnp.zeros_like(log))
        p = jnp.where(possible, jnp.exp(log), jnp.zeros_like(log))
        return -jnp.mean(jnp.sum(p * log, axis=-1))

    return sum(map(one, jax.tree.leaves(logits)), jnp.zeros((), jnp.float32))


def pseudo_label(
    weak: Float[Array, "b m"],
    strong: Float[Array, "b m"],
    *,
    threshold: float = 0.95,
    trusted: Int[Array, " b"] | None = None,
) -> Float[Array, ""]:
    r"""Cross-entropy of one view against the confident predictions of another.

    $\sum_b w_b\,\mathrm{CE}(\hat y_b, s_b) / \sum_b w_b$, where $\hat y_b$ is the class
    that the weak view predicts and $w_b$ whether its probability exceeds the threshold.

    Args:
      weak: logits of the plain view; constant to the gradient.
      strong: logits of the strongly augmented view.
      threshold: the confidence needed, in [0, 1]. May be traced.
      trusted: labels to use whatever the confidence, as `most_confident` gives; a
        negative one is none.

    Returns:
      A scalar in at least float32.

    Raises:
      ValueError: views of different shapes.

    Degenerate inputs:
      Where nothing is confident and nothing trusted, 0.

    References:
      Sohn et al., 2020, "FixMatch", https://arxiv.org/abs/2001.07685, equation 4, over
      the confident instead of all. Zhang et al., 2024,
      https://arxiv.org/abs/2407.02880, for the trusted set.

    Example:
      >>> import jax.numpy as jnp
      >>> weak = jnp.array([[9.0, 0.0], [0.1, 0.0]])
      >>> round(float(pseudo_label(weak, jnp.zeros((2, 2)))), 4)
      0.6931
    """
    if weak.shape != strong.shape:
        raise ValueError(f"the views differ: {weak.shape} against {strong.shape}")
    p = jax.lax.stop_gradient(jax.nn.softmax(tree.widen(weak)))
    labels, sure = jnp.argmax(p, axis=-1), jnp.max(p, axis=-1) > threshold
    if trusted is not None:
        labels = jnp.where(trusted >= 0, trusted.astype(labels.dtype), labels)
        sure = sure | (trusted >= 0)
    log = jax.nn.log_softmax(tree.widen(strong))
    losses = -jnp.take_along_axis(log, labels[:, None], axis=-1)[:, 0]
    kept = jnp.maximum(jnp.sum(sure), 1).astype(losses.dtype)
    return jnp.sum(jnp.where(sure, losses, jnp.zeros_like(losses))) / kept


def most_confident(logits: Float[Array, "b m"], *, count: int) -> Int[Array, " b"]:
    """Labels of the examples that each class is surest of: a balanced trusted set.

    Args:
      logits: of the zero-shot model, on all examples.
      count: how many examples per class, from 1 to b.

    Returns:
      `[b]` the class of each chosen example and -1 of the others.

    Raises:
      ValueError: a count out of range.

    Degenerate inputs:
      An example that several classes choose goes to the likelier one.

    References:
      Zhang et al., 2024, https://arxiv.org/abs/2407.02880; the authors' code takes
      min(b / (10 m), 100) per class, and as label the likeliest of all classes.

    Example:
      >>> import jax.numpy as jnp
      >>> most_confident(jnp.array([[2.0, 0.0], [0.0, 1.0], [0.1, 0.0]]), count=1)
      Array([ 0,  1, -1], dtype=int32)
    """
    b, m = logits.shape
    if not 1 <= count <= b:
        raise ValueError(f"count must be from 1 to {b}, got {count}")
    p = jax.nn.softmax(tree.widen(logits))
    best = jax.lax.top_k(p.T, count)[1]
    chosen: Bool[Array, "m b"] = jnp.zeros((m, b), bool)
    chosen = jax.vmap(lambda row, i: row.at[i].set(True))(chosen, best).T
    label = jnp.argmax(jnp.where(chosen, p, -jnp.ones_like(p)), axis=-1)
    return jnp.where(jnp.any(chosen, axis=-1), label, -1).astype(jnp.int32)
