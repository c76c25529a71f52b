"""OSF: Nayak et al., 2025."""

import functools as ft
from typing import TYPE_CHECKING, Any

import jax
from jax import Array
import jax.numpy as jnp

from ..types import Adapter
from ._adapted import Adapted
from ._operands import like
from ._places import lead, mapped, method
from ._principal import principal
from ._rank import plus

if TYPE_CHECKING:
    import optax


def osf(*, keep: int | float | None = None) -> Adapter:
    r"""Trains the small singular directions of a weight, the large ones preserved.

    With $W = V_h S_h U_h + V_l S_l U_l$, the k largest singular values in the first
    part: $W' = W + A\,\mathrm{diag}(d)\,B - V_l S_l U_l$, A, d and B trained from
    $V_l, S_l, U_l$. The gradients of A and B are projected orthogonally to $V_h$ and
    $U_h$: by SGD $V_h^\top (W' - W) = 0$ and $(W' - W)\,U_h^\top = 0$ throughout, and
    by other optimisers with `preserve` behind them.

    Args:
      keep: k, of 1 to min(n, m) - 1; a float is a fraction of min(n, m), rounded down;
        None is a half.

    Returns:
      An adapter with state `a [n, q]`, `d [q]`, `b [q, m]`, q = min(n, m) - k, and the
      fixed `a0`, `d0`, `b0` they start from, `high_in [n, k]`, which is $V_h$, and
      `high_out [k, m]`, which is $U_h$: empty on the smaller side, where `a0` or `b0`
      spans the complement.

    Raises:
      ValueError: from `init`, nothing preserved or nothing trained.

    Degenerate inputs:
      Fresh, the layer is unchanged.

    References:
      Nayak et al., 2025, "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for
      Continual Learning", https://arxiv.org/abs/2504.07097.

    Example:
      >>> s = osf(keep=1).init(jax.random.key(0), jnp.eye(3, 4))
      >>> s["a"].shape, s["d"].shape, s["b"].shape, s["high_out"].shape
      ((3, 2), (2,), (2, 4), (1, 4))
    """

    def init(key: Array, w: Array) -> dict[str, Any]:
        del key
        n, m = w.shape
        k = _kept(keep, min(n, m))
        a, d, b = principal(w)
        low = {"a": a[:, k:], "d": d[k:], "b": b[k:]}
        s = low | {f"{name}0": v for name, v in low.items()}
        s["high_in"] = a[:, : k if n > m else 0]
        return s | {"high_out": b[: k if m > n else 0]}

    def factors(s: dict[str, Any]) -> tuple[Array, Array]:
        left, right = _outside(s, s["a"], s["b"], _held)
        left = jnp.concatenate([left * s["d"][None], -s["a0"] * s["d0"][None]], 1)
        return left, jnp.concatenate([right, s["b0"]], 0)

    def apply(x: Any, w: Any, s: dict[str, Any]) -> Array:
        left, right = (like(v, x) for v in factors(s))
        return plus(x @ w, (x @ left) @ right)

    def merge(w: Array, s: dict[str, Any]) -> Array:
        left, right = factors(s)
        return plus(w, left @ right)

    fixed = ("a0", "d0", "b0", "high_in", "high_out")
    return Adapter(init, apply, merge, fixed=fixed, config=("osf", ("keep", keep)))


def preserve(adapted: Adapted) -> "optax.GradientTransformation":
    """Projects the updates of `osf` states away from what they preserve.

    The gradients are already; an optimiser that scales entries apart (Adam) or decays
    them turns its updates back. Behind it in a chain, this makes the promise exact.

    Args:
      adapted: the adapted model; leaves with other adapters are left as they are.

    Returns:
      A gradient transformation of the updates of a `State`, without state of its own.

    Raises:
      Nothing.

    References:
      Nayak et al., 2025, https://arxiv.org/abs/2504.07097, there of gradients.

    Example:
      >>> import optax; from jaxlab import lowrank
      >>> apply, p, x = lambda p, x: x @ p["w"], {"w": jnp.eye(3, 4)}, jnp.ones((1, 3))
      >>> adapted, state = lowrank.attach(
      ...     apply, p, osf(keep=1), x, where="w", key=jax.random.key(0))
      >>> optimizer = optax.chain(optax.adam(1e-3), preserve(adapted))
    """
    import optax

    mine = [p for p in adapted.spec.places if method(p.adapter) == "osf"]

    def one(s: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
        a, b = _outside(fixed, s["a"], s["b"], _project)
        return s | {"a": a, "b": b}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves = dict(updates.leaves)
        for place in mine:
            fn, path = mapped(one, len(lead(place))), place.path
            leaves[path] = fn(leaves[path], adapted.fixed[path])
        return updates.replace(leaves=leaves), state

    return optax.GradientTransformation(optax.identity().init, update)


def _kept(keep: int | float | None, side: int) -> int:
    """How many directions are preserved; raises where none is, or none trained."""
    k = side // 2 if keep is None else keep
    k = int(side * k) if isinstance(k, float) else k
    if not 1 <= k < side:
        raise ValueError(f"keep={keep!r} preserves {k} of {side} directions")
    return k


def _outside(s: dict[str, Any], a: Array, b: Array, fn: Any) -> tuple[Array, Array]:
    """`fn(v, basis, inside)` of both factors `[side, q]`, the second one turned."""
    inside = not s["high_in"].size
    a = fn(a, s["a0"] if inside else s["high_in"], inside)
    inside = not s["high_out"].size
    return a, fn(b.T, (s["b0"] if inside else s["high_out"]).T, inside).T


def _project(v: Array, basis: Array, inside: bool) -> Array:
    """The part of `v` inside the span of a basis, or outside it."""
    part = basis @ (basis.T @ v)
    return part if inside else v - part


@ft.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _held(v: Array, basis: Array, inside: bool) -> Array:
    """`v`; its gradient is projected."""
    del basis, inside
    return v


def _held_forward(v: Array, basis: Array, inside: bool) -> tuple[Array, Array]:
    del inside
    return v, basis


def _held_backward(inside: bool, basis: Array, g: Array) -> tuple[Array, Array]:
    return _project(g, basis, inside), jnp.zeros_like(basis)


_held.defvjp(_held_forward, _held_backward)
