"""Low-rank kernels against plain sums, without hardware: interpreted, and lowered."""

import functools as ft

import jax
from jax.experimental.pallas import tpu
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import CALLS, DEVICES, RACES, TRITON, lowered

from jaxlab import kernels
from jaxlab.kernels import _grouped_matmul, _lowrank_matmul

ONE = {"cuda": _lowrank_matmul._gpu, "tpu": _lowrank_matmul._tpu}
GROUPED = {"cuda": _grouped_matmul.by_gpu, "tpu": _grouped_matmul.by_tpu}
# In blocks of 16: less than one, whole ones, and several of every side with a rest.
SHAPES = [(5, 7, 9, 2), (16, 32, 48, 16), (40, 35, 50, 3)]
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def small_blocks(monkeypatch):
    for module in (_lowrank_matmul, _grouped_matmul):
        for side in ("ROWS", "COLUMNS", "DEPTH"):
            monkeypatch.setattr(module, f"_GPU_{side}", 16)
            monkeypatch.setattr(module, f"_TPU_{side}", 16)


def normal(seed, *shape, dtype=jnp.float32):
    x = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(x / np.sqrt(shape[-2]), dtype)


def operands(t, n, m, r, k=None, dtype=jnp.float32):
    lead = () if k is None else (k,)
    shapes = (t, n), (n, m), (*lead, n, r), (*lead, r, m)
    return [normal(i, *s, dtype=dtype) for i, s in enumerate(shapes)]


def ids_of(t, k, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, k, t), jnp.int32)


def plain(x, w, a, b, scale, ids=None):
    """Row by row, in float64."""
    x, w, a, b = (np.asarray(v, np.float64) for v in (x, w, a, b))
    if ids is None:
        return x @ w + scale * x @ a @ b
    each = [x[i] @ a[j] @ b[j] for i, j in enumerate(np.asarray(ids))]
    return x @ w + scale * np.stack(each)


