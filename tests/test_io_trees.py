"""Names, nested trees, model libraries, shardings, slices."""

from collections.abc import Callable
from pathlib import Path
import tempfile

from corpus.reading import read_all, same
from flax import linen as nn, nnx
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
import safetensors.numpy

from jaxlab import io, tree
from jaxlab.io._names import nest, to_name, to_path


@given(st.text())
def test_names_and_paths_are_one_to_one(text: str):
    assert to_name(to_path(text)) == text
    assert to_path(to_name(text)) == text


PIECES = st.text(st.sampled_from("a./~\u00e9"), max_size=6)


@given(st.lists(PIECES, unique=True, max_size=8))
def test_nesting_loses_nothing(paths: list[str]):
    """Also where a leaf is a prefix of others, whatever the order."""
    nested = nest(dict.fromkeys(paths, 0))
    assert sorted(tree.paths(nested)) == sorted(paths)
    again = nest(dict.fromkeys(reversed(paths), 0))
    assert jax.tree.structure(nested) == jax.tree.structure(again)


def test_hostile_depth(tmp_path: Path):
    name = "." * 60_000
    io.save(tmp_path / "a.safetensors", nest({to_path(name): np.ones(1)}))
    got = io.load(tmp_path / "a.safetensors")
    assert tree.paths(got) == [to_path(name)]


def test_leaf_and_subtree(tmp_path: Path):
    flat = {"a": np.ones(1), "a.b": np.ones(2), "a.b.c": np.ones(3)}
    safetensors.numpy.save_file(flat, tmp_path / "a.safetensors")
    got = io.load(tmp_path / "a.safetensors")
    assert {k: x.shape for k, x in got.items()} == {
        "a": (1,),
        "a.b": (2,),
        "a.b.c": (3,),
    }
    io.save(tmp_path / "b.safetensors", got)
    assert read_all(tmp_path / "b.safetensors").keys() == flat.keys()


def test_a_flat_dict_is_a_state_dict(tmp_path: Path):
    """Its keys are names as they are, on the way out and on the way back."""
    flat = {"model.layers.0.weight": np.ones(2, "f4"), "odd/name": np.zeros(1, "f4")}
    io.save(tmp_path / "a.safetensors", flat)
    assert read_all(tmp_path / "a.safetensors").keys() == flat.keys()
    same = io.load(tmp_path / "a.safetensors", like=flat)
    assert same.keys() == flat.keys()
    nested = io.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(nested["model"]["layers"]["0"]["weight"], np.ones(2))
    io.save(tmp_path / "b.safetensors", nested)
    assert read_all(tmp_path / "b.safetensors").keys() == flat.keys()
    io.save(tmp_path / "c.safetensors", {"a/b": np.ones(1), "c": np.ones(1)})
    assert io.load(tmp_path / "c.safetensors").keys() == {"a/b", "c"}


def _nnx():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    return nnx.state(model)


def _linen():
    return nn.Dense(4).init(jax.random.key(0), jnp.ones((1, 3)))


def _equinox():
    import equinox as eqx

    return eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0)), eqx.is_array)


def _haiku():
    return {"mlp/~/linear_0": {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}}


@pytest.mark.parametrize(
    "make", [_nnx, _linen, _equinox, _haiku, lambda: [jnp.ones(1), (jnp.zeros(2),)]]
)
@pytest.mark.parametrize("abstract", [False, True])
def test_models_come_back(make: Callable, abstract: bool, tmp_path: Path):
    model = make()
    io.save(tmp_path / "a.safetensors", model)
    like = jax.eval_shape(lambda: model) if abstract else model
    got = io.load(tmp_path / "a.safetensors", like=like)
    assert jax.tree.structure(got) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(model), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        same(a, b)


