"""Kernels against their references, without hardware: interpreted, and lowered."""

import functools as ft
import itertools

import jax
from jax.experimental import pallas as pl, topologies
from jax.experimental.pallas import tpu
import jax.numpy as jnp
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)
import numpy as np
import pytest

from jaxlab import kernels, tree
from jaxlab.kernels import _kth_magnitude, _trim_elect_merge
from jaxlab.kernels._agreement import How

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
DEVICES = {
    "cuda": AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"),
    "tpu": AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu"),
}
CALLS = {"cuda": "__gpu$xla.gpu.triton", "tpu": "tpu_custom_call"}
OPTIONS = list(itertools.product(("weighted", "raw"), ("weight", "count", "none")))
# JAX 0.11 announces that Pallas will drop Triton, whenever it lowers to it.
TRITON = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend:DeprecationWarning"
)
# Two cores, so that the grid axes declared parallel do run beside each other.
RACES = {"detect_races": True, "num_cores_or_threads": 2}


def lowered(fn, *shapes, platform):
    """The program that `fn` lowers to for a platform that is not here."""
    mesh = AbstractMesh(
        (1,), ("_",), (AxisType.Auto,), abstract_device=DEVICES[platform]
    )
    with use_abstract_mesh(mesh):
        traced = jax.jit(fn).trace(*shapes)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def rows(m, n, dtype, seed=0):
    """Gaussian rows with many repeated magnitudes and some zeros."""
    x = np.random.default_rng(seed).normal(size=(m, n))
    x[:, ::3] = np.round(x[:, ::3], 1)
    return jnp.asarray(x, dtype)


def sorted_kth(x, k):
    """The k-th largest magnitude by numpy's sort."""
    size = np.sort(np.abs(np.asarray(x, np.float32)), axis=1)[:, ::-1]
    return size[np.arange(len(size)), np.asarray(k) - 1]


@ft.partial(jax.jit, static_argnames="platform")
def interpreted_kth(x, k, platform):
    """`kth_magnitude` by the kernel of that platform, interpreted."""
    op = {"cuda": _kth_magnitude._gpu, "tpu": _kth_magnitude._tpu}[platform]
    with jax.enable_x64(True):
        rank = jnp.broadcast_to(k.astype(jnp.int64), x.shape[:1])
    key = op(x, rank, interpret=True).astype(_kth_magnitude._word(x))
    return jax.lax.bitcast_convert_type(key, x.dtype).astype(jnp.float32)


# A row shorter than any block, one that ends with a chunk, one that does not.
ROWS = [(1, 1, jnp.float32), (3, 5, jnp.float16)]
ROWS += [(2, 65536, jnp.bfloat16), (2, 70001, jnp.float32)]


