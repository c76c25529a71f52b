"""The symmetries of a model that `select` made narrower or wider."""

from collections.abc import Mapping

from ._groups import Symmetries
from ._permute import narrowed


def resized(symmetries: Symmetries, sizes: Mapping[str, int]) -> Symmetries:
    """The symmetries after `select` left so many units of each group.

    Args:
      symmetries: of the model before.
      sizes: units by group name; a group that is missing keeps its size.

    Returns:
      The same groups under the same names, with the places, sizes and counts they have
      in the other model.

    Raises:
      ValueError: a name that is no group.

    Example:
      >>> from jaxlab.rewrite import Group, Member, Place
      >>> found = Symmetries((Group("w:0", 3, (Member("w", Place(0)),)),))
      >>> resized(found, {"w:0": 5}).groups[0].size
      5
    """
    groups = {g.name: g for g in symmetries.groups}
    for name in sizes:
        if name not in groups:
            raise ValueError(f"no group is named {name!r}: {sorted(groups)}")
    for name in [n for n in groups if n in sizes]:
        for i in range(len(groups[name].members)):
            cut = groups[name].members[i]
            for n, g in groups.items():
                moved = [
                    narrowed(m, cut.path, cut.place, sizes[name]) for m in g.members
                ]
                groups[n] = g._replace(members=tuple(moved))
    return symmetries._replace(
        groups=tuple(
            g._replace(
                size=sizes.get(n, g.size),
                counts=tuple(
                    sizes.get(p, c) for p, c in zip(g.per, g.counts, strict=True)
                ),
            )
            for n, g in groups.items()
        )
    )
