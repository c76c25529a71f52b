"""ComPEFT: the ternary method, its arithmetic on bits, its code and its files."""

import functools as ft
import struct
import tempfile
import zlib

from cases import stacked
from corpus.reading import same
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlab import io, merge
from jaxlab.io import _compeft, _rice
from jaxlab.merge._compeft import Ternary

each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FORMAT = pytest.mark.usefixtures("hurry")


def close(a, b, tolerance=1e-6):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def odd(k=3, seed=0):
    """k models with leaves of numbers, of whole words, and of stacked matrices."""
    random = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(random.normal(size=(k, *shape)), jnp.float32)
    return {"n": leaf(), "w": leaf(64), "m": leaf(2, 3, 37)}


@ft.cache
def packed(k=3, seed=0):
    """Their compressed form, and what that is as dense task vectors."""
    run = lambda x: merge.ternary(x, density=0.5, alpha=1.5)
    small = jit(run)(odd(k, seed))
    return small, jit(merge.ternary_restore)(small, odd(k, seed))


def pick(small, i):
    return each(lambda x: x[i], small)


# --- the method -----------------------------------------------------------------------


at_density = jit(lambda x, d: merge.compeft(x, density=d, alpha=[0.5, 1.0, 2.0]))


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_compeft_is_algorithm_one(density):
    flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
    got = at_density(odd(), density)
    for i, alpha in enumerate((0.5, 1.0, 2.0)):
        x = flat(pick(odd(), i)).astype(np.float64)
        cut = np.sort(np.abs(x))[-max(1, int(density * x.size))]
        want = alpha * x.std(ddof=1) * np.sign(x) * (np.abs(x) >= cut)
        np.testing.assert_allclose(flat(pick(got, i)), want, rtol=1e-5)


def test_compeft_per_leaf_measures_each_leaf_alone():
    by_leaf = {"n": 1.0, "w": 2.0, "m": 2.0}
    run = ft.partial(merge.compeft, density=0.4, per="leaf")
    got = jit(ft.partial(run, alpha=by_leaf))(odd())
    alone = lambda x, n: merge.compeft({n: x[n]}, density=0.4, alpha=by_leaf[n])[n]
    close(got, jit(lambda x: {n: alone(x, n) for n in x})(odd()))
    with pytest.raises(ValueError, match="an alpha by leaf needs"):
        merge.compeft(odd(), density=0.4, alpha=by_leaf)


def test_what_does_not_vary_has_no_magnitude():
    flat = {"w": jnp.full((1, 5), 2.0), "b": jnp.full((1, 2), 2.0)}
    assert not any(np.any(x) for x in merge.compeft(flat, density=1.0).values())
    assert float(merge.compeft({"n": jnp.ones((1,))}, density=1.0)["n"][0]) == 0
    zeros = at_density(each(jnp.zeros_like, odd()), 0.5)
    assert not any(np.any(x) for x in zeros.values())


# --- arithmetic on two bit planes -----------------------------------------------------


@pytest.mark.parametrize("per", ["tree", "leaf"])
def test_two_bits_per_entry_hold_all_of_it(per):
    options = {"density": 0.4, "alpha": 1.5, "per": per}

    def run(x):
        small = merge.ternary(x, **options)
        half = each(lambda v: v.astype(jnp.bfloat16), x)
        back = merge.ternary_restore(small, x), merge.ternary_restore(small, half)
        return small, *back, merge.compeft(x, **options)

    small, back, half, dense = jit(run)(odd())
    close(back, dense, 0)
    assert half["m"].dtype == jnp.bfloat16
    assert small.positive["m"].shape == (3, 2, 3, 2)
    overlap = each(lambda p, n: np.asarray(p) & n, small.positive, small.negative)
    assert not any(np.any(x) for x in overlap.values())


