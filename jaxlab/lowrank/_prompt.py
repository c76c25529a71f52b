"""Prompts: trained positions in front of a sequence, or of its keys and values."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax import Array
import jax.numpy as jnp

from ._encoders import cell, linears, perceptron, run


class Prompt(NamedTuple):
    """What is trained, and the prompt it stands for."""

    init: Callable[..., dict[str, Any]]
    """`key -> s`."""
    apply: Callable[..., Any]
    """`s -> prompt [p, d]`; of a prefix, `(keys, values) [layers, p, heads, e]`."""


def prepend(prompt: Array, x: Array) -> Array:
    """A prompt in front of each sequence: position i of `x` becomes i + p.

    Of embeddings, of the keys and values of a layer, of masks and labels: a mask gets
    `prepend(jnp.ones(p, bool), mask)`, positions count on from p.

    Args:
      prompt: [p, *rest].
      x: [*batch, s, *rest], whatever the batch axes.

    Returns:
      [*batch, p + s, *rest] in the dtype of `x`.

    Raises:
      ValueError: other axes behind the sequence's.

    Example:
      >>> prepend(jnp.zeros((1, 2)), jnp.ones((3, 4, 2))).shape
      (3, 5, 2)
      >>> prepend(jnp.ones(2, bool), jnp.zeros((1, 2), bool)).tolist()
      [[True, True, False, False]]
    """
    rest = prompt.shape[1:]
    axis = x.ndim - prompt.ndim
    if axis < 0 or x.shape[axis + 1 :] != rest:
        raise ValueError(f"a prompt {prompt.shape} does not fit a sequence {x.shape}")
    prompt = jnp.broadcast_to(prompt, (*x.shape[:axis], *prompt.shape))
    return jnp.concatenate([prompt.astype(x.dtype), x], axis)


def prompt_tuning(
    *, length: int, dim: int, table: Array | None = None, tokens: Sequence[int] = ()
) -> Prompt:
    r"""Trained embeddings in front of the input: $[P; X]$.

    Args:
      length: p.
      dim: d.
      table: the model's embeddings [vocabulary, d]; the prompt starts from rows of it.
      tokens: which rows, repeated or cut to p; none are drawn at random.

    Returns:
      A `Prompt` with state `prompt [p, d]`: `prepend(prompt.apply(s), embeddings)`.
      Without a table it starts as standard normal numbers.

    Raises:
      ValueError: a length below 1; tokens without a table; a table of another width.

    References:
      Lester et al., 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning",
      https://arxiv.org/abs/2104.08691.

    Example:
      >>> table = jnp.arange(6.0).reshape(3, 2)
      >>> prompt = prompt_tuning(length=3, dim=2, table=table, tokens=(2, 0))
      >>> prompt.apply(prompt.init(jax.random.key(0))).tolist()
      [[4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]
    """
    _check(length)
    if tokens and table is None:
        raise ValueError("tokens are rows of a table: pass it")
    if table is not None and table.shape[-1] != dim:
        raise ValueError(f"a table {table.shape} has not the width {dim}")

    def init(key: Array) -> dict[str, Any]:
        if table is None:
            return {"prompt": jax.random.normal(key, (length, dim))}
        at = jax.random.randint(key, (length,), 0, table.shape[0])
        if tokens:
            at = jnp.resize(jnp.array(tokens), (length,))
        return {"prompt": table[at].astype(jnp.float32)}

    return Prompt(init, lambda s: s["prompt"])


def p_tuning(
    *,
    length: int,
    dim: int,
    size: int,
    encoder: Literal["mlp", "lstm"] = "mlp",
    layers: int = 2,
) -> Prompt:
    r"""A prompt through an encoder that is dropped after training: $P = f(E)$.

    Args:
      length: p.
      dim: d, of the embeddings and of E.
      size: the width of the encoder.
      encoder: "mlp": three linear layers, ReLU between them; "lstm": bidirectional,
        then two linear layers of twice the width.
      layers: of the LSTM.

    Returns:
      A `Prompt` with state `embedding [p, d]`, `mlp`, a list of `w [n, m]` and `b [m]`,
      and `lstm`, a list of pairs of directions: `w [d', 4 size]`, `u [size, 4 size]`,
      `b [4 size]`, gates in the order input, forget, cell, output.

    Raises:
      ValueError: a length below 1, another encoder.

    References:
      Liu et al., 2021, "GPT Understands, Too", https://arxiv.org/abs/2103.10385;
      the encoders as in PEFT.

    Example:
      >>> prompt = p_tuning(length=3, dim=2, size=5)
      >>> prompt.apply(prompt.init(jax.random.key(0))).shape
      (3, 2)
    """
    _check(length)
    if encoder not in ("mlp", "lstm"):
        raise ValueError(f'encoder must be "mlp" or "lstm", got {encoder!r}')
    lstm = encoder == "lstm"
    widths = [2 * size, 2 * size, dim] if lstm else [dim, size, size, dim]

    def init(key: Array) -> dict[str, Any]:
        first, second, third = jax.random.split(key, 3)
        s: dict[str, Any] = {"embedding": jax.random.normal(first, (length, dim))}
        s["mlp"] = linears(second, widths)
        if lstm:
            inputs = [dim, *[2 * size] * (layers - 1)]
            keys = jax.random.split(third, (layers, 2))
            s["lstm"] = [
                [cell(k, n, size) for k in ks]
                for n, ks in zip(inputs, keys, strict=True)
            ]
        return s

    def apply(s: dict[str, Any]) -> Array:
        x = s["embedding"]
        for ahead, back in s["lstm"] if lstm else ():
            x = jnp.concatenate([run(ahead, x), run(back, x[::-1])[::-1]], -1)
        return perceptron(s["mlp"], x, jax.nn.relu)

    return Prompt(init, apply)


def prefix_tuning(
    *,
    length: int,
    layers: int,
    heads: int,
    dim: int,
    size: int | None = None,
    zeros: bool = False,
) -> Prompt:
    r"""Trained keys and values in front of those of each layer: $[P_K; K], [P_V; V]$.

    With `size` they are $\mathrm{MLP}_\theta(E)$, which is folded away after training;
    without, they are the state: also P-tuning v2's deep prompts.

    Args:
      length: p.
      layers: of the model.
      heads: of the keys and values.
      dim: d, heads times the size e of one.
      size: the width of the MLP's hidden layer, tanh behind it; None for no MLP.
      zeros: start the prefix at zero, a key that all queries see alike.

    Returns:
      A `Prompt` with state `prefix [p, layers * 2 * d]`, or `embedding [p, d]` and
      `mlp`. `keys, values = prompt.apply(s)` are [layers, p, heads, e]:
      `prepend(keys[l], k)` for `k [*batch, s, heads, e]` of layer l, also as the first
      p entries of its cache.

    Raises:
      ValueError: a length below 1; heads that do not divide d.

    References:
      Li and Liang, 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190.
      Liu et al., 2021, "P-Tuning v2", https://arxiv.org/abs/2110.07602.

    Example:
      >>> prompt = prefix_tuning(length=5, layers=2, heads=3, dim=12)
      >>> keys, values = prompt.apply(prompt.init(jax.random.key(0)))
      >>> keys.shape
      (2, 5, 3, 4)
    """
    _check(length)
    if dim % heads:
        raise ValueError(f"{heads} heads do not divide {dim}")
    width = layers * 2 * dim

    def init(key: Array) -> dict[str, Any]:
        first, second = jax.random.split(key)
        if size is None:
            prefix = jax.random.normal(first, (length, width))
            return {"prefix": jnp.zeros_like(prefix) if zeros else prefix}
        mlp = linears(second, [dim, size, width])
        if zeros:
            mlp[-1] = jax.tree.map(jnp.zeros_like, mlp[-1])
        return {"embedding": jax.random.normal(first, (length, dim)), "mlp": mlp}

    def apply(s: dict[str, Any]) -> tuple[Array, Array]:
        flat = (
            s["prefix"]
            if size is None
            else perceptron(s["mlp"], s["embedding"], jnp.tanh)
        )
        both = flat.reshape(length, layers, 2, heads, -1).transpose(2, 1, 0, 3, 4)
        return both[0], both[1]

    return Prompt(init, apply)


def _check(length: int) -> None:
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
