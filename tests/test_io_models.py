"""Models of every library come back from every format: leaves, types and structure."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from corpus.reading import same
import equinox as eqx
from flax import linen as nn, nnx, serialization
from flax.core import freeze
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import io, tree

SUFFIXES = (".safetensors", "", ".npz", ".msgpack", ".orbax")


class Block(nnx.Module):
    """A layer of each kind: parameters, running statistics, random state."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 4, rngs=rngs, decode=False)
        self.tail = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])
        self.scale = nnx.Param(jnp.full((1, 1, 2), 0.5, jnp.bfloat16))

    def __call__(self, x):
        h = self.attention(self.norm(self.linear(x)))
        for layer in self.tail:
            h = layer(h)
        return h * self.scale[...].astype(h.dtype)


class Net(nn.Module):
    """A Linen model with parameters and running statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(2)(x)


class Pair(NamedTuple):
    """A container of names."""

    left: jax.Array
    right: jax.Array


def _nnx():
    return nnx.split(Block(nnx.Rngs(0)))[1]


def _nnx_params():
    return nnx.state(Block(nnx.Rngs(0)), nnx.Param)


def _nnx_pure():
    return nnx.to_pure_dict(nnx.state(Block(nnx.Rngs(0)), nnx.Param))


def _linen():
    variables = Net().init(jax.random.key(0), jnp.ones((2, 3)))
    half = lambda path, x: x.astype(jnp.float16) if "Dense_0" in path else x
    return tree.path_map(half, variables)


def _frozen():
    return freeze(_linen())


def _equinox():
    model = eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0), dtype=jnp.bfloat16)
    return eqx.filter(model, eqx.is_array)


def _dicts():
    return {
        "block_0": {"w": jnp.ones((2, 3)), "step": np.array(7, np.int32)},
        "list": [jnp.zeros(2, jnp.int8), (jnp.ones(1, bool), Pair(*jnp.eye(2)))],
        "mlp/~/linear_0": {"w": jnp.ones((2, 2))},
        "dots.in.a.key": np.ones(2, np.float32),
        "f8": jnp.ones(3, jnp.float8_e4m3fn),
        "none": None,
    }


MODELS = [_nnx, _nnx_params, _nnx_pure, _linen, _frozen, _equinox, _dicts]


def check_same(got, want) -> None:
    """Equal structure, dtypes and bits; random keys by their data."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert tree.paths(got) == tree.paths(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        same(a, b)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("make", MODELS, ids=lambda m: m.__name__.strip("_"))
def test_models_come_back(make: Callable, suffix: str, tmp_path: Path):
    """From a template of arrays, of shapes only, and as nested dicts without one."""
    model = make()
    path = tmp_path / f"model{suffix}"
    io.save(path, model)
    check_same(io.load(path, like=model), model)
    check_same(io.load(path, like=jax.eval_shape(lambda: model)), model)
    bare = io.load(path)
    assert sorted(tree.paths(bare)) == sorted(tree.paths(model))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_restored_models_run(suffix: str, tmp_path: Path):
    """A model that was never initialised computes what the saved one does."""
    saved = Block(nnx.Rngs(0))
    graph, state = nnx.split(saved)
    x = jnp.linspace(-1, 1, 12).reshape(2, 2, 3)
    io.save(tmp_path / f"a{suffix}", state)
    abstract = nnx.split(nnx.eval_shape(lambda: Block(nnx.Rngs(1))))[1]
    other = nnx.merge(graph, io.load(tmp_path / f"a{suffix}", like=abstract))
    same(other(x), saved(x))


def test_flax_restores_what_we_save(tmp_path: Path):
    """msgpack by `from_bytes`, without a word about jaxlab."""
    want = _linen()
    io.save(tmp_path / "a.msgpack", want)
    blank = jax.tree.map(jnp.zeros_like, want)
    content = (tmp_path / "a.msgpack").read_bytes()
    check_same(serialization.from_bytes(blank, content), want)


def test_we_load_what_flax_saves(tmp_path: Path):
    want = _linen()
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(want))
    check_same(io.load(tmp_path / "a.msgpack", like=want), want)
    check_same(io.load(tmp_path / "a.msgpack"), want)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_templates_are_checked(suffix: str, tmp_path: Path):
    """The same errors in every format; they name the leaf."""
    path = tmp_path / f"a{suffix}"
    io.save(path, {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(1)})
    one = jnp.ones(1)
    for like, why in (
        ({"a": {"w": jnp.ones((3, 2))}, "b": one}, r"'a/w'.*expected float32\[3, 2\]"),
        ({"a": {"w": jnp.ones((2, 3), jnp.float16)}, "b": one}, "'a/w'.*float16"),
        ({"a": {"w": jnp.ones((2, 3))}, "c": one}, "no tensor for the leaf 'c'"),
        ({"a": {"w": jnp.ones((2, 3))}}, "'b'.*left over"),
    ):
        with pytest.raises(io.FormatError, match=why):
            io.load(path, like=like)
