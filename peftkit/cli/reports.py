"""Commands that read and report: inspect, doctor, diff and plan."""

from __future__ import annotations

from typing import Annotated

import typer

from peftkit.cli.options import (
    Adapters,
    All,
    BaseOptions,
    Checkpoint,
    Dtype,
    File,
    Json,
    PartOptions,
    ReadingOptions,
    RebaseOptions,
)
from peftkit.cli.strengths import strengths
from peftkit.cli.terminal import dtype_of, show

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
    adapters: Adapters,
    rebase: RebaseOptions,
    part: PartOptions,
    reading: ReadingOptions,
    dtype: Dtype = None,
    every: All = False,
    as_json: Json = False,
) -> None:
    """Plan a merge: find the place of every tensor of every file in the base. Writes nothing.

    Example: peftkit plan sd15.safetensors style.safetensors=0.8 face.safetensors=-0.3
    """
    from peftkit.files.merge_plan import plan_merge

    options = {**rebase.given, **part.given, **reading.given}
    planned = plan_merge(base, strengths(adapters), dtype=dtype_of(dtype), **options)
    if as_json:
        steps = {"patches": planned.patches, "vectors": planned.vectors, "extras": planned.extras}
        steps["renamed"] = {file: bundle.renamed for file, bundle in planned.bundles.items()}
        show({**steps, "touched": planned.touched, "left_out": planned.base.copies}, as_json)
    else:
        show(planned, as_json, planned.table(every=every))
