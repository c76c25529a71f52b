"""What the merge methods refuse, and odd shapes that they do not."""

from cases import MERGE, stacked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge

KEY = jax.random.key(7)


SHAPES = [(), (1,), (8, 1), (8, 1, 4), (0,), (3, 0)]


@pytest.mark.parametrize(
    "name", [n for n, c in MERGE.items() if len(c.data("f4", 0)) == 1]
)
def test_any_shape_is_a_leaf(name):
    case = MERGE[name]
    k = case.data("float32", 0)[0]["a"].shape[0]
    struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    key = {"key": KEY} if case.random else {}
    leaves = [struct((k, *shape)) for shape in SHAPES]
    out = jax.eval_shape(lambda x: case.fn(x, **case.coefficients, **key), leaves)
    assert [v.shape for v in out] in (SHAPES, [(k, *shape) for shape in SHAPES])


def test_rows_of_one_entry_stay_with_the_density():
    """mergekit's DELLA fails on (8, 1) and (8, 1, 4)."""
    x = [jnp.ones((2, 8, 1)), jnp.ones((2, 8, 1, 4)), jnp.ones((2,))]
    for v in merge.drop_by_rank(x, density=0.5, epsilon=0.4, key=KEY):
        assert set(np.unique(v)) <= {0.0, 2.0}


BAD = {
    "density": [0, -0.1, 1.5, float("nan"), [0.5, 0.5], "x"],
    "weights": [float("nan"), float("inf"), [1.0, 2.0], [[1.0]], None],
}


@pytest.mark.parametrize("keyword", BAD)
@pytest.mark.parametrize("name", ["ties", "dare_linear", "breadcrumbs_ties", "della"])
def test_bad_coefficients_are_named(name, keyword):
    key = {"key": KEY} if MERGE[name].random else {}
    for value in BAD[keyword]:
        with pytest.raises(ValueError, match=keyword):
            getattr(merge, name)(stacked(3), **{keyword: value}, **key)


def test_bad_options_are_named():
    x, pair = stacked(3), stacked(2)
    bad = [
        (lambda: merge.linear(x, weights=[1.0, 0.0, -1.0]), "weights sum to 0"),
        (lambda: merge.task_arithmetic(x, weights=0.0, normalize=True), "sum to 0"),
        (lambda: merge.karcher(x, weights=0.0), "sum to 0"),
        (lambda: merge.slerp(x, t=0.5), "3 models, expected 2"),
        (lambda: merge.passthrough(pair), "2 models, expected 1"),
        (lambda: merge.slerp(pair, t=[0.1, 0.2]), "t has shape"),
        (lambda: merge.slerp(pair, t=0.5, threshold=0), "threshold"),
        (lambda: merge.nearswap(pair, t=-1.0), "t must be at least 0"),
        (lambda: merge.ties(x, per="row"), "per must be"),
        (lambda: merge.ties(x, consensus="sum"), "consensus must be"),
        (lambda: merge.elect(x, by="max"), "by must be"),
        (lambda: merge.fuse(x, mean="median"), "mean must be"),
        (lambda: merge.drop(x, density=0.5, rescale="l2", key=KEY), "rescale must be"),
        (
            lambda: merge.della(x, density=0.2, epsilon=0.2, key=KEY),
            "density - epsilon",
        ),
        (lambda: merge.trim_outliers(x, density=0.5, gamma=1.0), "gamma must be"),
        (lambda: merge.karcher(x, max_iter=-1), "max_iter"),
        (lambda: merge.ram(x, threshold=-1.0), "threshold"),
        (lambda: merge.sce(x, eps=-1.0), "eps"),
        (lambda: merge.model_stock(x, eps=-1.0), "eps"),
        (lambda: merge.trim(x, density={"a": 0.1, "b": {"c": 0.2}}), "per='leaf'"),
        (
            lambda: merge.linear(x, weights={"a": 1.0, "b": {"c": float("nan")}}),
            "'b/c'",
        ),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_trees_are_named():
    whole = {"a": jnp.ones((2, 3)), "ids": jnp.ones((2, 3), jnp.int32)}
    with pytest.raises(ValueError, match="'ids' of dtype int32"):
        merge.ties(whole)
    with pytest.raises(ValueError, match="'b': 3 models"):
        merge.linear({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="models differs at 'w': shape \\(3,\\)"):
        merge.on_base(merge.ties)({"w": jnp.ones((2, 3))}, {"w": jnp.ones(4)})
    with pytest.raises(ValueError, match="delta has no leaf"):
        merge.add({"w": jnp.ones(4)}, {})
