"""The merges of matrices, streamed: vectors, experts, convolutions, two dtypes.

Leaves of two axes are in test_stream.
"""

import errno
import functools as ft

from corpus.reading import listing
import jax
import numpy as np
import pytest

from jaxlab import io, merge
from jaxlab.io import _job, _safetensors

SHAPES = {
    "a/bias": ((5,), "float32"),
    "b/experts": ((2, 5, 4), "float32"),
    "b/conv": ((2, 1, 3, 4), "bfloat16"),
}
NAMED = {"axes": {"b/conv": "nnmb", "b/e*": "bmn"}}
METHODS = {
    "tsv_m": ft.partial(merge.tsv_m, fraction=0.5, scale=0.7, **NAMED),
    "iso_c": ft.partial(merge.iso_c, scale=0.7),
    "iso_cts": ft.partial(merge.iso_cts, common=0.3, axes="mn"),
    "svc": ft.partial(merge.svc, alpha=0.8),
    "wudi": ft.partial(merge.wudi, steps=3, learning_rate=0.02, **NAMED),
    "knots": ft.partial(
        merge.knots, method=ft.partial(merge.ties, density=0.6), **NAMED
    ),
    "opcm": ft.partial(merge.opcm, alpha=0.4, axes="mn"),
    "trust_region": ft.partial(merge.trust_region, quantile=0.7),
    "doge_ta": ft.partial(
        merge.doge_ta, steps=2, density=0.6, learning_rate=0.02, subspace=2, scale=1.0
    ),
}


def nested(flat):
    out = {}
    for path, x in flat.items():
        outer, inner = path.split("/")
        out.setdefault(outer, {})[inner] = x
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models, as files and as trees."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = {n: rng.standard_normal(s) for n, (s, _) in SHAPES.items()}
    paths, trees = [], []
    for name in ("base", "0", "1", "2"):
        moved = {n: x + (name != "base") * rng.standard_normal(x.shape)
                 for n, x in base.items()}  # fmt: skip
        cast = {n: x.astype(SHAPES[n][1]) for n, x in moved.items()}
        trees.append(nested(cast))
        paths.append(folder / f"{name}.safetensors")
        io.save(paths[-1], trees[-1])
    return paths, trees


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Half the time to compile, for files as for memory."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def streamed(name, models, out, **more):
    (base, *paths), _ = models
    return io.stream(METHODS[name], paths, out, base=base, shard_size=64, **more)


@pytest.mark.parametrize("name", METHODS)
def test_streamed_is_in_memory(name, models, tmp_path):
    streamed(name, models, tmp_path / "out")
    got = io.load(tmp_path / "out")
    base, *others = models[1]
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *others)
    want = jax.jit(merge.on_base(METHODS[name]))(stacked, base)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, (shape, dtype) in SHAPES.items():
        outer, inner = path.split("/")
        x, y, b = (v[outer][inner] for v in (got, want, base))
        assert (x.shape, x.dtype) == (shape, np.dtype(dtype)), path
        x, y, b = (np.asarray(v, np.float64) for v in (x, y, b))
        unit = 8e-3 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(x, y, rtol=unit, atol=1e-5, err_msg=path)
        assert np.mean(np.abs(x - y) > 1e-5) < 0.1, path  # the roundings at a tie
        assert np.abs(x - b).max() > 0.05, path


def test_an_interrupted_merge_resumes_to_the_bit(models, tmp_path, monkeypatch):
    """Where every leaf depends on all, and two shards were finished."""
    name = "opcm"
    want = streamed(name, models, tmp_path / "want").files
    assert "model-00003-of-00003.safetensors" in want
    left, whole = iter(range(2)), _safetensors.safetensors_writer

    def full(*args):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))
        return whole(*args)

    monkeypatch.setattr(_job, "safetensors_writer", full)
    with pytest.raises(OSError, match="No space left"):
        streamed(name, models, tmp_path / "out")
    monkeypatch.undo()
    report = streamed(name, models, tmp_path / "out", resume=True)
    assert report.files == want
    assert len(report.resumed) == 2
    assert listing(tmp_path / "out") == listing(tmp_path / "want")
