"""Executes a plan in memory, as plainly as possible."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import merge, recipe, tree
from jaxlab.io._inputs import inputs


def execute(plan, models, seed=0):
    """The tensors of the result, by name."""
    return {step.name: run(step, models, seed) for step in plan.steps}


def run(step, models, seed=0):
    tensors, base = inputs(step, models)
    arrays = [t.read() for t in tensors]
    if step.method is None:
        for other in arrays[1:]:
            np.testing.assert_array_equal(other, arrays[0])
        return arrays[0].astype(step.out_dtype)
    path = "w"  # one path, so that equal tensors share a compiled function
    random = recipe.takes_key(step.method)
    more = {"key": jax.random.key(seed)} if random else {}
    wide = lambda a: {path: np.asarray(tree.widen(jnp.asarray(a)))}
    stacked = {path: np.stack([wide(a)[path] for a in arrays])}
    if base is None:
        out = _compiled(step.method, based=False)(stacked, **more)
    else:
        out = _compiled(step.method, based=True)(stacked, wide(base.read()), **more)
    result = np.asarray(out[path])
    assert result.shape == step.shape, step.name
    return result.astype(step.out_dtype)


@ft.lru_cache(maxsize=256)
def _compiled(method, *, based):
    options = {"xla_backend_optimization_level": 0}  # compiles twice as fast
    return jax.jit(merge.on_base(method) if based else method, compiler_options=options)