def test_like_is_checked(tmp_path: Path):
    io.save(
        tmp_path / "a.safetensors", {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(1)}
    )
    load = lambda like: io.load(tmp_path / "a.safetensors", like=like)
    good = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(
        io.FormatError, match=r"'a/w': float32\[2, 3\], expected float32\[3, 2\]"
    ):
        load({"a": {"w": jnp.ones((3, 2))}, "b": good})
    with pytest.raises(io.FormatError, match=r"'a/w': float32.*expected bfloat16"):
        load({"a": {"w": jnp.ones((2, 3), jnp.bfloat16)}, "b": good})
    with pytest.raises(io.FormatError, match="no tensor for the leaf 'c'"):
        load({"a": {"w": jnp.ones((2, 3))}, "b": good, "c": good})
    with pytest.raises(io.FormatError, match=r"'b'.*left over"):
        load({"a": {"w": jnp.ones((2, 3))}})
    with pytest.raises(ValueError, match="no array at 'b' but float"):
        load({"a": {"w": jnp.ones((2, 3))}, "b": 1.0})


def test_wide_types_stay_wide(tmp_path: Path):
    big = {
        "i": np.array([2**40]),
        "f": np.array([1e300]),
        "u": np.array([2**63], np.uint64),
    }
    io.save(tmp_path / "a.safetensors", big)
    got = io.load(tmp_path / "a.safetensors")
    for name, x in big.items():
        same(got[name], x)
    io.save(tmp_path / "b.safetensors", got)
    assert (tmp_path / "a.safetensors").read_bytes() == (
        tmp_path / "b.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("spec", [("d", None), (None, "d"), (None, None), ("d",)])
def test_loads_onto_any_sharding(tmp_path: Path, spec: tuple):
    mesh = jax.make_mesh((4, 2), ("d", "e"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    x = {
        "a": {"w": np.arange(64, dtype=np.float32).reshape(8, 8)},
        "b": np.ones((4, 4), np.int64),
    }
    io.save(tmp_path / "a.safetensors", x)
    trees = [
        io.load(tmp_path / "a.safetensors", sharding=sharding),
        io.load(
            tmp_path / "a.safetensors", sharding={"a": {"w": sharding}, "b": sharding}
        ),
        io.load(
            tmp_path / "a.safetensors",
            like={
                "a": {
                    "w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=sharding)
                },
                "b": np.ones((4, 4), np.int64),
            },
        ),
    ]
    for got in trees:
        assert got["a"]["w"].sharding == sharding
        same(got["a"]["w"], x["a"]["w"])
        same(got["b"], x["b"])
    with pytest.raises(ValueError, match="no leaf 'b'"):
        io.load(tmp_path / "a.safetensors", sharding={"a": {"w": sharding}})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slices_agree_with_numpy(data: st.DataObject):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    x = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    bound = st.one_of(st.none(), st.integers(-7, 7))
    step = st.one_of(st.none(), st.integers(-3, 3).filter(bool))
    cut = st.builds(slice, bound, bound, step)
    index = data.draw(
        st.lists(st.one_of(cut, st.integers(-6, 6), st.just(...)), max_size=3)
    )
    index = tuple(index) if data.draw(st.booleans()) or len(index) != 1 else index[0]
    with tempfile.TemporaryDirectory() as folder:
        io.save(Path(folder, "a.safetensors"), {"a": x})
        with io.open(Path(folder, "a.safetensors")) as checkpoint:
            try:
                want = x[index]
            except IndexError:
                with pytest.raises(IndexError):
                    checkpoint.tensors["a"][index]
            else:
                same(checkpoint.tensors["a"][index], want)


def test_slices_read_only_their_rows(tmp_path: Path):
    io.save(tmp_path / "a.safetensors", {"a": np.zeros((1000, 8), np.float32)})
    with io.open(tmp_path / "a.safetensors") as checkpoint:
        asked = []
        spy = lambda buffer, first: asked.append((first, len(buffer)))
        tensor = checkpoint.tensors["a"]
        spied = type(tensor)(tensor.name, tensor.shape, tensor.dtype, tensor.file, spy)
        spied[10:20, :3], spied[-1], spied[30:20:-5]
    assert asked == [(320, 320), (31968, 32), (25 * 32, 6 * 32)]
