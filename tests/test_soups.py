"""Model soups: greedy, learned, and the path from zero-shot to fine-tuned."""

from cases import close, model, stacked
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import merge

each = jax.tree.map


def normal(*shape, seed=0):
    """Float32 draws that cost no compilation."""
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


# --- greedy ------------------------------------------------------------------------


def by_table(table):
    """A score of models `eye(k)`: what the table says of the set that was averaged."""
    seen = []

    def score(params):
        inside = tuple(np.flatnonzero(np.asarray(params["w"]) > 1e-6).tolist())
        seen.append(inside)
        return table[sum(2**i for i in inside)]

    return score, seen


def greedy_by_hand(table, k, keep_ties):
    """Recipe 1 of the paper, on sets."""
    value = lambda chosen: table[sum(2**i for i in chosen)]
    order = sorted(range(k), key=lambda i: -value([i]))
    chosen = order[:1]
    for i in order[1:]:
        new, old = value([*chosen, i]), value(chosen)
        if new > old or (keep_ties and new == old):
            chosen.append(i)
    return chosen


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=16, max_size=16), st.booleans())
def test_greedy_soup_is_never_worse_than_its_best_ingredient(table, keep_ties):
    """Over any score of any subset, ties included."""
    score, seen = by_table(table)
    soup, chosen = merge.greedy_soup(
        {"w": np.eye(4, dtype=np.float32)}, score=score, keep_ties=keep_ties
    )
    assert list(chosen) == greedy_by_hand(table, 4, keep_ties)
    assert score(soup) >= max(table[2**i] for i in range(4))
    close(soup["w"], np.isin(np.arange(4), chosen) / len(chosen))
    assert len(seen) == 2 * 4 - 1 + 1


def test_greedy_soup_returns_the_very_model_it_scored():
    """In bfloat16 too: what is rounded was scored rounded."""
    models = each(lambda v: v.astype(jnp.bfloat16), stacked(5))
    target = model(seed=9)
    tasted = []

    def score(params):
        tasted.append(params)
        square = each(lambda a, b: jnp.sum((a - b) ** 2), params_wide(params), target)
        return -sum(jax.tree.leaves(square))

    params_wide = lambda p: each(lambda v: v.astype(jnp.float32), p)
    soup, chosen = merge.greedy_soup(models, score=score)
    assert len(chosen) > 1
    assert any(p is soup for p in tasted)
    assert {v.dtype.name for v in jax.tree.leaves(soup)} == {"bfloat16"}
    mean = each(lambda v: v.astype(jnp.float32)[np.array(chosen)].mean(0), models)
    close(soup, each(lambda v: v.astype(jnp.bfloat16), mean), 4e-3)


def test_greedy_soup_of_one_and_of_unscorable_models():
    one, chosen = merge.greedy_soup(stacked(1), score=lambda _: 0.0)
    close(one, each(lambda v: v[0], stacked(1)), 0)
    assert chosen == (0,)
    assert merge.greedy_soup(stacked(3), score=lambda _: np.nan)[1] == (0,)
    wanted = stacked(3)["a"][1]
    only = lambda p: 1.0 if np.array_equal(p["a"], wanted) else np.nan
    assert merge.greedy_soup(stacked(3), score=only)[1] == (1,)
    with pytest.raises(ValueError, match="only floating-point"):
        merge.greedy_soup({"w": jnp.arange(3)}, score=lambda _: 0.0)


# --- learned -----------------------------------------------------------------------

X = normal(40, 8, 3)


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]["c"].T


def teacher(shares, beta):
    """Batches labelled by a soup of known shares and temperature."""
    soup = merge.linear(stacked(3), weights=shares)
    return jax.vmap(lambda x: (x, beta * apply(soup, x)))(X)


@pytest.mark.parametrize("per", ["model", "leaf"])
def test_learned_soup_finds_shares_and_temperature(per):
    shares = {"a": jnp.array([0.6, 0.3, 0.1]), "b": {"c": jnp.array([0.1, 0.2, 0.7])}}
    if per == "model":
        shares = each(lambda _: shares["a"], shares)
    got = merge.learned_soup(
        stacked(3),
        teacher(shares, 1.5),
        apply=lambda p, batch: apply(p, batch[0]),
        loss=lambda logits, batch: jnp.mean((logits - batch[1]) ** 2),
        per=per,
        epochs=20,
    )
    weights = merge.by_leaf(got.coefficients["weights"], stacked(3), per=per)
    close(weights, shares, 1e-3)
    np.testing.assert_allclose(got.coefficients["temperature"], 1.5, rtol=1e-3)
    close(got.params, merge.linear(stacked(3), weights=weights), 1e-5)
    uniform = jax.vmap(lambda x: apply(merge.average(stacked(3)), x))(X[:1])
    first = jnp.mean((uniform - teacher(shares, 1.5)[1][:1]) ** 2)
    np.testing.assert_allclose(got.losses[0], first, rtol=1e-5)


def test_learned_soup_of_one_model_keeps_it():
    got = merge.learned_soup(
        stacked(1),
        X[:2],
        apply=apply,
        loss=lambda y, x: jnp.sum(y**2),
        optimiser=optax.sgd(0.1),
    )
    close(got.params, each(lambda v: v[0], stacked(1)), 0)
    with pytest.raises(ValueError, match="per must be"):
        merge.learned_soup(stacked(1), X, apply=apply, loss=jnp.sum, per="column")
