"""Every merge method as a function of one setting: what a table runs over."""

from collections.abc import Callable, Sequence
import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import measure, merge, rewrite, tree
from . import _examples
from ._experts import Experts
from ._fit import cross_entropy


class Effort(NamedTuple):
    """What a method may spend where it searches or learns."""

    scales: Sequence[float]  # factors of a merged task vector, chosen by a few labels
    steps: int  # of methods that learn coefficients


Method = Callable[..., Any]
"""`(setting, effort, key) -> model`, or a list with one model for each task."""


def _folded(method: Callable[..., Any], *, share: bool = True) -> Method:
    """A method of two models over all of them: the i-th joins with the share 1 / i."""

    def run(s: Experts, *_: Any) -> Any:
        first, *others = tree.unstack(s.models)
        for i, other in enumerate(others, 2):
            first = method(tree.stack([first, other]), **{"t": 1 / i} if share else {})
        return first

    return run


def _models(method: Callable[..., Any]) -> Method:
    """A merge of models."""
    return lambda s, *_: jax.jit(method)(s.models)


def _deltas(method: Callable[..., Any], **options: Any) -> Method:
    """A merge of task vectors, on the base by the factor that a few labels choose."""

    def run(s: Experts, effort: Effort, key: jax.Array) -> Any:
        more = options | ({"key": key} if "key" in options else {})
        compiled = jax.jit(ft.partial(method, **more))
        merged = compiled(merge.task_vectors(s.models, s.base))
        return _examples.scaled(s, merged, effort.scales)[0]

    return run


def _each_on_its_own(s: Experts, statistic: Callable[..., Any], count: int) -> Any:
    """A statistic of every expert on its own task, a mean over examples, stacked."""
    found = []
    for i, model in enumerate(tree.unstack(s.models)):
        x = jnp.asarray(s.data[i].train.x[:count])
        value = statistic(lambda p, x, i=i: s.apply(p, x, i), model, x)
        found.append(tree.scale(value, 1 / len(x)))
    return tree.stack(found)


def _fisher(s: Experts, *_: Any) -> Any:
    """With the exact diagonal, on 200 images of each task."""
    exact = ft.partial(measure.fisher, batch_size=50)
    return merge.fisher(s.models, _each_on_its_own(s, exact, 200))


def _regmean(s: Experts, *_: Any) -> Any:
    """With the Gram matrices of the inputs of every kernel, on 400 images of each."""
    gram = ft.partial(measure.gram, where=tree.glob("**/kernel"))
    grams = _each_on_its_own(s, gram, 400)
    used = rewrite.uses(lambda p, x: s.apply(p, x, 0), s.base, s.data[0].train.x[:1])
    return merge.regmean(s.models, grams, uses=used)


def _regmean_plusplus(s: Experts, *_: Any) -> Any:
    """The same images, layer by layer through what is merged so far."""
    each = [[(d.train.x[:400], np.full(400, i))] for i, d in enumerate(s.data)]
    apply, kernels = jax.jit(s.apply), tree.glob("**/kernel")
    return merge.regmean_plusplus(apply, s.models, each, where=kernels)


def _adamerging(per: Any) -> Method:
    """Coefficients of least entropy on unlabelled images."""

    def run(s: Experts, effort: Effort, key: jax.Array) -> Any:
        x, _, task = _examples.batches(s, effort.steps, key=key)
        apply = lambda p, batch: s.apply(p, *batch)
        found = merge.adamerging(s.models, (x, task), base=s.base, apply=apply, per=per)
        return found.params

    return run


def _labelled(method: Callable[..., Any]) -> Method:
    """A method that takes a loss on labelled images."""

    def run(s: Experts, effort: Effort, key: jax.Array) -> Any:
        batches = _examples.batches(s, effort.steps, key=key)
        loss = ft.partial(_examples.loss, s)
        return method(s.models, batches, base=s.base, loss=loss).params

    return run


def _greedy_soup(s: Experts, *_: Any) -> Any:
    """Experts that add to the accuracy on a few labels."""
    right = jax.jit(lambda p: _examples.right(s, p, _examples.examples(s, 100)))
    return merge.greedy_soup(s.models, score=right)[0]


def _learned_soup(s: Experts, effort: Effort, key: jax.Array) -> Any:
    """Mixing weights by leaf, from labels."""
    batches = _examples.batches(s, effort.steps, key=key)
    apply = lambda p, batch: s.apply(p, batch[0], batch[2])
    loss = lambda logits, batch: cross_entropy(logits, batch[1])
    soup = merge.learned_soup(s.models, batches, apply=apply, loss=loss, per="leaf")
    return soup.params


