"""Statistics of batches on several devices, in several processes, and in parts."""

import functools as ft
import os
from pathlib import Path
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from jaxlab import measure

each = jax.tree.map
jit = ft.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RNG = np.random.default_rng(0)
PARAMS = {
    "in": RNG.standard_normal((4, 6), np.float32),
    "layers": RNG.standard_normal((2, 6, 6), np.float32) / 3,
    "out": RNG.standard_normal((6, 3), np.float32),
}
X = RNG.standard_normal((16, 2, 4), np.float32) + 1  # examples, positions, features
LABELS = RNG.integers(0, 3, (16, 2))
# How the mesh of axes d and t divides them: batch and sequence, and units of a layer.
PLACES = {"in": (None, "t"), "layers": (None, "t"), "out": ("t",)}


def apply(p, x):
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    return jax.lax.scan(layer, x @ p["in"], p["layers"])[0] @ p["out"]


def loss(p, x):
    return jnp.sum(jnp.sin(apply(p, x)))


def key():
    return jax.random.key(3)


STATISTICS = {
    "gram": lambda p, x, y: measure.gram(apply, p, x),
    "covariance": lambda p, x, y: measure.covariance(apply, p, x),
    "fisher": lambda p, x, y: measure.fisher(apply, p, x),
    "monte carlo": lambda p, x, y: measure.fisher_monte_carlo(
        apply, p, x, samples=2, key=key()
    ),
    "empirical": lambda p, x, y: measure.fisher_empirical(apply, p, x, labels=y),
    "trace": lambda p, x, y: measure.hessian_trace(loss, p, x, samples=2, key=key()),
}
names = pytest.mark.parametrize("name", STATISTICS)


def close(a, b, tolerance=2e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        size = np.abs(y).max(initial=1)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * size)


@ft.cache
def compiled(name):
    return jit(STATISTICS[name])


@ft.cache
def whole(name):
    return compiled(name)(PARAMS, X, LABELS)


def halves():
    return [(X[i], LABELS[i]) for i in (slice(0, 16, 3), np.arange(16) % 3 != 0)]


# --- devices


@names
def test_divided_batches_sequences_and_weights_agree(name):
    """Four by two devices: none of them holds a whole row, sequence or weight."""
    mesh = jax.make_mesh((4, 2), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {n: put(v, *PLACES[n]) for n, v in PARAMS.items()}
    x, labels = put(X, "d", "t"), put(LABELS, "d", "t")
    assert x.addressable_shards[0].data.shape == (4, 1, 4)
    assert params["layers"].addressable_shards[0].data.shape == (2, 3, 6)
    close(compiled(name)(params, x, labels), whole(name))


WORKER = r"""
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, out, names = int(sys.argv[1]), *sys.argv[2:4], sys.argv[4:]
jax.distributed.initialize(
    f"127.0.0.1:{port}", num_processes=2, process_id=rank,
    heartbeat_timeout_seconds=10, shutdown_timeout_seconds=5,
)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_measure_sharded import LABELS, PARAMS, STATISTICS, X, jit
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
rows, one = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("d",), ()))
own = slice(8 * rank, 8 * rank + 8)  # the other half is not there
data = [jax.make_array_from_process_local_data(rows, v[own]) for v in (X, LABELS)]
assert not data[0].is_fully_addressable
params = jax.device_put(PARAMS, one)
found = {}
for name in names:
    got = jit(STATISTICS[name], out_shardings=one)(params, *data)
    for i, leaf in enumerate(jax.tree.leaves(got)):
        found[f"{name} {i}"] = np.asarray(leaf.addressable_data(0))
np.savez(f"{out}/{rank}.npz", **found)
jax.distributed.shutdown()
"""


def test_two_processes_with_half_of_the_data_each_agree(tmp_path: Path):
    picked = ["gram", "fisher"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # More threads than cores: forced host devices deadlock otherwise.
    more = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    more |= {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "32"}
    more |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), port, str(tmp_path), *picked],
            env=os.environ | more,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=100)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for name in picked:
            for i, leaf in enumerate(jax.tree.leaves(whole(name))):
                close(found[f"{name} {i}"], np.asarray(leaf))


# --- parts


def test_uneven_batches_add_up():
    parts = [jit(STATISTICS["gram"])(PARAMS, *half) for half in halves()]
    close(each(jnp.add, *parts), whole("gram"))


def test_moments_of_uneven_batches_are_pooled():
    """Leaf by leaf, and layer by layer within a scan."""
    parts = [jit(STATISTICS["covariance"])(PARAMS, *half) for half in halves()]
    pooled = {path: measure.pool(*(p[path] for p in parts)) for path in PARAMS}
    close(pooled, whole("covariance"))
    naive = each(lambda a, b: (a + b) / 2, *parts)
    assert np.abs(naive["in"].mean - pooled["in"].mean).max() > 0.005


@pytest.mark.parametrize(("name", "size"), [
    ("fisher", 5), ("empirical", 1), ("monte carlo", 40),
])  # fmt: skip
def test_the_size_of_microbatches_changes_nothing(name, size):
    """One that leaves a rest, one alone, more than there are."""
    call = {
        "fisher": measure.fisher,
        "empirical": ft.partial(measure.fisher_empirical, labels=LABELS),
        "monte carlo": ft.partial(measure.fisher_monte_carlo, samples=2, key=key()),
    }[name]
    got = jit(ft.partial(call, apply, batch_size=size))(PARAMS, X)
    close(got, whole(name))