def test_compressed_dot_is_the_dense_dot():
    small, dense = packed()
    rows = np.concatenate([np.reshape(x, (3, -1)) for x in dense.values()], 1)
    rows = rows.astype(np.float64)
    pairs = jax.vmap(jax.vmap(merge.ternary_dot, (None, 0)), (0, None))
    np.testing.assert_allclose(jit(pairs)(small, small), rows @ rows.T, rtol=1e-5)
    one = jit(merge.ternary_dot)(pick(small, 0), pick(small, 2))
    np.testing.assert_allclose(one, rows[0] @ rows[2], rtol=1e-5)
    with pytest.raises(ValueError, match="holds 3 task vectors"):
        merge.ternary_dot(small, small)


def test_counts_are_exact_beyond_float32():
    """2^25 + 1 equal entries: a float32 sum of ones would stop at 2^24."""
    words = np.full(2**20 + 1, 0xFFFFFFFF, np.uint32)
    words[-1] = 1
    planes = {"w": jnp.asarray(words)}, {"w": jnp.zeros_like(words)}
    ones = Ternary(*planes, {"w": jnp.float32(1)})
    want = np.float32(2**25 + 1)
    assert np.float32(merge.ternary_dot(ones, ones)) == want
    minus = ones._replace(positive=ones.negative, negative=ones.positive)
    assert np.float32(merge.ternary_dot(ones, minus)) == -want


def test_compressed_merge_is_the_dense_merge():
    small, dense = packed()
    one = pick(odd(), 0)
    half = each(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), one)

    def run(w):
        options = {"scale": 0.7, "weights": w}
        want = merge.task_arithmetic(dense, **options)
        narrow = merge.ternary_sum(small, half)
        return merge.ternary_sum(small, one, **options), want, narrow

    got, want, narrow = jit(run)(jnp.array([0.5, -1.0, 2.0]))
    close(got, want, 1e-5)
    assert narrow["n"].dtype == jnp.float16


@pytest.mark.parametrize("k", [1, 2, 3, 7, 8])
def test_the_vote_counts_signs_without_unpacking(k):
    small, dense = packed(k, k)

    def run(small):
        stack = each(lambda v: v[None], merge.ternary_vote(small))
        return stack, merge.ternary_restore(stack, each(lambda v: v[:1], odd(k)))

    stack, got = jit(run)(small)
    for n, x in dense.items():
        want = np.sign(np.sign(x).sum(0)) * np.mean(small.scale[n])
        np.testing.assert_allclose(got[n][0], want, rtol=1e-6)
    if k == 1:
        close(stack, small, 0)


def test_bit_planes_of_another_tree_are_refused():
    small, _ = packed()
    wrong = odd() | {"m": jnp.zeros((3, 2, 3, 70))}
    with pytest.raises(ValueError, match=r"small\.positive differs at 'm'"):
        merge.ternary_restore(small, wrong)
    with pytest.raises(ValueError, match=r"small\.positive differs at 'm'"):
        merge.ternary_sum(small, pick(wrong, 0))
    with pytest.raises(ValueError, match="stacked on axis 0"):
        merge.ternary_vote(pick(small, 0))


