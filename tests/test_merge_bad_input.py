"""What does not fit is refused with the name of the leaf, argument or option."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import merge

each = jax.tree.map
KEY = jax.random.key(0)


def model(*lead, dtype="float32", width=4):
    wide = {"a": {"w": np.ones((*lead, 3, width), dtype)}}
    return wide | {"b": np.ones((*lead, 4), np.float32)}


STACK, ONE = model(2), model()
BATCHES = np.ones((1, 2), np.float32)
loss = lambda p, batch: jnp.sum(p["b"]) * jnp.sum(batch)
apply = lambda p, x: x @ p["a"]["w"]
TUNED = {"method": merge.task_arithmetic, "loss": loss}
WEIGHTS, SGD = {"weights": jnp.ones(2)}, optax.sgd(1.0)
TWO = {
    # method -> a call of its two trees, what fits, and what the second is called
    "fisher": (merge.fisher, (STACK, STACK), "fishers"),
    "svc": (merge.svc, (STACK, ONE), "merged"),
    "tall_masks": (merge.tall_masks, (STACK, ONE), "merged"),
    "trust_region": (merge.trust_region, (STACK, STACK), "sensitivity"),
    "fuse": (merge.fuse, (STACK, STACK), "agree"),
    "task_vectors": (merge.task_vectors, (STACK, ONE), "base"),
    "on_base": (merge.on_base(merge.ties), (STACK, ONE), "base"),
    "add": (lambda d, b: merge.add(b, d), (ONE, ONE), "base"),
    "opcm_step": (
        lambda d, like: merge.opcm_step(merge.opcm_init(like), d), (ONE, ONE), "like"),
    "rws": (merge.rws, (STACK, ONE), "standard"),
    "adamerging": (
        lambda m, b: merge.adamerging(m, np.ones((1, 2, 3)), base=b, apply=apply),
        (STACK, ONE), "base"),
    "atlas": (
        lambda m, b: merge.atlas(m, BATCHES, base=b, loss=loss), (STACK, ONE), "base"),
    "frank_wolfe": (
        lambda m, b: merge.frank_wolfe(m, BATCHES, loss=loss, base=b),
        (STACK, ONE), "base"),
    "learn": (
        lambda m, b: merge.learn(
            m, BATCHES, base=b, coefficients=WEIGHTS, optimiser=SGD, **TUNED),
        (STACK, ONE), "base"),
    "score": (
        lambda m, b: merge.score(
            m, BATCHES, base=b, coefficients={"weights": jnp.ones((1, 2))}, **TUNED),
        (STACK, ONE), "base"),
    "search": (
        lambda m, b: merge.search(
            m, BATCHES, base=b, coefficients=WEIGHTS, generations=1, key=KEY, **TUNED),
        (STACK, ONE), "base"),
}  # fmt: skip


DEFECTS = {
    # a change of a tree, and what the error says of it
    "a leaf less": (lambda t: {"a": t["a"]}, "(no|extra) leaf 'b'"),
    "a wider leaf": (lambda t: model(*t["b"].shape[:-1], width=5), "differs at 'a/w'"),
    "integers": (lambda t: model(*t["b"].shape[:-1], dtype="int32"),
                 "{}.*'a/w' of dtype int32"),
}  # fmt: skip


PAIRS = [(name, defect) for name in TWO for defect in DEFECTS]
PAIRS.remove(("fuse", "integers"))  # a mask of any dtype selects where it is not 0


@pytest.mark.parametrize(("name", "defect"), PAIRS)
def test_a_second_tree_that_does_not_fit_is_named(name, defect):
    call, (first, second), called = TWO[name]
    change, message = DEFECTS[defect]
    with pytest.raises(ValueError, match=message.format(called)):
        call(first, change(second))


@pytest.mark.parametrize("name", TWO)
def test_a_first_tree_that_does_not_fit_is_named(name):
    """Integers, and leaves that disagree on the number of models."""
    call, (first, second), _ = TWO[name]
    bad = DEFECTS["integers"][0](first)
    with pytest.raises(ValueError, match=r"(models|deltas?) has.*'a/w' of dtype int32"):
        call(bad, second)
    if first is STACK:
        with pytest.raises(ValueError, match=r"differs at 'b': 3 models.*expected 2"):
            call(STACK | {"b": np.ones((3, 4), np.float32)}, second)


@pytest.mark.parametrize("name", [n for n, row in TWO.items() if row[1][1] is STACK])
def test_another_number_of_models_is_named(name):
    call, (first, _), called = TWO[name]
    with pytest.raises(ValueError, match=rf"{called} differs at.*a/w.*\(3, 3, "):
        call(first, model(3))


SMALL = {
    "bitdelta": (merge.bitdelta, merge.bitdelta_restore, STACK),
    "ternary": (ft.partial(merge.ternary, density=0.5), merge.ternary_restore, STACK),
    "tsv_c": (merge.tsv_c, merge.tsv_expand, ONE),
    "rws_quantize": (ft.partial(merge.rws_quantize, bits=4), merge.rws_dequantize, ONE),
}


@pytest.mark.parametrize("name", SMALL)
def test_what_is_compressed_is_not_restored_to_another_tree(name):
    shrink, restore, like = SMALL[name]
    small = jax.eval_shape(shrink, STACK)
    restore = ft.partial(jax.eval_shape, restore)
    assert each(np.shape, restore(small, like)) == each(np.shape, STACK)
    with pytest.raises(ValueError, match=r"(no|extra) leaf 'b'"):
        restore(small, {"a": like["a"]})
    with pytest.raises(ValueError, match="'a/w'"):
        restore(small, model(*like["b"].shape[:-1], width=40))


OPTIONS = {
    # what is said -> a call with that option out of range
    "alpha must be above 0": lambda: merge.svc(STACK, alpha=0.0),
    "alpha of 'b' must be in": lambda: merge.opcm(
        STACK, alpha={"a": {"w": 0.5}, "b": 1.5}),
    "scale must be finite": lambda: merge.iso_c(STACK, scale=np.inf),
    "scale has shape": lambda: merge.tsv_m(STACK, scale=[0.5, 0.5]),
    "scale of 'a/w' has shape": lambda: merge.anisotropic(
        STACK, scale={"a": {"w": np.ones(3)}, "b": 1.0}),
    "fraction must be in": lambda: merge.tsv_c(STACK, fraction=0.0),
    "common must be in": lambda: merge.iso_cts(STACK, common=-0.1),
    "steps must be at least 0": lambda: merge.wudi(STACK, steps=-1),
    "learning_rate must be finite": lambda: merge.wudi(STACK, learning_rate=np.nan),
    "subspace must be at least 1 and steps": lambda: merge.doge_ta(STACK, steps=-1),
    "density must be": lambda: merge.compeft(STACK, density=0.0),
    "quantile must be in": lambda: merge.trust_region(STACK, quantile=np.nan),
    "power must be at least 0": lambda: merge.delta_guided(STACK, power=-1.0),
    "per must be 'entry'": lambda: merge.delta_guided(STACK, per="row"),
    "per must be 'leaf' or": lambda: merge.bitdelta(STACK, per="row"),
    "votes must be at least 0": lambda: merge.consensus_ta(STACK, votes=-1),
    "threshold must be": lambda: merge.tall_masks(STACK, threshold=-1.0),
    "alpha must be finite": lambda: merge.compeft(STACK, density=0.5, alpha=np.nan),
    "an alpha by leaf needs": lambda: merge.compeft(
        STACK, density=0.5, alpha={"a": {"w": 1.0}, "b": 2.0}),
    "bits must be from 1 to 16": lambda: merge.rws_quantize(STACK, bits=17),
    "floor of 'b' must be": lambda: merge.fisher(
        STACK, STACK, floor={"a": {"w": 0.0}, "b": -1.0}),
    "weights has shape": lambda: merge.fisher(STACK, STACK, weights=np.ones(3)),
    "period must be": lambda: merge.periodic(merge.linear, period=0),
    "parts must be": lambda: merge.random_parts(ONE, parts=0, key=KEY),
    "per must be 'model' or 'leaf'": lambda: merge.frank_wolfe(
        STACK, BATCHES, loss=loss, per="layer"),
    "top must be in 1 to 2": lambda: merge.frank_wolfe(
        STACK, BATCHES, loss=loss, top=3),
    "epochs must be": lambda: merge.atlas(
        STACK, BATCHES, base=ONE, loss=loss, epochs=0),
}  # fmt: skip


@pytest.mark.parametrize("message", OPTIONS)
def test_an_option_out_of_range_is_named(message):
    with pytest.raises(ValueError, match=message):
        OPTIONS[message]()
