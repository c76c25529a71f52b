"""`align:` in recipes: the models of a merge, permuted onto one of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import _form, _node
from ._aligned import aligned, check, match, symmetries
from ._checkpoint import Checkpoint
from ._forward import known, named
from ._run import Progress, Report, silent


class Together(NamedTuple):
    """The models as they are merged, and what was done to bring them together."""

    models: Mapping[str, Checkpoint]
    digests: dict[str, str]  # by reference, of its permutations
    notes: tuple[str, ...]
    memory: int  # that the matching took

    def told(self, report: Report) -> Report:
        """The report of the merge, with the notes and the memory of the matching."""
        return report._replace(
            notes=(*report.notes, *self.notes),
            peak_memory=max(report.peak_memory, self.memory),
        )


def together(
    recipe: Mapping[str, Any],
    models: Mapping[str, Checkpoint],
    *,
    seed: int,
    dry_run: bool,
    progress: Progress | None,
) -> Together:
    """Permutes the models that a recipe merges onto one of them, where it says so.

    Args:
      recipe: in our own form.
      models: open, by reference.
      seed: of the matching, where the recipe has none.
      dry_run: check that it can be done, and leave the models as they are.
      progress: shows the bytes that are read.

    Returns:
      The models, those that moved as checkpoints that are permuted as they are read.

    Raises:
      ValueError: a model is of no known kind, or two do not fit together.
    """
    form = _form.read(_node.nodes(recipe))
    if form.align is None:
        return Together(models, {}, (), 0)
    onto, others = _sides(form)
    target = models[onto]
    if form.align.forward is None:
        forward = known(target)
    else:
        forward = named(form.align.forward, form.align.inputs, ours=True)
    found = symmetries(target, forward)
    out, digests, notes = dict(models), {}, []
    show = silent if progress is None else progress
    for other in others:
        check(target, models[other])
        if dry_run:
            notes.append(f"{other} is aligned onto {onto} first")
            continue
        total = target.nbytes + models[other].nbytes
        given = form.align.seed
        with show(f"matching {other} to {onto}", total) as seen:
            best = match(
                target,
                models[other],
                found,
                seed=seed if given is None else given,
                seen=seen,
            )
        out[other] = aligned(models[other], best)
        digests[other] = best.digest
        notes.append(
            f"{other} is aligned onto {onto}: relative distance {best.before:.4g} "
            f"before, {best.after:.4g} after"
        )
    memory = max((target.nbytes + 2 * models[o].nbytes for o in others), default=0)
    return Together(out, digests, tuple(notes), memory)


def _sides(form: _form.Merge) -> tuple[str, list[str]]:
    """The reference that stays, and those that are permuted onto it."""
    assert form.align is not None
    first = form.slices[0]
    base = first.base and first.base.model
    merged = _form.references(form._replace(like=None, tokenizer=None))
    onto = form.align.onto or ("base" if isinstance(base, str) else "first")
    if onto not in merged and onto in ("base", "first"):
        chosen = base if onto == "base" else first.models[0].model
        if not isinstance(chosen, str):
            raise ValueError(f"align: onto: {onto} is no model of this recipe")
        onto = chosen
    if onto not in merged:
        raise ValueError(f"align: onto: {onto!r} is none of {list(merged)}")
    return onto, [name for name in merged if name != onto]
