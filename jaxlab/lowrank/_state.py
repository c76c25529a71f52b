"""What is trained, and what it belongs to."""

import dataclasses
import functools as ft
import hashlib
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.core import Tracer
import jax.numpy as jnp

from .. import tree
from ..rewrite import Use
from ..types import Adapter, Params
from ._quantized import dense_leaf, is_quantized

Entries = dict[str, dict[str, Any]]


class Place(NamedTuple):
    """One adapted leaf."""

    path: str
    adapter: Adapter
    shape: tuple[int, ...]
    use: Use | None
    """How it is a matrix; None where the adapter takes the leaf as it is."""
    bias: str | None
    """The path of the layer's bias, if it has one and the adapter changes it."""


class Spec(NamedTuple):
    """The adapted leaves, and a fingerprint of the base's values there."""

    places: tuple[Place, ...]
    fingerprint: str
    """Empty where the base was traced: nothing is compared then."""


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=("leaves", "shared"),
    meta_fields=("spec",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """All that is trained, and nothing else: a pytree for `jax.grad` and optax.

    `state[path][name]` has the leaf's stacked and batch axes (layers, experts) in
    front of the adapter's own.
    """

    leaves: Entries
    """By path, the trained entries of each adapted leaf."""
    shared: Entries
    """By method, the trained entries that all its leaves share."""
    spec: Spec
    """Which leaf has which adapter, and of which base: static."""

    def __getitem__(self, path: str) -> dict[str, Any]:
        """The trained entries of one leaf."""
        return self.leaves[path]

    def replace(self, **changes: Any) -> "State":
        """The state with other leaves or shared entries."""
        return dataclasses.replace(self, **changes)


def by_path(params: Params) -> dict[str, Any]:
    """The leaves of a model by their slash paths; a quantized leaf is one."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return dict(zip(tree.paths(plain_shapes(params)), leaves, strict=True))


def structure(params: Params) -> Any:
    """The tree of a model, a quantized leaf counting as one."""
    return jax.tree.structure(params, is_leaf=is_quantized)


def plain_shapes(params: Params) -> Params:
    """A model with only the shape and dtype of each quantized leaf."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if is_quantized(x) else x
    return jax.tree.map(shape, params, is_leaf=is_quantized)


def fingerprint(leaves: dict[str, Any]) -> str:
    """Paths, shapes and values of leaves as 16 hexadecimal digits; "" if traced.

    A value counts by the bits of its float32 and by its place, so the fingerprint does
    not depend on how a leaf is sharded, nor on a dtype that holds the same values.
    """
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves.values()):
        return ""
    digest = hashlib.sha256()
    for path, x in sorted(leaves.items()):
        with jax.ensure_compile_time_eval():  # the base may be a constant of a jit
            total = int(_checksum(jnp.asarray(dense_leaf(x))))
        digest.update(f"{path}{tuple(x.shape)}{total};".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: Array) -> Array:
    """Bits times odd numbers, summed modulo 2^32: exact in any order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        along = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(x.shape[axis]) + along
    mixed = (place * jnp.uint32(2654435769)) | jnp.uint32(1)
    return jnp.sum((bits ^ (bits >> 15)) * mixed, dtype=jnp.uint32)


def check_base(params: Params, spec: Spec) -> dict[str, Any]:
    """The leaves by path; raises where they are not those the adapter was made for."""
    leaves = by_path(params)
    for place in spec.places:
        if place.path not in leaves:
            raise ValueError(f"the adapter is for {place.path!r}, which is no leaf")
        shape = tuple(leaves[place.path].shape)
        if shape != place.shape:
            raise ValueError(
                f"{place.path!r} has shape {shape}, but the adapter was made for one "
                f"of {place.shape}"
            )
    now = fingerprint({p.path: leaves[p.path] for p in spec.places})
    if now and spec.fingerprint and now != spec.fingerprint:
        raise ValueError(
            f"the weights at {spec.places[0].path!r}... are not those the adapter was "
            f"made for (fingerprint {now}, expected {spec.fingerprint}): another base, "
            "or one it was folded into already"
        )
    return leaves
