"""Frank-Wolfe merging against the theory of Frank-Wolfe."""

from cases import close, model, stacked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import merge, tree

each = jax.tree.map
ONE = jnp.zeros((1, 1))


def to(target):
    """Half the squared distance: of curvature 1."""

    def loss(params, batch):
        parts = each(lambda a, b: jnp.sum((a - b) ** 2) / 2, params, target)
        return sum(jax.tree.leaves(parts)) + 0.0 * jnp.sum(batch)

    return loss


INSIDE = {"a": [0.5, 0.3, 0.2], "b": {"c": [0.1, 0.0, 0.9]}}
INSIDE = {"a": jnp.array(INSIDE["a"]), "b": {"c": jnp.array(INSIDE["b"]["c"])}}


@pytest.mark.parametrize("per", ["model", "leaf"])
def test_converges_at_the_rate_of_the_theory(per):
    """f(x_t) - f* <= 2 L D^2 / (t + 2), on a target inside the hull."""
    weights = INSIDE if per == "leaf" else each(lambda _: INSIDE["a"], INSIDE)
    target = merge.linear(stacked(3), weights=weights)
    got = merge.frank_wolfe(stacked(3), ONE, loss=to(target), per=per, epochs=400)
    flat = [
        jnp.stack([v.reshape(3, -1) for v in [x]])[0]
        for x in jax.tree.leaves(stacked(3))
    ]
    apart = [
        jnp.max(jnp.sum((v[:, None] - v[None]) ** 2, -1)) for v in flat
    ]  # per leaf: the diameter of a product
    t = np.arange(1, 400)
    bound = 2 * float(sum(apart)) / (t + 2)
    assert (np.asarray(got.losses[1:]) <= bound).all()
    assert got.losses[-1] < 1e-3 * got.losses[0]
    found = got.coefficients
    close(found, weights if per == "leaf" else INSIDE["a"], 0.02)
    close(got.params, merge.linear(stacked(3), weights=found), 1e-5)


def test_the_first_step_goes_to_the_best_corner():
    """That of the least inner product with the gradient, from any base."""
    base, target = model(seed=50), each(lambda v: v[1], stacked(3))
    got = merge.frank_wolfe(stacked(3), ONE, loss=to(target), base=base)
    slope = jax.grad(to(target))(base, ONE)
    products = [tree.dot(slope, m) for m in tree.unstack(stacked(3))]
    best = int(np.argmin(products))
    close(got.coefficients, jax.nn.one_hot(best, 3), 0)
    close(got.params, tree.unstack(stacked(3))[best], 1e-6)
    np.testing.assert_allclose(got.losses[0], to(target)(base, ONE), rtol=1e-6)


def test_a_smaller_scale_keeps_the_rest_of_the_base():
    base, target = model(seed=50), each(lambda v: v[1], stacked(3))
    got = merge.frank_wolfe(
        stacked(3), ONE, loss=to(target), base=base, scale=0.1, epochs=3
    )
    rest = np.prod([1 - 0.1 * 2 / (t + 2) for t in range(3)])
    np.testing.assert_allclose(1 - got.coefficients.sum(), rest, rtol=1e-6)
    inner = merge.task_arithmetic(stacked(3), weights=got.coefficients)
    close(got.params, each(lambda v, b: v + rest * b, inner, base), 1e-5)


def test_the_soft_variant_shares_a_step():
    target = merge.average(stacked(3))
    far = each(lambda v: v + 10.0, target)
    got = merge.frank_wolfe(stacked(3), ONE, loss=to(far), top=2)
    products = each(
        lambda v, f, s: jnp.sum(v * (s - f)[None], (1, 2)), stacked(3), far, target
    )
    order = np.argsort(sum(jax.tree.leaves(products)))
    want = np.isin(np.arange(3), order[:2]) / 2
    close(got.coefficients, want)
    all_three = merge.frank_wolfe(stacked(3), ONE, loss=to(far), top=3, epochs=4)
    close(all_three.params, target, 1e-6)


def test_one_model_and_narrow_models():
    one = stacked(1, "bfloat16")
    got = merge.frank_wolfe(one, ONE, loss=lambda p, _: jnp.sum(p["a"] ** 2))
    close(got.params, each(lambda v: v[0], one), 0)
    assert {v.dtype.name for v in jax.tree.leaves(got.params)} == {"bfloat16"}


def test_iterators_and_stacked_batches_agree():
    noise = jax.random.normal(jax.random.key(0), (6, 3, 8))
    loss = lambda p, b: jnp.sum((p["a"] - b) ** 2) + jnp.sum(p["b"]["c"] * b)
    want = merge.frank_wolfe(stacked(3), noise, loss=loss, per="leaf")
    got = merge.frank_wolfe(stacked(3), iter(noise), loss=loss, per="leaf")
    close(got, want, 1e-5)


def test_refuses_bad_options():
    loss = to(model())
    for bad, message in (
        ({"per": "layer"}, "per must be"),
        ({"top": 4}, "top must be in 1 to 3"),
        ({"scale": 0.0}, "scale in"),
        ({"base": {"a": jnp.zeros(3)}}, "models"),
    ):
        with pytest.raises(ValueError, match=message):
            merge.frank_wolfe(stacked(3), ONE, loss=loss, **bad)
