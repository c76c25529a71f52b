"""Adapters on the weights of any model."""

from collections.abc import Callable, Mapping
import dataclasses
import functools as ft
import math
from typing import Any, Literal

import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .. import rewrite, tree
from ..types import Adapter, Apply, Params, Where
from ._operands import Input, Weight
from ._state import Entries, Place, Spec, State, by_path, fingerprint

Form = Literal["substituted", "merged"]


@ft.partial(
    jax.tree_util.register_dataclass,
    data_fields=("fixed", "fixed_shared"),
    meta_fields=("model", "spec", "form", "dropout"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """The function of an adapted model, `(params, state, *inputs, key=None)`.

    A pytree whose leaves are what the adapters keep fixed (projections, indices), so
    it may itself be an argument of `jax.jit` or `jax.vmap`.
    """

    fixed: Entries
    """By path, the entries that are not trained."""
    fixed_shared: Entries
    """By method, those that all its leaves share."""
    model: Apply
    """The function `(params, *inputs)` that is adapted."""
    spec: Spec
    """Which leaf has which adapter: that of the states it takes."""
    form: Form
    """How a weight is adapted inside."""
    dropout: float
    """How much of an adapter's input is dropped where a key is given."""

    def __call__(
        self,
        params: Params,
        state: State,
        *inputs: Any,
        key: PRNGKeyArray | None = None,
    ) -> Any:
        """The output of the adapted model; with a key, with dropout."""
        if [p[:4] for p in state.spec.places] != [p[:4] for p in self.spec.places]:
            raise ValueError("the state is of other leaves or adapters than this model")
        entries = joined(state, self)
        leaves = by_path(params)
        rules, carried, changed = {}, {}, dict(leaves)
        for place in self.spec.places:
            s, w = entries[place.path], leaves[place.path]
            if place.use is None:
                assert place.adapter.merge is not None
                changed[place.path] = place.adapter.merge(w, s)
                continue
            if place.bias is not None:
                changed[place.bias] = biased(place, leaves[place.bias], s)
            rules[place.path] = ft.partial(_rule, place, self.form, self.dropout)
            drawn = _keys(key, place) if self.dropout else None
            carried[place.path] = (rewrite.as_matrix(w, place.use), s, drawn)
        params = jax.tree.unflatten(jax.tree.structure(params), list(changed.values()))
        if not rules:
            return self.model(params, *inputs)
        return rewrite.substitute(self.model, rules)(params, carried, *inputs)


def attach(
    apply: Apply,
    params: Params,
    adapter: Adapter | Mapping[str, Adapter],
    *inputs: Any,
    where: str | Where | None = None,
    key: PRNGKeyArray,
    form: Form = "substituted",
    dropout: float = 0.0,
    statistics: Mapping[str, Any] | None = None,
) -> tuple[Adapted, State]:
    r"""The model with adapters on its weights, and all that is to be trained.

    $y = x W$ becomes $y = \mathrm{adapter.apply}(x, W, s)$ wherever the program of
    `apply` multiplies by a chosen leaf: dense layers, attention projections stored by
    head, convolutions, embeddings, experts, layers stacked for a scan. A leaf used
    twice (a tied embedding) is adapted in both places.

    Args:
      apply: the function `apply(params, *inputs)`.
      params: its parameters; they stay as they are.
      adapter: what to put on each leaf; or one by `tree.glob` pattern, the first that
        matches, which is how ranks differ by path.
      *inputs: inputs of `apply`, for their shapes; `ShapeDtypeStruct`s will do.
      where: which leaves: a `tree.glob` pattern or a predicate (path, leaf). Needed
        unless `adapter` is a mapping, whose patterns it narrows.
      key: consumed; every leaf draws by its path.
      form: "merged" computes each adapted weight in every call, for comparison, or
        where an adapter's `apply` would form the patches of a convolution.
      dropout: the rate at which an adapter's input is dropped, where the model is
        called with `key=`.
      statistics: by path `[*stacked, *batch, ...]`, for an `init` that takes one.

    Returns:
      `(adapted, state)`: `adapted(params, state, *inputs)` is the function; `state`
      is a pytree of float32 (or wider) arrays, those that are trained and no others.

    Raises:
      ValueError: nothing is chosen; a chosen leaf is in no matrix product; an option
        does not fit a leaf, such as a rank above min(n, m); a statistic is missing
        (names the leaf).

    Degenerate inputs:
      With a fresh state the output is that of `apply`, where the adapter's `init` says
      so.

    References:
      Houlsby et al., 2019, "Parameter-Efficient Transfer Learning for NLP",
      https://arxiv.org/abs/1902.00751, for the idea of training added state alone.

    Example:
      >>> from jaxlab import lowrank
      >>> apply = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> key, lora = jax.random.key(0), lowrank.lora(rank=2)
      >>> adapted, state = attach(apply, params, lora, x, where="w", key=key)
      >>> adapted(params, state, x).tolist() == apply(params, x).tolist()
      True
    """
    leaves = by_path(params)
    chosen = _chosen(params, adapter, where)
    uses = rewrite.uses(apply, params, *inputs)
    places = tuple(_place(p, a, leaves, uses[p]) for p, a in chosen.items())
    trained, fixed = {}, {}
    keys = {p: jax.random.fold_in(key, tree.path_number(p)) for p in chosen}
    for place in places:
        statistic = _statistic(place, statistics)
        s = _initial(place, keys[place.path], leaves[place.path], statistic)
        trained[place.path], fixed[place.path] = _parted(place.adapter, s)
    shared, fixed_shared = _shared(places, key)
    spec = Spec(places, fingerprint({p: leaves[p] for p in chosen}))
    adapted = Adapted(fixed, fixed_shared, apply, spec, form, dropout)
    return adapted, State(trained, shared, spec)


def joined(state: State, fixed: Any) -> Entries:
    """By path, all entries that an adapter takes: trained, fixed and shared.

    `fixed` is an `Adapted`, or None where no adapter keeps anything fixed.
    """
    out: Entries = {}
    for place in state.spec.places:
        name, front = method(place.adapter), lead(place)
        own, common = dict(state.leaves[place.path]), dict(state.shared.get(name, {}))
        if fixed is not None:
            own |= fixed.fixed[place.path]
            common |= fixed.fixed_shared.get(name, {})
        for entry, v in common.items():
            own[entry] = jnp.broadcast_to(v, front + v.shape)
        lacking = [n for n in place.adapter.fixed if n not in own]
        if lacking:
            raise ValueError(
                f"{name} keeps {lacking} fixed at {place.path!r}: pass adapted"
            )
        out[place.path] = own
    return out


def method(adapter: Adapter) -> str:
    """The name of an adapter's method."""
    return adapter.config[0] if adapter.config else "adapter"


def lead(place: Place) -> tuple[int, ...]:
    """The sizes of a leaf's stacked and batch axes."""
    use = place.use
    if use is None:
        return ()
    return tuple(use.shape[a] for a in (*use.stacked, *use.batch))


def mapped(fn: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """A function of matrices as one of `axes` more leading axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn


def biased(place: Place, b: Array, s: dict[str, Any]) -> Array:
    """The layer's bias as the adapter has it."""
    front = lead(place)
    assert place.adapter.bias is not None
    fn = mapped(place.adapter.bias, len(front))
    return fn(b.reshape(*front, -1), s).reshape(b.shape).astype(b.dtype)


def _chosen(
    params: Params, adapter: Adapter | Mapping[str, Adapter], where: str | Where | None
) -> dict[str, Adapter]:
    """The adapter of each chosen leaf; raises where there is none."""
    if where is None and isinstance(adapter, Adapter):
        raise ValueError("attach needs where=, a glob or a predicate (path, leaf)")
    test = tree.glob(where) if isinstance(where, str) else where or (lambda *_: True)
    by_glob = {"**": adapter} if isinstance(adapter, Adapter) else adapter
    out, hit = {}, set()
    tests = {pattern: tree.glob(pattern) for pattern in by_glob}
    for path, leaf in by_path(params).items():
        mine = [p for p, fits in tests.items() if fits(path, leaf)]
        if mine and test(path, leaf):
            out[path] = by_glob[mine[0]]
            hit.add(mine[0])
    missed = [p for p in by_glob if p not in hit]
    if not out or missed:
        what = f"pattern {missed[0]!r}" if out else f"where={where!r}"
        raise ValueError(f"{what} chooses no leaf of {tree.paths(params)[:5]}...")
    return out


def _place(path: str, adapter: Adapter, leaves: dict[str, Any], uses: Any) -> Place:
    """How a leaf is adapted; raises where it cannot be."""
    shape = tuple(leaves[path].shape)
    if not adapter.matrix:
        return Place(path, adapter, shape, None, None)
    products = [u for u in uses if u.contracted]
    if not products:
        how = ", ".join(sorted({u.primitive for u in uses})) or "nothing"
        raise ValueError(f"{path!r} is in no matrix product (used by: {how})")
    use = products[0]
    bias = None
    if adapter.bias is not None:
        bias = _bias(path, leaves, lead(Place(path, adapter, shape, use, None)), use)
        if bias is None:
            _named(path, adapter.bias, None, {})
    return Place(path, adapter, shape, use, bias)


def _bias(
    path: str, leaves: dict[str, Any], front: tuple[int, ...], use: rewrite.Use
) -> str | None:
    """The leaf beside a weight that is named as a bias and has one entry per output."""
    parent = path.rpartition("/")[0]
    size = math.prod(front) * math.prod(use.shape[a] for a in use.free)
    for other, leaf in leaves.items():
        above, _, name = other.rpartition("/")
        if above == parent and (name == "b" or "bias" in name) and leaf.size == size:
            return other
    return None


def _named(path: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Calls `fn`; an error names the leaf."""
    try:
        return fn(*args)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from error


def _statistic(place: Place, statistics: Mapping[str, Any] | None) -> tuple[Any, ...]:
    if statistics is None:
        return ()
    if place.path not in statistics:
        raise ValueError(f"statistics has nothing for {place.path!r}")
    return (statistics[place.path],)


def _initial(place: Place, key: Array, w: Array, statistic: tuple[Any, ...]) -> Any:
    """The fresh entries of one leaf, its stacked and batch axes in front."""
    adapter, front = place.adapter, lead(place)
    if place.use is None:
        return _named(place.path, adapter.init, key, w, *statistic)
    w = rewrite.as_matrix(w, place.use)
    keys = jax.random.split(key, front) if front else key
    init = mapped(adapter.init, len(front))
    return _named(place.path, init, keys, w, *statistic)


def _parted(adapter: Adapter, s: dict[str, Any]) -> tuple[dict, dict]:
    """The trained and the fixed entries."""
    fixed = {n: v for n, v in s.items() if n in adapter.fixed}
    return {n: v for n, v in s.items() if n not in fixed}, fixed


def _shared(places: tuple[Place, ...], key: Array) -> tuple[Entries, Entries]:
    """What the leaves of each method share, trained and fixed."""
    trained, fixed = {}, {}
    for adapter in dict.fromkeys(p.adapter for p in places if p.adapter.shared):
        name = method(adapter)
        if name in trained:
            raise ValueError(f"two {name} adapters of other options share one state")
        mine = [p.use for p in places if p.adapter == adapter and p.use is not None]
        number = jax.random.fold_in(key, tree.path_number(name))
        assert adapter.shared is not None
        s = adapter.shared(number, tuple(sides(u) for u in mine))
        trained[name], fixed[name] = _parted(adapter, s)
    return trained, fixed


def sides(use: rewrite.Use) -> tuple[int, int]:
    """The n and m of a leaf's matrices."""
    size = lambda axes: math.prod(use.shape[a] for a in axes)
    return size(use.contracted), size(use.free)


def _keys(key: Array | None, place: Place) -> Array | None:
    """A key per stacked layer, by the leaf's path."""
    if key is None or place.use is None:
        return None
    own = jax.random.fold_in(key, tree.path_number(place.path))
    stacked = tuple(place.use.shape[a] for a in place.use.stacked)
    return jax.random.split(own, stacked) if stacked else own


def _rule(
    place: Place,
    form: Form,
    rate: float,
    x: Any,
    w: Array,
    carried: tuple[Array, dict[str, Any], Array | None],
    op: rewrite.Operation,
) -> Array:
    """One operation on an adapted leaf."""
    matrix, s, key = carried
    adapter, use = place.adapter, place.use
    assert use is not None
    same = op.use == use or op.use._replace(primitive=use.primitive) == use
    if adapter.apply is None or not same or form == "merged":
        if adapter.merge is None:
            raise ValueError(
                f"{method(adapter)} of {place.path!r} has no merged weight, which "
                f"form={form!r} or a second use of the leaf needs"
            )
        merged = mapped(adapter.merge, len(use.batch))(matrix, s)
        return op(x, op.view(_unstacked(merged, use)))
    if not use.batch:
        y = adapter.apply(Input(op, x, rate, key), Weight(w, matrix), s)
        return op.place(y)
    x = Input(op, x, rate, key)
    return op.place(
        mapped(adapter.apply, len(use.batch))(op.rows(x.dropped()), matrix, s)
    )


def _unstacked(matrix: Array, use: rewrite.Use) -> Array:
    """Matrices `[*batch, n, m]` with a leaf's axes in its order, layers sliced away."""
    kept = [a for a in range(len(use.shape)) if a not in use.stacked]
    at = lambda axes: tuple(kept.index(a) for a in axes)
    shape = tuple(use.shape[a] for a in kept)
    inner = use._replace(
        stacked=(), batch=at(use.batch), contracted=at(use.contracted),
        free=at(use.free), shape=shape,
    )  # fmt: skip
    like: Any = jax.ShapeDtypeStruct(shape, matrix.dtype)
    return rewrite.from_matrix(matrix, inner, like)
