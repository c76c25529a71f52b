"""One row per adapter: peculiarities are columns, no test asks for a name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab import lowrank
from jaxlab.types import Adapter


class Row(NamedTuple):
    """How an adapter is made, and what it promises beyond the usual."""

    make: Callable[[], Adapter]
    starts: bool = True  # merge(w, init(key, w)) == w
    folds: bool = True  # has a merged weight
    statistic: Callable[[Any, Any], Any] | None = (
        None  # (key, w [n, m]) -> what init takes
    )
    tolerance: float = 1e-5  # of apply against x @ merge, in float32, relative
    grad: bool = True  # False: some trained entry has no slope even off its start


def gram(key, w):
    """A Gram matrix [n, n] of 4 n inputs."""
    n = w.shape[0]
    x = jax.random.normal(key, (4 * n, n), w.dtype)
    return x.T @ x


def slope(key, w):
    """A gradient of the weight's shape."""
    return jax.random.normal(key, w.shape, w.dtype)


ADAPTERS = {
    "lora": Row(lambda: lowrank.lora(rank=2, alpha=3)),
    "lora/rslora": Row(lambda: lowrank.lora(rank=2, alpha=3, rslora=True)),
    "lora/frozen_a": Row(lambda: lowrank.lora(rank=2, frozen_a=True)),
}
LEAVES = {"full": Row(lowrank.full)}  # adapters of leaves as they are
BEYOND = {
    "attach": "tests/test_attach.py",
    "dense": "tests/test_attach.py",
    "fold": "tests/test_attach.py",
    "fold_error": "tests/test_attach.py",
    "kept": "tests/test_attach.py",
    "rows": "tests/test_attach.py",
    "unfold": "tests/test_attach.py",
    "Adapted": "tests/test_attach.py",
    "Adapter": "tests/test_attach.py",
    "Place": "tests/test_attach.py",
    "Spec": "tests/test_attach.py",
    "State": "tests/test_attach.py",
}  # other public names, and the file that tests them


def fresh(name, w, seed=0):
    """The adapter and its first state for a weight [n, m]."""
    row = ADAPTERS[name]
    adapter, key = row.make(), jax.random.key(seed)
    statistic = () if row.statistic is None else (row.statistic(key, w),)
    s = adapter.init(key, w, *statistic)
    if adapter.shared is not None:
        s = adapter.shared(key, (w.shape,)) | s
    return adapter, s


def moved(adapter, s, seed=1, scale=0.2):
    """Its trained entries off their start."""
    keys = iter(jax.random.split(jax.random.key(seed), len(s)))
    drawn = lambda v: scale * jax.random.normal(next(keys), v.shape, v.dtype)
    shifted = lambda v: jax.tree.map(lambda u: u + drawn(u), v)
    return {n: v if n in adapter.fixed else shifted(v) for n, v in s.items()}


def everything():
    """One function with a leaf of every form, and inputs: `(apply, params, inputs)`.

    Dense, projection by head (in and out), convolution, embedding, experts and layers
    stacked for a scan; every matrix is [8, 12], [12, 8] or [8, 8] to its adapter.
    """
    keys = iter(jax.random.split(jax.random.key(7), 10))
    leaf = lambda *shape: 0.5 * jax.random.normal(next(keys), shape)
    params = {
        "embed": leaf(8, 12),
        "dense": {"kernel": leaf(12, 8), "bias": leaf(8)},
        "heads": {"kernel": leaf(8, 3, 4), "bias": leaf(3, 4)},
        "out": leaf(3, 4, 8),
        "conv": leaf(2, 2, 2, 12),
        "experts": leaf(2, 12, 8),
        "layers": {"kernel": leaf(3, 8, 8), "bias": leaf(3, 8)},
    }

    def apply(p, tokens):
        x = p["embed"][tokens]
        x = jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"][None, None])
        h = jnp.einsum("bsd,dhk->bshk", x, p["heads"]["kernel"])
        h = jnp.tanh(h + p["heads"]["bias"][None, None])
        x = x + jnp.einsum("bshk,hkd->bsd", h, p["out"])
        image = x.reshape(x.shape[0], 4, 4, 2)
        y = jax.lax.conv_general_dilated(
            image, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jnp.tanh(y.reshape(y.shape[0], 4, 12))
        y = jnp.einsum("becd,edm->becm", y.reshape(y.shape[0], 2, 2, 12), p["experts"])
        x = x + y.reshape(x.shape)

        def layer(x, l):
            return x + jnp.tanh(x @ l["kernel"] + l["bias"][None, None]), None

        return jax.lax.scan(layer, x, p["layers"])[0]

    return apply, params, (jnp.arange(8).reshape(2, 4) % 8,)


MATRICES = "embed,dense/kernel,heads/kernel,out,conv,experts,layers/kernel".split(",")