@pytest.mark.parametrize(("m", "n", "dtype"), ROWS)
def test_kth_magnitude_is_exact(m, n, dtype):
    x = rows(m, n, dtype)
    op = jax.jit(kernels.kth_magnitude)
    for k in {1, n // 3 + 1, n}:
        ranks = np.clip(k - np.arange(m), 1, n)
        want = sorted_kth(x, ranks)
        np.testing.assert_array_equal(op(x, ranks), want)
        like = tree.kth_largest(jnp.abs(x), ranks, stacked=True)
        np.testing.assert_array_equal(like, want)
        for platform in DEVICES:
            np.testing.assert_array_equal(interpreted_kth(x, ranks, platform), want)


@pytest.mark.parametrize("use", ["reference", "pallas"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_magnitude_degenerate(dtype, use):
    """Rank 0 and below, rank beyond n, zeros, infinity and NaN, as `tree` has them."""
    x = jnp.asarray([[0.0, -0.0, 1, -1], [0, -jnp.inf, 2, jnp.nan]], dtype)
    op = jax.jit(ft.partial(kernels.kth_magnitude, use=use))
    for k in (-1, 0, 1, 2, 3, 4, 5, 2**31 - 1):
        got = op(x, k)
        want = tree.kth_largest(jnp.abs(x), k, stacked=True)
        np.testing.assert_array_equal(got, want)
    assert kernels.kth_magnitude(jnp.zeros((2, 0), dtype), [0, 1]).tolist() == [
        np.inf,
        0,
    ]


def test_kth_magnitude_separates_neighbouring_bits():
    """Every digit decides: keys that differ in one bit, at every bit."""
    keys = np.array([[1 << i for i in range(31)]], np.int32)
    x = jnp.asarray(keys.view(np.float32))
    for k, platform in itertools.product((1, 2, 9, 17, 31), DEVICES):
        got = np.asarray(interpreted_kth(x, jnp.asarray(k), platform))
        assert got.view(np.int32) == np.sort(keys)[0, -k]


def test_kth_magnitude_transforms():
    """Under jit with a traced rank, vmap, and grad (that of a constant)."""
    x, ranks = rows(6, 300, jnp.float32).reshape(3, 2, 300), jnp.asarray([1, 7, 300])
    for use in ("auto", "pallas"):
        op = jax.jit(jax.vmap(ft.partial(kernels.kth_magnitude, use=use)))
        want = [sorted_kth(x[i], [int(k)] * 2) for i, k in enumerate(ranks)]
        np.testing.assert_array_equal(op(x, ranks), np.stack(want))
        loss = lambda x, use=use: kernels.kth_magnitude(x[0], 3, use=use).sum()
        np.testing.assert_array_equal(jax.grad(loss)(x), np.zeros(x.shape))


def test_counts_pass_32_bits():
    """The descent adds chunks in 64 bits: 3 x 2^30 entries in one bin."""
    counts = np.zeros((1, 3, 16), np.int32)
    counts[0, :, 5] = 2**30
    counts[0, 1, 9] = 7
    for rank, digit, left in ((7, 9, 7), (8, 5, 1), (3 * 2**30 + 7, 5, 3 * 2**30)):
        with jax.enable_x64(True):
            args = jnp.asarray(counts), jnp.asarray([2], jnp.int32), jnp.asarray([rank])
        prefix, rest = _kth_magnitude._descend(*args)
        assert (int(prefix[0]), int(rest[0])) == (2 * 16 + digit, left)


def stack(shape, dtype, seed=0):
    """(models, cutoffs, weights, base): exact cancellations and zeros included."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    x.reshape(shape[0], -1)[:, ::5] = np.round(x.reshape(shape[0], -1)[:, ::5])
    weights = rng.uniform(0.2, 1, shape[0])
    if shape[0] > 2:
        weights[1] *= -1
    cut = rng.uniform(0.2, 0.8, shape[0])
    cast = lambda v, t=jnp.float32: jnp.asarray(v, t)
    return (
        cast(x, dtype),
        cast(cut),
        cast(weights),
        cast(rng.normal(size=shape[1:]), dtype),
    )


def plain(x, cut, w, base, elect, divide):
    """The docstring's formula, entry by entry in numpy."""
    x = np.asarray(x, np.float32)
    origin = 0 if base is None else np.asarray(base, np.float32)
    d = x - origin
    per = lambda v: np.asarray(v).reshape(-1, *[1] * (d.ndim - 1))
    d = np.where(np.abs(d) >= per(cut), d, 0)
    votes = per(w) * d if elect == "weighted" else d
    sign = np.where(votes.sum(0) >= 0, 1, -1)
    agree = np.sign(votes) == sign
    below = {"weight": (agree * per(w)).sum(0), "count": agree.sum(0), "none": 1}[
        divide
    ]
    below = np.where(np.abs(below) < 1e-8, 1, below)
    return origin + (agree * per(w) * d).sum(0) / below


@ft.partial(jax.jit, static_argnames=("platform", "how"))
def interpreted_merge(platform, how, *args):
    """`trim_elect_merge` by the kernel of that platform, interpreted."""
    op = {"cuda": _trim_elect_merge._gpu, "tpu": _trim_elect_merge._tpu}[platform]
    return op(how, *args, interpret=True)


@pytest.mark.parametrize(("elect", "divide"), OPTIONS)
@pytest.mark.parametrize("with_base", [False, True])
def test_trim_elect_merge_formula(elect, divide, with_base):
    *args, base = stack((5, 40, 7), jnp.float32)
    base = base if with_base else None
    got = kernels.trim_elect_merge(*args, base=base, elect=elect, divide=divide)
    want = plain(*args, base, elect, divide)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


SHAPES = [(1, 1), (2, 7), (3, 17, 130), (4, 1030), (5, 2, 3, 8, 16)]
SHAPES += [(6, 35, 300), (7, 2048), (8, 16, 256), (33, 5, 3)]
# Every option with and without a base, in turn.
STACKS = [
    (shape, DTYPES[i // 3 % 2], How(*OPTIONS[(2 * i + j) % 6]), (i + j) % 2)
    for i, shape in enumerate(SHAPES)
    for j in range(2)
]
STACKS += [((3, 17, 130), jnp.float16, How("weighted", "weight"), True)]


@pytest.mark.parametrize(("shape", "dtype", "how", "with_base"), STACKS)
def test_trim_elect_merge_kernels_equal_reference(shape, dtype, how, with_base):
    """Bit for bit: the kernels and the reference share the formula and its order."""
    args = stack(shape, dtype)[: 4 if with_base else 3]
    want = jax.jit(ft.partial(_trim_elect_merge._reference, how))(*args)
    assert want.dtype == dtype
    assert want.shape == shape[1:]
    for platform in DEVICES:
        got = interpreted_merge(platform, how, *args)
        np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize(("elect", "divide"), OPTIONS)
def test_trim_elect_merge_gradient(elect, divide):
    """The closed form equals JAX's own derivative of the reference."""
    x, cut, w, base = stack((3, 5, 9), jnp.float32)
    slope = jnp.asarray(np.random.default_rng(1).normal(size=(5, 9)), jnp.float32)

    def loss(x, w, base, use):
        option = {"elect": elect, "divide": divide, "use": use}
        return (slope * kernels.trim_elect_merge(x, cut, w, base=base, **option)).sum()

    slopes = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)
    want = slopes(x, w, base, "reference")
    for use in ("auto", "pallas"):
        got = slopes(x, w, base, use)
        for g, h in zip(got, want, strict=True):
            assert np.abs(h).max() > 0
            np.testing.assert_allclose(g, h, rtol=1e-5, atol=1e-5)


def test_trim_elect_merge_gradient_where_weights_cancel():
    """A sum of weights below 1e-8 divides by one, and is no function of them."""
    x = jnp.asarray([[1.0, 2.0], [-3.0, 2.0]])
    loss = lambda w, use: kernels.trim_elect_merge(x, 0.0, w, use=use).sum()
    w = jnp.asarray([0.5, -0.5])  # both agree on entry 0; neither minority elsewhere
    assert float(kernels.trim_elect_merge(x, 0.0, w)[0]) == 2.0
    grads = [jax.grad(loss)(w, use) for use in ("auto", "reference")]
    np.testing.assert_allclose(*grads, rtol=1e-6)


def test_trim_elect_merge_transforms():
    """Under jit and vmap over stacks and weights."""
    x, cut, w, base = stack((3, 40), jnp.float32)
    xs, ws = jnp.stack([x, -2 * x]), jnp.stack([w, w[::-1]])
    for use in ("auto", "pallas"):
        op = lambda x, w, use=use: kernels.trim_elect_merge(
            x, cut, w, base=base, use=use
        )
        want = [op(x, w) for x, w in zip(xs, ws, strict=True)]
        np.testing.assert_array_equal(jax.jit(jax.vmap(op))(xs, ws), jnp.stack(want))


def test_trim_elect_merge_degenerate():
    nothing = kernels.trim_elect_merge(jnp.ones((2, 3)), jnp.inf, 1.0)
    np.testing.assert_array_equal(nothing, np.zeros(3))
    cancel = jnp.asarray([[1.0, jnp.nan], [-1.0, 2.0]])
    np.testing.assert_array_equal(kernels.trim_elect_merge(cancel, 0.5, 1.0), [1, 2])
    assert kernels.trim_elect_merge(jnp.ones((2, 0)), 1.0, 1.0, use="pallas").shape == (
        0,
    )
    ties = jnp.asarray([[1.0, -2.0, 1.0, 0.5]])  # kept with the k-th, as `tree` has it
    cut = kernels.kth_magnitude(ties, 2)
    np.testing.assert_array_equal(
        kernels.trim_elect_merge(ties, cut, 1.0), [1.0, -2.0, 1.0, 0.0]
    )
    many = kernels.trim_elect_merge(jnp.ones((65, 3)), 0.5, 2.0, divide="none")
    np.testing.assert_array_equal(many, np.full(3, 130.0))


def test_no_races(capfd):
    """Grid steps declared parallel, on two simulated TPU cores, share no write."""
    mode = tpu.InterpretParams(**RACES)
    x, base, shift = rows(2, 4096, jnp.bfloat16), jnp.zeros(2, jnp.int32), 11
    args = x.reshape(2, 32, 128), base, jnp.asarray([shift])
    got = _kth_magnitude._histogram_tpu(mode, *args)
    digits = (np.asarray(x).view(np.int16) & 0x7FFF) >> shift
    want = [[np.bincount(d, minlength=16)] for d in digits]
    np.testing.assert_array_equal(got, want)
    *args, base = stack((3, 20, 300), jnp.float32)
    got = _trim_elect_merge._tpu(How("raw", "count"), *args, base, interpret=mode)
    want = plain(*args, base, "raw", "count")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_races_are_seen(capfd):
    """The check above can fail: two cores that write one block are reported."""

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    call = pl.pallas_call(
        kernel,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda _: (0, 0)),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=tpu.InterpretParams(**RACES),
    )
    said = ""
    try:
        call(jnp.ones((16, 128))).block_until_ready()
    except jax.errors.JaxRuntimeError as error:  # newer JAX raises, older prints
        said = str(error)
    assert "RACE DETECTED" in said + "".join(capfd.readouterr())


@TRITON
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_magnitude_lowers(platform, dtype):
    for m, n in ((1, 5), (8, 2**22 + 77), (1, 2**30)):
        x, k = (
            jax.ShapeDtypeStruct((m, n), dtype),
            jax.ShapeDtypeStruct((m,), jnp.int32),
        )
        program = lowered(kernels.kth_magnitude, x, k, platform=platform)
        assert CALLS[platform] in program
        assert CALLS[platform] not in lowered(
            ft.partial(kernels.kth_magnitude, use="reference"), x, k, platform=platform
        )


@TRITON
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trim_elect_merge_lowers(platform, dtype):
    """Forward and gradient; TPU has no float16 and takes the reference there."""
    has_kernel = (platform, dtype) != ("tpu", jnp.float16)
    for shape in ((1, 7), (64, 2**20), (3, 1001, 300), (8, 4096, 4096)):
        x = jax.ShapeDtypeStruct(shape, dtype)
        base = jax.ShapeDtypeStruct(shape[1:], dtype)
        w = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
        op = lambda x, w, base: kernels.trim_elect_merge(
            x, w, w, base=base, divide="count"
        )
        program = lowered(op, x, w, base, platform=platform)
        assert (CALLS[platform] in program) == has_kernel
    loss = lambda *args: op(*args).astype(jnp.float32).sum()
    assert lowered(jax.grad(loss, (0, 1, 2)), x, w, base, platform=platform)


def test_lowering_sees_bad_kernels():
    """The two tests above can fail: a block that TPU cannot tile is refused."""

    def bad(x):
        spec = pl.BlockSpec((8, 50), lambda i: (i, 0))
        shape = jax.ShapeDtypeStruct((64, 250), jnp.float32)
        kernel = lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...])
        call = pl.pallas_call(
            kernel, grid=(8,), in_specs=[spec], out_specs=spec, out_shape=shape
        )
        return call(x)

    with pytest.raises(ValueError, match="divisible by 8 and 128"):
        lowered(bad, jax.ShapeDtypeStruct((64, 250), jnp.float32), platform="tpu")


def test_compiles_for_tpu(monkeypatch):
    """Ahead of time for a v5e, which alone sees VMEM overflow and unloadable types."""
    pytest.importorskip("libtpu", reason="the TPU compiler: pip install jax[tpu]")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2"
    ).devices
    mesh = Mesh(np.array(chips)[:1], ("_",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    kind = AbstractDevice(device_kind=chips[0].device_kind, num_cores=1, platform="tpu")
    abstract = AbstractMesh((1,), ("_",), (AxisType.Auto,), abstract_device=kind)
    kth = lambda x: kernels.kth_magnitude(x, 7, use="pallas")
    merge = lambda x: kernels.trim_elect_merge(x, 0.5, 1.0, base=x[0], use="pallas")
    cases = [(kth, (1, 5)), (kth, (3, 4097)), (kth, (2, 2**22))]
    cases += [(merge, (1, 7)), (merge, (8, 4096, 4096)), (merge, (64, 1001, 300))]
    for (fn, shape), dtype in itertools.product(cases, DTYPES):
        with use_abstract_mesh(abstract):
            program = jax.jit(fn, in_shardings=place, out_shardings=place)
            assert program.lower(jax.ShapeDtypeStruct(shape, dtype)).compile()


def test_long_rows_take_the_reference():
    """Kernel indices are 32-bit: 2^31 entries a row and more are left to XLA."""
    x = jax.ShapeDtypeStruct((1, 2**31), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1,), jnp.int32)
    for platform, call in CALLS.items():
        assert call not in lowered(kernels.kth_magnitude, x, k, platform=platform)
        merge = lambda x: kernels.trim_elect_merge(x, 0.5, 1.0)
        assert call not in lowered(merge, x, platform=platform)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.kth_magnitude(jnp.ones(3), 1),
            r"x must be \[m, n\], got shape",
        ),
        (lambda: kernels.kth_magnitude(jnp.ones((1, 3), jnp.int32), 1), "got int32"),
        (lambda: kernels.kth_magnitude(jnp.ones((1, 3)), 1, use="gpu"), "got 'gpu'"),
        (lambda: kernels.trim_elect_merge(jnp.ones(3), 0, 1), r"\[k, \*leaf\]"),
        (lambda: kernels.trim_elect_merge(jnp.ones((0, 3)), 0, 1), r"k >= 1"),
        (lambda: kernels.trim_elect_merge(jnp.ones((2, 3)) > 0, 0, 1), "got bool"),
        (
            lambda: kernels.trim_elect_merge(
                jnp.ones((2, 3)), 0, 1, base=jnp.ones((2, 3))
            ),
            r"base is \(2, 3\), expected \(3,\)",
        ),
        (
            lambda: kernels.trim_elect_merge(jnp.ones((2, 3)), 0, 1, elect="first"),
            "elect must be",
        ),
        (
            lambda: kernels.trim_elect_merge(jnp.ones((2, 3)), 0, 1, divide="mean"),
            "divide must be",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
