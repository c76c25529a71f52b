"""`jaxlab adapter`: fold, extract, combine, convert and inspect adapters."""

import functools as ft
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import _console
from ._command import Json, Model, Quiet, Resume, Seed, ShardSize, reported

adapters = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Source = Annotated[
    str, typer.Argument(help="A PEFT folder, or a kohya or diffusers LoRA file.")
]
Rank = Annotated[int | None, typer.Option(min=1, help="The rank of every layer.")]


@adapters.command()
@reported
def inspect(path: Source, *, json: Json = False) -> None:
    """Show the modules of an adapter: types, ranks, scales, norms of the updates."""
    from . import _adapter_tables as tables, _tables, io

    found = io.inspect_adapter(path)
    if json:
        typer.echo(_tables.as_json(found))
    else:
        _console.stdout().print(tables.inspection(found))


@adapters.command()
@reported
def convert(
    source: Source,
    out: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder.")],
    *,
    to: Annotated[
        Literal["peft", "kohya", "diffusers"], typer.Option(help="The format to write.")
    ],
    quiet: Quiet = False,
) -> None:
    """Write an adapter in another format."""
    from . import io

    found = io.convert_adapter(source, out, to=to)
    console = _console.stdout()
    for name in found.others:
        text = f"left out, being no adapter: {_console.printable(name)}"
        console.print(text, markup=False, style="yellow", soft_wrap=True)
    if not quiet:
        count = sum(map(len, found.components.values()))
        text = f"{out}: {count} modules, {found.format} to {to}"
        console.print(text, markup=False, soft_wrap=True)


@adapters.command()
@reported
def fold(
    base: Model,
    adapter: Source,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the output; by default that of the base."),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(help="Which model of a file for several, such as unet."),
    ] = None,
    shard_size: ShardSize = "5GB",
    resume: Resume = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold an adapter into a checkpoint, one tensor in memory at a time."""
    largest = _console.size(shard_size, option="--shard-size")
    from . import _adapter_tables as tables, _tables, io

    found = io.fold_adapter(
        base,
        adapter,
        out,
        dtype=dtype,
        component=component,
        shard_size=largest,
        resume=resume,
        progress=ft.partial(_console.reading, quiet=quiet),
    )
    if json:
        typer.echo(_tables.as_json(found))
        return
    console = _console.stdout()
    if not quiet:
        for table in tables.folded(found, out):
            console.print(table)
    if text := tables.lost(found):
        console.print(text, markup=False, style="yellow", soft_wrap=True)


@adapters.command()
@reported
def extract(
    base: Model,
    tuned: Model,
    out: Annotated[Path, typer.Argument(help="The PEFT folder to write.")],
    *,
    rank: Rank = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Instead: the share of each change to hold, such as 0.9."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Full decompositions, no sketches.")
    ] = False,
    rest: Annotated[
        Literal["keep", "skip"],
        typer.Option(help="Tensors that are no matrices: store them whole, or not."),
    ] = "keep",
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Recover a LoRA adapter from a checkpoint before and after training."""
    from . import _adapter_tables as tables, _tables, io

    found = io.extract(
        base,
        tuned,
        out,
        rank=rank,
        energy=energy,
        exact=exact,
        rest=rest,
        seed=seed,
        progress=ft.partial(_console.reading, quiet=quiet),
    )
    if json:
        typer.echo(_tables.as_json(found))
    elif not quiet:
        _console.stdout().print(tables.extracted(found))


@adapters.command()
@reported
def combine(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="A B... OUT", help="Adapters, and the output."),
    ],
    *,
    weights: Annotated[
        str | None, typer.Option(help="One per adapter, as 0.7,0.3; 1 by default.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="linear, or a merge such as ties or dare_ties.")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Of a mode that keeps a share of the entries.")
    ] = None,
    rank: Rank = None,
    to: Annotated[
        Literal["peft", "kohya", "diffusers"] | None,
        typer.Option(help="The format; by default that of the first."),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Combine LoRA adapters of one base into one."""
    if len(sources) < 2:
        raise typer.BadParameter("give adapters and an output", param_hint="A B... OUT")
    try:
        given = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        why = f"{weights!r} is no list of numbers; try 0.7,0.3"
        raise typer.BadParameter(why, param_hint="--weights") from None
    from . import io

    *read, out = sources
    ranks = io.combine_adapters(
        read,
        out,
        weights=given,
        mode=mode,
        density=density,
        rank=rank,
        seed=seed,
        to=to,
    )
    if not quiet:
        low, high = min(ranks.values()), max(ranks.values())
        which = f"{low}" if low == high else f"{low} to {high}"
        text = f"{out}: {len(ranks)} modules of rank {which}"
        _console.stdout().print(text, markup=False, soft_wrap=True)