def test_a_sharded_model_compresses_as_a_whole_one():
    """Words of 32 entries of a last axis that 8 devices divide."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    x = {"w": odd()["m"].reshape(3, -1)[:, :192]}

    def run(x):
        small = merge.ternary(x, density=0.5)
        pair = pick(small, 0), pick(small, 1)
        return small, merge.ternary_vote(small), merge.ternary_dot(*pair)

    close(jit(run)(jax.device_put(x, spread)), jit(run)(x))


def test_bits_train_through_the_scale():
    small, dense = packed()

    def energy(scale):
        back = merge.ternary_restore(small._replace(scale=scale), odd())
        return jnp.sum(back["m"] ** 2)

    count = np.count_nonzero(dense["m"], axis=(1, 2, 3))
    want = 2 * count * np.asarray(small.scale["m"])
    got = jit(jax.grad(energy))(small.scale)["m"]
    np.testing.assert_allclose(got, want, rtol=1e-5)


# --- the code -------------------------------------------------------------------------


@given(hnp.arrays(np.bool_, st.integers(0, 300)), st.integers(0, 3))
def test_positions_come_back(mask, spread):
    """With gaps made long by powers of 17."""
    where = np.flatnonzero(mask) * 17**spread
    b, unary, planes = _rice.encode(where)
    data = np.concatenate([np.zeros(0, np.uint8), *planes])
    assert data.size == _rice.length(where.size, b, unary)
    size = len(mask) * 17**spread
    np.testing.assert_array_equal(_rice.decode(data, where.size, b, unary, size), where)


@given(st.binary(max_size=40), *[st.integers(0, n) for n in (40, 60, 200, 2**61)])
@settings(max_examples=300)
def test_any_bytes_are_positions_or_broken(data, count, b, unary, size):
    """No bytes give positions outside the tensor, or out of order."""
    data = np.frombuffer(data, np.uint8)
    if data.size != _rice.length(count, b, unary):
        return
    try:
        where = _rice.decode(data, count, b, unary, size)
    except _rice.Broken:
        return
    assert where.size == count
    assert (np.diff(where, prepend=-1) > 0).all()
    assert where.size == 0 or where[-1] < size


def ternary_arrays():
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=20)
    signs = hnp.arrays(np.int8, shapes, elements=st.sampled_from([-1, 0, 0, 1]))
    scales = st.sampled_from([0.25, 1.0, 3.0, 2.0**-14])
    kinds = st.sampled_from([*_compeft.DTYPES])
    return st.builds(lambda x, s, d: (x * s).astype(d), signs, scales, kinds)


@given(st.lists(ternary_arrays(), max_size=3))
@settings(deadline=None, max_examples=60)
def test_any_ternary_tensors_come_back(arrays):
    tree = {f"t.{i}": x for i, x in enumerate(arrays)}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.compeft"
        io.save(path, tree)
        with io.open(path) as checkpoint:
            for name, x in tree.items():
                same(checkpoint.tensors[name].read(), x)
            assert checkpoint.tensors.keys() == tree.keys()


# --- the file -------------------------------------------------------------------------


def sparse(density, shape, dtype=np.float16, seed=0):
    """A ternary array of that density, its magnitude no power of two."""
    random = np.random.default_rng(seed)
    sign = np.where(random.random(shape) < 0.5, -1, 1)
    return (sign * (random.random(shape) < density) * 0.013).astype(dtype)


@pytest.mark.parametrize("dtype", _compeft.DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 0.9, 1.0])
def test_every_density_and_dtype_comes_back(tmp_path, density, dtype):
    tree = {"w": sparse(density, (7, 13), dtype), "b": sparse(density, (), dtype)}
    io.save(tmp_path / "a.compeft", {"layer": tree}, metadata={"of": "a test"})
    back = io.load(tmp_path / "a.compeft")["layer"]
    same(back["w"], tree["w"])
    same(back["b"], tree["b"])
    with io.open(tmp_path / "a.compeft") as checkpoint:
        assert (checkpoint.format, checkpoint.metadata) == ("compeft", {"of": "a test"})


DENSITIES = [0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.382, 0.5, 0.618, 0.8, 0.99]


@pytest.mark.parametrize("density", DENSITIES)
def test_the_file_is_within_five_per_cent_of_the_entropy(tmp_path, density):
    """The bound by the exact counts; 3 % is what the Rice code costs at its worst."""
    x = sparse(density, 2**22 if density < 0.05 else 2**18)
    path = tmp_path / "a.compeft"
    io.save(path, {"w": x})
    d = np.count_nonzero(x) / x.size
    bits = -x.size * ((1 - d) * np.log2(1 - d) + d * np.log2(d / 2)) + 16
    got = io.compression(path)
    assert got.stored == path.stat().st_size
    assert got.entropy == np.ceil(bits / 8)
    assert got.entropy < got.stored + 1
    assert got.stored <= 1.05 * got.entropy
    assert (got.entries, got.nonzero) == (x.size, np.count_nonzero(x))
    np.testing.assert_allclose(got.ratio, 2 * x.size / got.stored)


def test_a_compressed_model_is_8_to_50_times_smaller(tmp_path):
    """The paper's range of ratios, for its densities."""
    normal = np.random.default_rng(0).normal(size=(1, 512, 512))
    deltas = {"w": jnp.asarray(normal, jnp.float16)}
    squeeze = jit(lambda x, d: merge.compeft(x, density=d))
    for density, low, high in ((0.05, 40, 50), (0.2, 16, 18), (0.5, 10, 11)):
        small = pick(squeeze(deltas, density), 0)
        io.save(tmp_path / "a.compeft", small)
        assert low < io.compression(tmp_path / "a.compeft").ratio < high
        same(io.load(tmp_path / "a.compeft")["w"], small["w"])