def _restored(small: Callable[[Any, Any], Any]) -> Method:
    """A method that keeps a part for every task, from `(deltas, one) -> [k, *leaf]`."""

    def run(s: Experts, *_: Any) -> list[Any]:
        stacked = small(merge.task_vectors(s.models, s.base), s.base)
        return [merge.add(s.base, delta) for delta in tree.unstack(stacked)]

    return run


def _emr(deltas: Any, _: Any) -> Any:
    """One task vector, with a mask and a factor for each task."""
    parts = merge.emr(deltas)
    k = len(parts.rescalers)
    return tree.stack([merge.emr_task(parts, i) for i in range(k)])


def _tall(deltas: Any, _: Any) -> Any:
    """The sum of the task vectors, under each task's mask."""
    merged = merge.task_arithmetic(deltas)
    masks = merge.tall_masks(deltas, merged)
    return jax.tree.map(lambda m, x: m * x, masks, merged)


def _compeft(s: Experts, *_: Any) -> list[Any]:
    """Signs of a fifth of each task vector, at the height its own labels choose."""
    signs = merge.compeft(merge.task_vectors(s.models, s.base), density=0.2)
    found = []
    for i, (delta, d) in enumerate(zip(tree.unstack(signs), s.data, strict=True)):
        x, y = (jnp.asarray(v[-100:]) for v in d.train)
        few = (x, y, jnp.full(100, i))
        models = [merge.add(s.base, delta, scale=h) for h in (1.0, 2.0, 3.0, 4.0, 6.0)]
        found.append(max(models, key=lambda m, few=few: _examples.right(s, m, few)))
    return found


_drop = {"key": None, "density": 0.2}
_rank = {"key": None, "density": 0.5, "epsilon": 0.2}
_crumbs = {"density": 0.9, "gamma": 0.01}
MERGES: dict[str, dict[str, Method]] = {
    "without data": {
        "average": _models(merge.average),
        "multislerp": _models(merge.multislerp),
        "karcher": _models(merge.karcher),
        "slerp": _folded(merge.slerp),
        "nearswap": _folded(merge.nearswap),
        "arcee_fusion": _folded(merge.arcee_fusion, share=False),
        "task_arithmetic": _deltas(merge.task_arithmetic),
        "ties": _deltas(merge.ties),
        "dare_linear": _deltas(merge.dare_linear, **_drop),
        "dare_ties": _deltas(merge.dare_ties, **_drop),
        "della": _deltas(merge.della, **_rank),
        "della_linear": _deltas(merge.della_linear, **_rank),
        "breadcrumbs": _deltas(merge.breadcrumbs, **_crumbs),
        "breadcrumbs_ties": _deltas(merge.breadcrumbs_ties, **_crumbs),
        "sce": _deltas(merge.sce),
        "ram": _deltas(merge.ram),
        "ramplus_tl": _deltas(merge.ramplus_tl),
        "model_stock": _deltas(merge.model_stock),
        "magmax": _deltas(merge.magmax),
        "delta_guided": _deltas(merge.delta_guided),
        "consensus_ta": _deltas(merge.consensus_ta),
        "consensus_ties": _deltas(merge.consensus_ties),
        "tsv_m": _deltas(merge.tsv_m),
        "iso_c": _deltas(merge.iso_c),
        "iso_cts": _deltas(merge.iso_cts),
        "knots": _deltas(merge.knots),
        "svc": _deltas(merge.svc),
        "wudi": _deltas(merge.wudi),
        "doge_ta": _deltas(merge.doge_ta),
        "trust_region": _deltas(merge.trust_region),
        "opcm": _deltas(merge.opcm),
    },
    "with unlabelled images": {
        "regmean": _regmean,
        "regmean_plusplus": _regmean_plusplus,
        "fisher": _fisher,
        "adamerging by task": _adamerging("model"),
        "adamerging by leaf": _adamerging("leaf"),
    },
    "with labels": {
        "greedy_soup": _greedy_soup,
        "learned_soup": _learned_soup,
        "frank_wolfe": _labelled(merge.frank_wolfe),
        "atlas": _labelled(merge.atlas),
    },
    "with a part kept for each task": {
        "emr": _restored(_emr),
        "tall_masks": _restored(_tall),
        "bitdelta": _restored(
            lambda deltas, _: merge.bitdelta_restore(merge.bitdelta(deltas), deltas)
        ),
        "compeft": _compeft,
        "tsv_c": _restored(
            lambda deltas, one: merge.tsv_expand(merge.tsv_c(deltas), one)
        ),
    },
}
"""Every merge method by kind and name, as a function of a setting."""