def close(got, want, tolerance=1e-5):
    scale = np.abs(np.asarray(want, np.float64)).max()
    gap = np.asarray(got, np.float64) - np.asarray(want, np.float64)
    assert np.abs(gap).max() <= tolerance * scale


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("small_blocks")
def test_lowrank_matmul_is_its_formula(shape, platform, flip):
    """Forward, and by the transposes as in the backward pass."""
    x, w, a, b = operands(*shape)
    run = jit(ft.partial(ONE[platform], 1.5, flip, interpret=True))
    if flip:
        g = normal(9, shape[0], shape[2])
        close(run(g, w, b, a), plain(g, w.T, b.T, a.T, 1.5))
    else:
        close(run(x, w, a, b), plain(x, w, a, b, 1.5))
        close(kernels.lowrank_matmul(x, w, a, b, scale=1.5), plain(x, w, a, b, 1.5))


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize(
    ("t", "n", "m", "k"), [(5, 7, 9, 3), (16, 32, 32, 1), (40, 35, 50, 30)]
)
@pytest.mark.usefixtures("small_blocks")
def test_grouped_products_are_those_of_each_row(t, n, m, k, platform):
    """Adapters that end inside blocks, that fill them, and that no row has."""
    x, stack = normal(0, t, n), normal(1, k, n, m)
    run = jit(ft.partial(GROUPED[platform], interpret=True))
    for ids in (ids_of(t, k), jnp.zeros(t, jnp.int32), jnp.full(t, k - 1, jnp.int32)):
        ids = jnp.sort(ids)
        want = np.stack([np.asarray(x[i]) @ stack[j] for i, j in enumerate(ids)])
        close(run(x, stack, ids), want)
        close(jit(_grouped_matmul.grouped)(x, stack, ids), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("use", ["reference", "pallas"])
def test_many_adapters_in_any_order(use, dtype):
    args, ids = operands(21, 8, 12, 3, 6, dtype=dtype), ids_of(21, 6)
    run = jit(ft.partial(kernels.many_lowrank_matmul, scale=0.5, use=use))
    got = run(*args, ids)
    assert got.dtype == dtype
    close(got, plain(*args, 0.5, ids), 4 * float(jnp.finfo(dtype).eps))
    outside = jnp.where(ids == 0, -3, jnp.where(ids == 5, 99, ids))
    np.testing.assert_array_equal(run(*args, outside), got)


@pytest.mark.parametrize("many", [False, True])
def test_gradients_are_those_of_the_reference(many):
    """The closed forms equal JAX's own derivative, for all four operands."""
    args = operands(19, 6, 10, 2, 4 if many else None)
    op = kernels.lowrank_matmul
    if many:
        op = lambda *args, **how: kernels.many_lowrank_matmul(
            *args, ids_of(19, 4), **how
        )
    slope = normal(7, 19, 10)

    def loss(args, use):
        return jnp.sum(slope * jnp.sin(op(*args, scale=1.5, use=use)))

    slopes = jit(jax.grad(loss), static_argnums=1)
    want = slopes(args, "reference")
    for use in ("auto", "pallas"):
        for got, expected in zip(slopes(args, use), want, strict=True):
            assert np.abs(expected).max() > 0
            close(got, expected, 2e-5)


def test_the_half_precisions_and_vmap():
    for dtype in (jnp.bfloat16, jnp.float16):
        args = operands(5, 8, 12, 3, dtype=dtype)
        got = jit(ft.partial(kernels.lowrank_matmul, use="pallas"))(*args)
        assert got.dtype == dtype
        close(got, plain(*args, 1), 4 * float(jnp.finfo(dtype).eps))
    x, w, a, b = operands(5, 8, 12, 3)
    xs, bs = jnp.stack([x, -2 * x]), jnp.stack([b, 3 * b])
    op = ft.partial(kernels.lowrank_matmul, use="pallas")
    got = jit(jax.vmap(op, (0, None, None, 0)))(xs, w, a, bs)
    close(got[1], plain(xs[1], w, a, bs[1], 1))


@pytest.mark.usefixtures("small_blocks")
def test_no_races(capfd):
    """Grid steps declared parallel, on two simulated TPU cores, share no write."""
    mode = tpu.InterpretParams(**RACES)
    x, w, a, b = operands(20, 4, 8, 2)
    got = _lowrank_matmul._tpu(1.5, False, x, w, a, b, interpret=mode)
    close(got, plain(x, w, a, b, 1.5))
    x, stack, ids = normal(0, 20, 4), normal(1, 2, 4, 20), jnp.arange(20) // 12
    got = _grouped_matmul.by_tpu(x, stack, ids, mode)
    close(got, _grouped_matmul.grouped(x, stack, ids))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@TRITON
@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lowers(platform, dtype):
    """Forward and gradient; TPU has no float16 and takes the reference there."""
    has_kernel = (platform, dtype) != ("tpu", jnp.float16)
    for t, n, m, r, k in ((8192, 4096, 4096, 16, 64), (150, 600, 7, 5, 9)):
        shape = lambda *s, dtype=dtype: jax.ShapeDtypeStruct(s, dtype)
        one = shape(t, n), shape(n, m), shape(n, r), shape(r, m)
        many = (*one[:2], shape(k, n, r), shape(k, r, m), shape(t, dtype=jnp.int32))
        for op, args in (
            (kernels.lowrank_matmul, one),
            (kernels.many_lowrank_matmul, many),
        ):
            run = ft.partial(op, use="auto")
            loss = lambda *args, run=run: run(*args).astype(jnp.float32).sum()
            program = lowered(run, *args, platform=platform)
            assert (CALLS[platform] in program) == has_kernel
            slopes = jax.grad(loss, (0, 2, 3))
            assert lowered(slopes, *args, platform=platform).count(CALLS[platform]) >= (
                program.count(CALLS[platform])
            )
            assert CALLS[platform] not in lowered(op, *args, platform=platform)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 4))}, "do not fit"),
        ({"w": jnp.ones((3, 5))}, "do not fit"),
        ({"b": jnp.ones((2, 2, 4))}, "do not fit|must be matrices|have shapes"),
        ({"a": jnp.ones((3, 1), jnp.bfloat16)}, "a is bfloat16, but x is|have shapes"),
        ({"x": jnp.ones((2, 3), jnp.int32)}, "got int32"),
        ({"use": "gpu"}, "got 'gpu'"),
        ({"ids": jnp.ones(2)}, "ids must be integers, got float32"),
    ],
)
def test_bad_arguments(change, message):
    x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
    good = {"x": x, "w": w, "a": jnp.ones((3, 1)), "b": jnp.ones((1, 4))}
    if "ids" not in change:
        with pytest.raises(ValueError, match=message):
            kernels.lowrank_matmul(**good | change)
    good = {n: v if n in "xw" else v[None] for n, v in good.items()}
    good["ids"] = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=message):
        kernels.many_lowrank_matmul(**good | change)


def test_degenerate_shapes_take_the_reference():
    for t, n, m, r in ((0, 3, 4, 1), (2, 3, 4, 0)):
        x, w = jnp.ones((t, n)), jnp.ones((n, m))
        a, b = jnp.ones((n, r)), jnp.ones((r, m))
        got = kernels.lowrank_matmul(x, w, a, b, use="pallas")
        np.testing.assert_allclose(got, x @ w + (x @ a) @ b)
        ids = jnp.zeros(t, jnp.int32)
        many = kernels.many_lowrank_matmul(x, w, a[None], b[None], ids, use="pallas")
        np.testing.assert_allclose(many, got)
