"""What the commands print: rich tables, and the same as plain values for JSON."""

from collections.abc import Callable, Iterable
import dataclasses as dc
import inspect
import json
import math
import re
from typing import TYPE_CHECKING, Any

from ._console import printable

if TYPE_CHECKING:
    from rich.table import Table

    from .demo import Results
    from .io import Report
    from .io._align import Aligned
    from .io._diff import Change, Difference
    from .io._report import Inspection


def as_json(value: Any) -> str:
    """Strict JSON of dataclasses and plain values; what is not finite becomes null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def inspection(found: "Inspection") -> "Table":
    """One row per tensor, totals below; what is not finite stands out."""
    from rich.text import Text

    bad = lambda n: Text(str(n), "bold red") if n else ""
    table = _table(
        f"{printable(found.path)} ({found.format})",
        ["tensor", "dtype"],
        ["shape", "norm", "min", "max", "zeros", "NaN", "Inf"],
    )
    for t in found.tensors:
        count = math.prod(t.shape)
        table.add_row(
            Text(printable(t.name)),
            t.dtype,
            " x ".join(map(str, t.shape)) or "scalar",
            f"{t.norm:.4g}",
            f"{t.min:.3g}",
            f"{t.max:.3g}",
            f"{t.zeros / count:.1%}" if t.zeros else "",
            bad(t.nan),
            bad(t.inf),
        )
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in found.dtypes.items())
    table.caption = (
        f"{len(found.tensors)} tensors, {found.parameters:,} entries ({dtypes}), "
        f"{amount(found.bytes)}, norm {found.norm:.6g}, "
        f"{found.nan} NaN, {found.inf} infinite"
    )
    return table


def difference(found: "Difference", *, side: int) -> list["Table"]:
    """One table by layer, one by tensor."""
    tables = [
        _changes("by layer", [*found.layers, found.total]),
        _changes("by tensor", found.tensors),
    ]
    names = f"a: {printable(found.a)}   b: {printable(found.b)}"
    tables[0].title = f"{names}\nby layer"
    tables[1].caption = (
        "change = ‖b - a‖, relative to ‖a‖; signs = share of entries with opposite "
        "signs; rank = effective rank of b - a"
    )
    if found.unranked:
        tables[1].caption += (
            f", not taken of {found.unranked} matrices whose sides are all above "
            f"{side} (--rank-side)"
        )
    return tables


def unmatched(found: "Difference") -> list[str]:
    """What the two checkpoints do not share, one line each."""
    return [
        *(f"only in a: {printable(name)}" for name in found.only_a),
        *(f"only in b: {printable(name)}" for name in found.only_b),
        *(f"mismatch: {printable(text)}" for text in found.mismatched),
    ]


def methods(known: dict[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """Name, one-liner, source and options of every public method."""
    return [
        {
            "name": name,
            "summary": summary(fn),
            "source": source(fn),
            "options": {
                p.name: None if p.default is p.empty else repr(p.default)
                for p in inspect.signature(fn).parameters.values()
                if p.kind is p.KEYWORD_ONLY
            },
        }
        for name, fn in sorted(known.items())
    ]


def listing(rows: Iterable[dict[str, Any]]) -> "Table":
    """The public methods, one row each."""
    from rich.text import Text

    table = _table("methods", ["method", "what it does", "source"], [])
    for row in rows:
        cited = row["source"].partition(". ")[0].partition("; ")[0]
        table.add_row(*map(Text, (row["name"], row["summary"], cited)))
    return table


def merged(report: "Report", out: Any, *, dry_run: bool) -> "Table":
    """What a merge did, or would do."""
    from rich.text import Text

    table = _table("plan" if dry_run else "merged", ["", " "], [])
    table.show_header = False
    rows = {
        "output": str(out),
        "tensors": f"{report.tensors:,}",
        "read": amount(report.bytes_in),
        "written": amount(report.bytes_out),
        "peak memory": amount(report.peak_memory),
        "time": f"{report.seconds:.1f} s",
    }
    if dry_run:
        del rows["time"]
    said = [
        *rows.items(),
        *(("note", note) for note in report.notes),
        *(("problem", problem) for problem in report.problems),
    ]
    for key, value in said:
        style = "yellow" if key == "problem" else ""
        table.add_row(key, Text(printable(value)), style=style)
    return table


def aligned(found: "Aligned", *, dry_run: bool) -> list["Table"]:
    """What was written, and the groups of units with the share of each that moved."""
    from rich.text import Text

    whole = merged(found.report, found.report.out, dry_run=dry_run)
    whole.title = "plan" if dry_run else "aligned"
    for name, value in (("before", found.before), ("after", found.after)):
        if value is not None:
            whole.add_row(f"distance {name}", f"{value:.6g} of ‖A‖")
    for path, primitive in found.refused:
        whole.add_row("not followed", Text(printable(f"{path}: {primitive}")))
    table = _table("groups of units", ["group"], ["units", "blocks", "moved"])
    for name, (size, blocks, moved) in found.moved.items():
        share = "" if dry_run else f"{moved:.1%}"
        table.add_row(Text(printable(name)), str(size), str(blocks), share)
    return [whole, table]


def accuracies(found: "Results") -> "Table":
    """Every model of the demo on every task, in percent."""
    table = _table("accuracy, %", ["model"], [*found.tasks, "mean"])
    ends = {"base", found.experts[-1]}
    for model, values in found.accuracy.items():
        name = f"expert: {model}" if model in found.experts else model
        numbers = [f"{100 * v:.1f}" for v in (*values, found.mean(model))]
        table.add_row(name, *numbers, end_section=model in ends)
    return table


def summary(fn: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(fn) or "").partition("\n")[0]


def source(fn: Callable[..., Any]) -> str:
    """The `References:` section of a docstring, in one line."""
    match = re.search(
        r"^References:\n((?:[ \t]+\S.*\n?|\n)+)", inspect.getdoc(fn) or "", re.M
    )
    return " ".join(match[1].split()) if match else ""


def amount(count: float) -> str:
    """A number of bytes, as people say it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def _changes(title: str, rows: Iterable["Change"]) -> "Table":
    from rich.text import Text

    numbers = ["entries", "change", "relative", "cosine", "signs", "largest", "rank"]
    table = _table(title, ["name"], [*numbers, "NaN/Inf"])
    for x in rows:
        table.add_row(
            Text(printable(x.name)),
            f"{x.entries:,}",
            f"{x.delta:.4g}",
            f"{x.relative:.3%}",
            f"{x.cosine:.6f}",
            f"{x.conflict:.2%}",
            f"{x.largest:.3g}",
            "" if x.rank is None else f"{x.rank:.1f}",
            Text(str(x.nonfinite), "bold red") if x.nonfinite else "",
        )
    return table


def _table(title: str, left: list[str], right: list[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left")
    table.caption_justify = "left"
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _plain(value: Any) -> Any:
    if dc.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dc.fields(value)}
    if (named := getattr(value, "_asdict", None)) is not None:
        value = named()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
