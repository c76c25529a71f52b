"""What the adapter commands print."""

from typing import TYPE_CHECKING, Any

from ._console import printable
from ._tables import _table, merged

if TYPE_CHECKING:
    from rich.table import Table

    from .io import Extraction, Folded, Inspected

WORTH = 0.02
"""A share of an update that is lost above this is worth a wider dtype."""


def inspection(found: "Inspected") -> "Table":
    """One row per module, totals below."""
    from rich.text import Text

    title = f"{printable(found.path)} ({found.format} {' '.join(found.kinds)})"
    numbers = ["rank", "alpha", "scale", "parameters", "norm"]
    table = _table(title, ["module", "type"], numbers)
    several = len({row.component for row in found.rows}) > 1
    for row in found.rows:
        head = f"{row.component}: " if several and row.component else ""
        table.add_row(
            Text(printable(head + row.module)),
            row.kind,
            _number(row.rank),
            _number(row.alpha),
            _number(row.scale),
            f"{row.parameters:,}",
            _number(row.norm),
        )
    modules = sum(row.kind != "whole" for row in found.rows)
    table.caption = f"{modules} modules, {found.parameters:,} numbers"
    for component, fields in found.fields.items():
        told = ", ".join(f"{k}={v!r}" for k, v in sorted(fields.items()))
        head = f"{component}: " if component else ""
        table.caption += f"\n{printable(head + told)}"
    for component, base in found.base.items():
        head = f"{component}: " if component else ""
        table.caption += f"\n{head}made for the base {base}"
    return table


def folded(found: "Folded", out: Any) -> list["Table"]:
    """What was written, and by tensor how much of its update its dtype lost."""
    from rich.text import Text

    whole = merged(found.report, out, dry_run=False)
    whole.title = "folded"
    table = _table("lost in rounding", ["tensor"], ["of the update"])
    for name, error in found.errors.items():
        style = "yellow" if error > WORTH else ""
        table.add_row(Text(printable(name)), f"{error:.3%}", style=style)
    return [whole, table]


def lost(found: "Folded") -> str:
    """What to do where too much of an update is lost; "" where it is not."""
    worst = max(found.errors, key=lambda n: found.errors[n], default=None)
    if worst is None or found.errors[worst] <= WORTH:
        return ""
    return (
        f"{printable(worst)} lost {found.errors[worst]:.1%} of its update to rounding: "
        "--dtype float32 keeps it"
    )


def extracted(found: "Extraction") -> "Table":
    """By tensor its rank and how much of its change the adapter holds."""
    from rich.text import Text

    table = _table(f"{printable(str(found.out))}", ["tensor"], ["rank", "energy"])
    for name, rank in found.ranks.items():
        table.add_row(Text(printable(name)), str(rank), f"{found.energy[name]:.2%}")
    for name in found.whole:
        table.add_row(Text(printable(name)), "whole", "")
    for name in found.skipped:
        table.add_row(Text(printable(name)), "skipped", "", style="yellow")
    table.caption = f"{found.seconds:.1f} s"
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
