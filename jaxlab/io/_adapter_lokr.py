"""The fields of PEFT's LoKr, read off factors that were made elsewhere."""

from collections.abc import Mapping

from ..lowrank._lokr import kronecker_sides
from ._adapter_part import Part
from ._peft_kind import Config, Tensors


def kronecker(parts: Mapping[str, Part]) -> Config:
    """The fields from which PEFT makes factors of these sides.

    Raises:
      ValueError: there are none; names the first module that does not fit.
    """
    both = any("lokr_w1_a" in part.tensors for part in parts.values())
    effective = any("lokr_t2" in part.tensors for part in parts.values())
    sides = {module: _sides(part.tensors) for module, part in parts.items()}
    tried = [-1, *sorted({s for first, _ in sides.values() for s in first})]
    odd = ""
    for factor in tried:
        odd = next((m for m, s in sides.items() if not _fits(s, factor)), "")
        if not odd:
            break
    if odd:
        raise ValueError(f"{odd!r} has LoKr factors that no one decompose_factor gives")
    for module, part in parts.items():
        (a, b), (c, d) = sides[module]
        low = (both and part.rank < max(a, b) / 2, part.rank < max(c, d) / 2)
        has = tuple(f"lokr_w{i}_a" in part.tensors for i in (1, 2))
        if low != has:
            raise ValueError(f"{module!r}: PEFT would decompose other LoKr factors")
    return {
        "decompose_both": both,
        "decompose_factor": factor,
        "use_effective_conv2d": effective,
    }


def _sides(t: Tensors) -> tuple[tuple[int, int], tuple[int, int]]:
    """[out, in] of the first and the second factor."""
    sides = []
    for i in (1, 2):
        whole, a, b = (t.get(f"lokr_w{i}{end}") for end in ("", "_a", "_b"))
        if whole is not None:
            sides.append(whole.shape[:2])
            continue
        assert a is not None
        assert b is not None
        turned = i == 2 and "lokr_t2" in t
        sides.append((a.shape[1] if turned else a.shape[0], b.shape[1]))
    return sides[0], sides[1]


def _fits(sides: tuple[tuple[int, int], tuple[int, int]], factor: int) -> bool:
    (a, b), (c, d) = sides
    return kronecker_sides(a * c, factor) == (a, c) and kronecker_sides(
        b * d, factor
    ) == (b, d)
