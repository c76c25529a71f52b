"""Claims of papers on the embedded digits, over seeds: the interval excludes the null.

The claims on larger data are experiments, whose records `test_records.py` reads. OPCM
and task arithmetic against the average are such: on four tasks of digits and five seeds
they are not told apart (-0.4 and +2.8 points, intervals of 1.6 and 2.9).
"""

import functools as ft

import jax
import numpy as np
import pytest

from jaxlab import align, data, experiment, measure, nn, rewrite, tree

TASKS = ("digits", "digits/rotate90", "digits/invert", "digits/noise2")
SEEDS = 5
EFFORT = experiment.Effort((0.2, 0.4, 0.6, 1.0), 60)
BETTER = [
    # method, than
    ("fisher", "average"),
    ("regmean", "average"),
    ("regmean", "fisher"),
    ("atlas", "task_arithmetic"),
    ("tsv_c", "atlas"),
    ("emr", "atlas"),
]


@pytest.fixture(scope="module")
def accuracies():
    """The mean accuracy over tasks of each merge that is compared, by seed."""
    methods = {n: m for kind in experiment.MERGES.values() for n, m in kind.items()}
    names = {n for pair in BETTER for n in pair}
    out = {n: [] for n in names}
    for seed in range(SEEDS):
        key = jax.random.key(seed)
        setting = experiment.experts(TASKS, key=key, width=64, steps=150, rate=1e-3)
        for name in names:
            found = methods[name](setting, EFFORT, jax.random.fold_in(key, 1))
            if isinstance(found, list):
                out[name].append(experiment.own(setting, tree.stack(found)).mean())
            else:
                out[name].append(experiment.accuracies(setting, found).mean())
    return out


def exceeds(one, other):
    mean, half = experiment.interval(np.array(one) - np.array(other))
    return mean - half > 0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "than"), BETTER)
def test_one_merge_beats_another(accuracies, method, than):
    assert exceeds(accuracies[method], accuracies[than]), accuracies


@pytest.mark.slow
def test_matching_removes_most_of_the_barrier():
    """Between two nets from two seeds, on the training images."""
    before, after = [], []
    init, apply = nn.mlp((64, 64, 10))
    score = lambda p, x, y: experiment.cross_entropy(apply(p, x), y)
    for seed in range(SEEDS):
        x, y = data.load("digits", seed=seed).train
        x = x.reshape(len(x), -1)
        keys = jax.random.split(jax.random.key(seed), 2)
        nets = [experiment.fit(score, init(k), (x, y), key=k, steps=300) for k in keys]
        loss = ft.partial(lambda x, y, p: score(p, x, y), x, y)
        groups = rewrite.symmetries(apply, nets[0], x[:1])
        units = align.weight_matching(*nets, groups, key=jax.random.key(seed))
        moved = rewrite.permute(nets[1], groups, units)
        before.append(float(measure.barrier(loss, *nets)))
        after.append(float(measure.barrier(loss, nets[0], moved)))
    assert exceeds(np.array(before) / 2, after)
