"""Many adapters in one batch: each example is computed by its own."""

from collections.abc import Callable
import dataclasses
import functools as ft
from typing import Any

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Int, PRNGKeyArray

from .. import rewrite
from ..types import Params
from ._adapted import Adapted
from ._picked import picked
from ._state import State


def choose(adapted: Adapted, *, each: bool = False) -> Callable[..., Any]:
    r"""The adapted model, with a choice of adapter per example.

    $y_b = f(W, s_{i_b}, x_b)$ for states $s_1 \ldots s_k$ on axis 0, an index i and
    inputs with one example b per entry of axis 0, in one program. Each example is
    computed as a batch of one, so nothing may depend on the others of its batch.

    An entry of a state that is only a factor of matrix products, such as those of
    `lora`, is read where it is, one example at a time, where gathering the entries of
    all examples copies them: on a CPU. Elsewhere, and for other entries, they are
    gathered. Such products have a reverse mode but no forward mode.

    Args:
      adapted: what `attach` gave, for one of the states.
      each: also `adapted.fixed` and `adapted.fixed_shared` have the k adapters on axis
        0, as `attach` under `jax.vmap` gives them; else they share what is fixed.

    Returns:
      `(params, states, index, *inputs, key=None) -> output`: `states` as `stack`
      gives them, `[k, *entry]`; `index [b]` integers from 0 to k - 1, which may be
      traced, and beyond are the nearest; every array of `inputs` and of the output is
      `[b, ...]`. With a key, each example drops its own.

    Raises:
      ValueError: from the function: an index that is not one integer per example;
        states that are not stacked; an input or output without the axis of examples.

    Degenerate inputs:
      One state: the adapted model itself.

    References:
      Chen et al., 2023, "Punica: Multi-Tenant LoRA Serving",
      https://arxiv.org/abs/2310.18547, for the product of a row by its own factors.

    Example:
      >>> from jaxlab import lowrank
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.eye(4)
      >>> start = lambda key: lowrank.attach(lambda p, x: x @ p["w"], params,
      ...     lowrank.lora(rank=2), x, where="w", key=key)
      >>> adapted, states = jax.vmap(start)(jax.random.split(jax.random.key(0), 9))
      >>> choose(adapted)(params, states, jnp.array([8, 0, 8, 3]), x).shape
      (4, 3)
    """

    def chosen(
        params: Params,
        states: State,
        index: Int[Array, " b"],
        *inputs: Any,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        fixed = (adapted.fixed, adapted.fixed_shared) if each else ()
        stacks, structure = jax.tree.flatten((states, fixed))
        index = jnp.asarray(index)
        _check(stacks, index, inputs)

        def one(entries: list[Array], key: Any, *inputs: Any) -> Any:
            state, fixed = jax.tree.unflatten(structure, entries)
            model = adapted
            if each:
                names = ("fixed", "fixed_shared")
                changes = dict(zip(names, fixed, strict=True))
                model = dataclasses.replace(adapted, **changes)
            return model(params, state, *inputs, key=key)

        factors = _factors(one, stacks, key, *inputs)
        rules = {path: _rule for path in factors}

        def example(i: Array, key: Any, *inputs: Any) -> Any:
            inputs = jax.tree.map(lambda x: x[None], inputs)
            entries = [jax.lax.dynamic_index_in_dim(v, i, 0, False) for v in stacks]
            if not rules:
                return _single(one(entries, key, *inputs))
            carried = {path: _carried(*f, i) for path, f in factors.items()}
            run = rewrite.substitute(one, rules)
            return _single(run(entries, carried, key, *inputs))

        keys = None if key is None else jax.random.split(key, len(index))
        return jax.vmap(example)(index, keys, *inputs)

    return chosen


def _check(stacks: list[Array], index: Array, inputs: Any) -> None:
    """Raises unless there is one integer per example, and one state per number."""
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(
            f"index must be [b] integers, got {index.dtype.name}{list(index.shape)}"
        )
    if len({v.shape[:1] for v in stacks}) != 1 or not stacks[0].ndim:
        raise ValueError("the states must be stacked, [k, *entry]: see lowrank.stack")
    for path, x in jax.tree_util.tree_leaves_with_path(inputs):
        if jnp.shape(x)[:1] != index.shape:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"inputs{name} has shape {jnp.shape(x)}, expected {len(index)} examples"
            )


def _single(out: Any) -> Any:
    """The output of a batch of one, without its axis."""
    for path, y in jax.tree_util.tree_leaves_with_path(out):
        if jnp.shape(y)[:1] != (1,):
            raise ValueError(
                f"output{jax.tree_util.keystr(path)} has shape {jnp.shape(y)} for a "
                "batch of one, expected (1, ...)"
            )
    return jax.tree.map(lambda y: y[0], out)


def _factors(
    one: Callable[..., Any], stacks: list[Array], key: Any, *inputs: Any
) -> dict[str, tuple[Array, rewrite.Use]]:
    """By path, the entries that are one factor of one matrix product, and how."""
    like = lambda x, *lead: jax.ShapeDtypeStruct((*lead, *x.shape[1:]), x.dtype)
    shapes = [like(v) for v in stacks]
    example = jax.tree.map(lambda x: like(jnp.asarray(x), 1), inputs)
    uses = rewrite.uses(one, shapes, key, *example)
    out = {}
    for number, v in enumerate(stacks):
        found = uses[str(number)]
        if len(found) == 1 and _is_factor(found[0], v.shape[1:]):
            out[str(number)] = v, found[0]
    return out


def _is_factor(use: rewrite.Use, shape: tuple[int, ...]) -> bool:
    """Is it a matrix of a product, sliced by whole leading axes if at all?"""
    plain = use.primitive == "dot_general" and not use.batch
    ahead = use.stacked == tuple(range(len(use.stacked)))
    return plain and ahead and bool(use.contracted) and use.shape == shape


def _carried(v: Array, use: rewrite.Use, i: Array) -> tuple[Array, Array]:
    """What the rule of an entry needs, the axes that scans slice in front."""
    layers = len(use.stacked)
    matrices = jax.vmap(ft.partial(rewrite.as_matrix, use=use))(v)
    front = use.shape[:layers]
    return jnp.moveaxis(matrices, 0, layers), jnp.broadcast_to(i, front)


def _rule(
    x: Any, w: Array, carried: tuple[Array, Array], op: rewrite.Operation
) -> Array:
    """A product by the chosen one of k matrices."""
    stack, i = carried
    return op.place(picked(op.rows(x).astype(w.dtype), stack, i))
