"""Small transformers adapted side by side, as the lowrank claims measure them."""

import jax
import numpy as np

from jaxlab import data, experiment, lowrank, measure, tree

KEYS = jax.random.split(jax.random.key(0), 2)
KERNELS = "layers/**/kernel"


def test_seeds_and_rates_train_side_by_side_and_the_head_is_new():
    with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
        apply, bases = experiment.pretrained(
            ("digits",), keys=KEYS, steps=2, width=8, depth=1, patch=4, heads=2
        )
        task = data.load("digits/rotate90")
        where = tree.glob(KERNELS)
        grams = [
            measure.gram(apply, base, task.train.x[:8], where=where)
            for base in tree.unstack(bases)
        ]
        out = experiment.adaptation(
            apply,
            bases,
            {KERNELS: lowrank.corda(rank=2)},
            task,
            keys=KEYS,
            steps=3,
            rates=(0.0, 1e-2),
            batch=8,
            statistics=tree.stack(grams),
        )
        still = experiment.adaptation(
            apply,
            bases,
            {KERNELS: lowrank.full()},
            task,
            keys=KEYS,
            steps=2,
            rates=(0.0,),
            head_rate=1e-2,
            batch=8,
        )
    sides = 4 * (8 + 8) + 2 * (8 + 32)  # of four projections and the MLP's two
    assert out.trained == 2 * sides
    assert out.accuracies.shape == (2,)
    assert out.rate in (0.0, 1e-2)
    assert out.bases["head"]["kernel"].shape == (2, 8, 10)
    a = out.states["layers/up/kernel"]["a"]
    assert a.shape == (2, 1, 8, 2)
    assert not np.array_equal(a[0], a[1])
    assert np.abs(still.states["head/kernel"]["w"]).max() > 0
    kernel = still.states["layers/up/kernel"]["w"]
    np.testing.assert_array_equal(kernel, still.bases["layers"]["up"]["kernel"])
    x = task.test.x[:5]
    run = lambda adapted, base, state: adapted(base, state, x)
    logits = jax.vmap(run)(out.adapted, out.bases, out.states)
    assert logits.shape == (2, 5, 10)
    assert np.isfinite(logits).all()