def test_rows_and_shards_are_read_as_of_any_checkpoint(tmp_path):
    x = sparse(0.3, (16, 24), np.float32)
    io.save(tmp_path / "a.compeft", {"w": x})
    with io.open(tmp_path / "a.compeft") as checkpoint:
        tensor = checkpoint.tensors["w"]
        same(tensor[3:7], x[3:7])
        same(tensor[-1], x[-1])
        same(tensor[5:2:-1, 4], x[5:2:-1, 4])
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    back = io.load(tmp_path / "a.compeft", like={"w": x}, sharding=spread)
    same(back["w"], x)
    assert len(back["w"].sharding.device_set) == 8


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (np.array([1.0, 2.0, 0.0]), "holds 1.0 and 2.0"),
        (np.array([0.0, np.nan]), "holds nan"),
        (np.array([np.inf, -np.inf]), "holds inf"),
        (np.array([1, 0, -1]), "is int64"),
    ],
    ids=["two magnitudes", "nan", "inf", "integers"],
)
def test_what_is_not_ternary_is_refused_and_the_old_file_stays(tmp_path, x, why):
    path = tmp_path / "a.compeft"
    io.save(path, {"w": np.zeros(3)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"'layer.w' .*{why}"):
        io.save(path, {"layer": {"w": x}})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.compeft"]


def test_reserved_metadata_and_background_saves_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'compeft' is reserved"):
        io.save(tmp_path / "a.compeft", {}, metadata={"compeft": "2"})
    with pytest.raises(ValueError, match="only Orbax saves in the background"):
        io.save(tmp_path / "a.compeft", {}, wait=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file of two tensors, its bytes, and where the data begin."""
    path = tmp_path_factory.mktemp("compeft") / "a.compeft"
    io.save(path, {"a": sparse(0.2, (5, 40)), "b": sparse(0.9, 33, np.float32)})
    data = path.read_bytes()
    return data, 8 + int.from_bytes(data[:8], "little")


def read(path):
    with io.open(path) as checkpoint:
        return {name: t.read() for name, t in checkpoint.tensors.items()}


@FORMAT
def test_a_truncated_file_is_refused_at_every_length(tmp_path, whole):
    path = tmp_path / "a.compeft"
    for length in range(len(whole[0])):
        path.write_bytes(whole[0][:length])
        with pytest.raises(io.FormatError, match=r"a\.compeft"):
            read(path)


@FORMAT
def test_a_damaged_byte_is_refused_wherever_it_lies(tmp_path, whole):
    path, (data, start) = tmp_path / "a.compeft", whole
    for at in range(start, len(data)):
        for flip in (0x01, 0x80):
            path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
            with pytest.raises(io.FormatError, match=r"tensor '[ab]' at byte \d+"):
                read(path)


def forged(tensor=b"", shape=(8,), *, metadata='{"compeft":"1"}', **head):
    """A file of one tensor whose head says what it should not, its checksum right."""
    said = dict.fromkeys(("magnitude", "nonzero", "unary"), 0)
    said |= {"kind": 0, "low": 0, "rank": len(shape), "zero": 0} | head
    kinds = [said[n] for n in ("kind", "low", "rank", "zero")]
    numbers = [said[n] for n in ("magnitude", "nonzero", "unary")]
    body = struct.pack(f"<{len(shape)}Q", *shape) + tensor
    crc = zlib.crc32(body, zlib.crc32(struct.pack("<BBBBIQQQ", *kinds, 0, *numbers)))
    record = struct.pack("<BBBBIQQQ", *kinds, crc, *numbers) + body
    text = f'{{"__metadata__":{metadata},"w":{{"dtype":"U8","shape":[{len(record)}],'
    text += f'"data_offsets":[0,{len(record)}]}}}}'
    return len(text).to_bytes(8, "little") + text.encode() + record


ONE = {"magnitude": 0x3C00, "nonzero": 1, "unary": 3}  # 1.0 in float16, at entry 2
HOSTILE = {
    "dtype": (forged(kind=9), "dtype 9"),
    "low bits": (forged(low=61), "low bits 61"),
    "rank": (forged(rank=65), "rank 65"),
    "padding": (forged(zero=1), "dtype 0"),
    "no shape": (forged(rank=40), "too few for its shape"),
    "overflow": (forged(shape=(2**33, 2**33)), "beyond any memory"),
    "bomb": (forged(shape=(2**40,)), "would grow to 2199023255552: that is a bomb"),
    "magnitude": (forged(magnitude=0x7C00, nonzero=1), "no finite float16"),
    "sign": (forged(magnitude=0xBC00, nonzero=1), "no finite float16"),
    "wide": (forged(magnitude=0x13C00, nonzero=1), "no finite float16"),
    "no magnitude": (forged(nonzero=1), "1 of 8 entries are 0"),
    "no entries": (forged(magnitude=0x3C00), "0 of 8 entries are 1"),
    "too many": (forged(magnitude=0x3C00, nonzero=9), "9 of 8 entries"),
    "spare code": (forged(b"\1", unary=3), "its numbers make"),
    "short": (forged(b"\4", **ONE), "its numbers make"),
    "spare bit": (forged(b"\x14\0", **ONE), "a bit after the last"),
    "no gap": (forged(b"\0\0", **ONE), "0 gaps, 1 were announced"),
    "early end": (forged(b"\2\0", **ONE), "1 gaps, 1 were announced"),
    "spare sign": (forged(b"\4\2", **ONE), "a bit after the last"),
    "beyond": (forged(b"\4\0", (2,), **ONE), "beyond the 2 entries"),
    "far": (forged(b"\4\0\0", **ONE, low=1, shape=(3,)), "beyond the 3 entries"),
    "version": (forged(metadata='{"compeft":"2"}'), "version '2'"),
    "another": (forged(metadata='{"format":"pt"}'), "no ComPEFT file"),
}


@FORMAT
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, name):
    data, why = HOSTILE[name]
    (tmp_path / "a.compeft").write_bytes(data)
    with pytest.raises(io.FormatError, match=rf"a\.compeft: .*{why}"):
        read(tmp_path / "a.compeft")


def test_the_forger_can_write_a_good_file(tmp_path):
    (tmp_path / "a.compeft").write_bytes(forged(b"\4\1", **ONE))
    want = np.array([0, 0, -1, 0, 0, 0, 0, 0], np.float16)
    same(read(tmp_path / "a.compeft")["w"], want)
    assert ml_dtypes.bfloat16 in _compeft.DTYPES


def test_other_records_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    io.save(path, {"w": np.zeros(9, np.uint8)}, metadata={"compeft": "1"})
    path.rename(tmp_path / "a.compeft")
    with pytest.raises(io.FormatError, match="9 bytes are too few"):
        io.open(tmp_path / "a.compeft")
    io.save(path, {"w": np.zeros((9, 9), np.int8)}, metadata={"compeft": "1"})
    path.rename(tmp_path / "a.compeft")
    with pytest.raises(io.FormatError, match="a vector of U8"):
        io.open(tmp_path / "a.compeft")


def test_merging_from_files_is_merging_in_memory(tmp_path):
    dense = jit(lambda x: merge.compeft(x, density=0.3))(stacked(2))
    for i in range(2):
        io.save(tmp_path / f"{i}.compeft", pick(dense, i))
    back = [io.load(tmp_path / f"{i}.compeft") for i in range(2)]
    stack = each(lambda *xs: jnp.stack(xs), *back)
    merged = jit(lambda x: merge.ties(x, density=1.0))
    close(merged(stack), merged(dense), 0)
