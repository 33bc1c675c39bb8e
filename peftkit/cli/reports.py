"""Commands that read and report: inspect, doctor, diff and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.options import (
    All,
    AnyAdapters,
    BaseOptions,
    BudgetOptions,
    Checkpoint,
    Dtype,
    File,
    Json,
    PartOptions,
    ReadingOptions,
    RebaseOptions,
)
from peftkit.cli.strengths import strengths
from peftkit.cli.terminal import OUT, dtype_of, show
from peftkit.errors import OptionError

Modules = Annotated[
    bool | None,
    typer.Option(
        "--modules/--no-modules", "--all", help="List every module, or none; by default one line for those alike."
    ),
]
Norms = Annotated[
    bool, typer.Option("--norms/--no-norms", help="Read all numbers for ‖ΔW‖, or the header and the scales alone.")
]


def inspect(
    file: File, reading: ReadingOptions, modules: Modules = None, norms: Norms = True, as_json: Json = False
) -> None:
    """Look into a file: kinds, ranks, scales, norms, dead modules, and which programs load it.

    Modules of one kind, rank, scale and shape are one line.

    Example: peftkit inspect style.safetensors
    """
    from peftkit.files.inspect import inspect

    found = inspect(file, norms=norms, **reading.given)
    show(found, as_json, None if modules is False else found.table(every=bool(modules)))


def doctor(file: File, reading: ReadingOptions, as_json: Json = False) -> None:
    """Check whether a file can be used; the exit code is 0 for yes, 1 for in part, 2 for no.

    Example: peftkit doctor style.safetensors && cp style.safetensors models/Lora/
    """
    from peftkit.files.inspect import doctor

    found = doctor(file, **reading.given)
    show(found, as_json)
    raise typer.Exit(found.code)


def diff(
    first: Annotated[str, typer.Argument(help="An adapter file.")],
    second: Annotated[str, typer.Argument(help="Another.")],
    base: BaseOptions,
    reading: ReadingOptions,
    as_json: Json = False,
) -> None:
    """Compare the ΔW of two files, whatever their formats; the exit code is 1 if they differ.

    Example: peftkit diff style.safetensors style-a1111.safetensors
    """
    from peftkit.files.inspect import diff

    found = diff(first, second, **base.given, **reading.given)
    show(found, as_json, found.table())
    raise typer.Exit(0 if found.equal else 1)


def plan(
    base: Checkpoint,
    rebase: RebaseOptions,
    part: PartOptions,
    reading: ReadingOptions,
    ranks: BudgetOptions,
    adapters: AnyAdapters = None,
    dtype: Dtype = None,
    every: All = False,
    as_json: Json = False,
) -> None:
    """Plan a merge: find the place of every tensor of every file in the base. Writes nothing.

    With --budget, plan the ranks of a new adapter of the base instead.

    Example: peftkit plan sd15.safetensors style.safetensors=0.8 face.safetensors=-0.3
    """
    if ranks.budget is not None:
        if adapters or rebase != RebaseOptions():
            raise OptionError("--budget plans a new adapter, and there is none to merge: leave files and --rebase out")
        _plan_ranks(base, ranks, part, reading, dtype, every, as_json)
        return
    if not adapters or ranks.given:
        which = f"--{next(iter(ranks.given))} is for a new adapter" if ranks.given else "no adapter was given"
        raise OptionError(f"{which}: name files to merge, or --budget to plan the ranks of a new one")
    plan_of_merge(base, adapters, rebase, part, reading, dtype, every, as_json)


def plan_of_merge(
    base: Path,
    adapters: list[str],
    rebase: RebaseOptions,
    part: PartOptions,
    reading: ReadingOptions,
    dtype: str | None,
    every: bool,
    as_json: bool,
) -> None:
    """Plan a merge, and print it."""
    from peftkit.files.merge_plan import plan_merge

    options = {**rebase.given, **part.given, **reading.given}
    planned = plan_merge(base, strengths(adapters), dtype=dtype_of(dtype), **options)
    if as_json:
        steps = {"patches": planned.patches, "vectors": planned.vectors, "extras": planned.extras}
        steps["renamed"] = {file: bundle.renamed for file, bundle in planned.bundles.items()}
        show({**steps, "touched": planned.touched, "left_out": planned.base.copies}, as_json)
    else:
        show(planned, as_json, planned.table(every=every))


def _plan_ranks(
    base: Path,
    ranks: BudgetOptions,
    part: PartOptions,
    reading: ReadingOptions,
    dtype: str | None,
    every: bool,
    as_json: bool,
) -> None:
    """Plan the ranks of a new adapter, and print them."""
    from peftkit.files.ranks import plan_ranks, read_scores

    assert ranks.budget is not None
    planned = plan_ranks(
        base,
        ranks.kind or "lora",
        ranks.budget,
        scores=None if ranks.scores is None else read_scores(ranks.scores),
        tuned=ranks.tuned,
        targets=ranks.target or "full",
        exclude=ranks.exclude or (),
        **part.given,
        allow_pickle=reading.allow_pickle,
        dtype=dtype_of(dtype),
    )
    weights = {
        entry.site.name: {"kind": entry.kind, "rank": entry.options.get("rank"), "bytes": entry.bytes}
        for entry in planned.entries
    }
    if as_json:
        show({"budget": planned.budget, "bytes": planned.bytes, "weights": weights, "why": planned.why}, as_json)
        return
    OUT.print(str(planned), soft_wrap=True)
    for name, why in planned.why.items() if every else ():
        own = weights.get(name)
        OUT.print(f"{name}: {own['kind']} {own['rank'] or ''}: {why}" if own else f"{name}: {why}", soft_wrap=True)
