"""Commands on checkpoints: merge adapters into one, extract the difference of two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli import reports
from peftkit.cli.options import (
    EXTRACTED,
    Adapters,
    Checkpoint,
    Dtype,
    Factor,
    OutputOptions,
    PartOptions,
    RankOptions,
    ReadingOptions,
    RebaseOptions,
    Rename,
    Variant,
    among,
)
from peftkit.cli.strengths import rules, strengths
from peftkit.cli.terminal import dtype_of, progress_bar, show, warn

#: the share of ΔW above which what the dtype loses is worth a warning: by then most of the adapter is not there
_LOST = 0.5


def merge(
    base: Checkpoint,
    adapters: Adapters,
    output: OutputOptions,
    rebase: RebaseOptions,
    part: PartOptions,
    reading: ReadingOptions,
    dtype: Dtype = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back before it takes its name.")] = False,
) -> None:
    """Merge adapters into a checkpoint, file to file, in little memory. Planned first, all or nothing.

    Example: peftkit merge sd15.safetensors style.safetensors=0.8 face.safetensors=-0.3 -o merged.safetensors
    """
    given = strengths(adapters)
    if output.dry_run:
        from peftkit.files.formats.disk import require_output

        require_output(output.out, [base, rebase.origin, *given], output.force)
        reports.plan_of_merge(base, adapters, rebase, part, reading, dtype, output.every, output.as_json)
        output.conclude()
        return
    from peftkit.files.merge import merge_checkpoint

    with progress_bar("merging", output.as_json) as progress:
        report = merge_checkpoint(
            base,
            given,
            output.out,
            dtype=dtype_of(dtype),
            verify=verify,
            overwrite=output.force,
            progress=progress,
            **rebase.given,
            **part.given,
            **reading.given,
        )
    show(report, output.as_json, report.table() if output.every else None)
    if report.lost > _LOST:
        warn(f"{100 * report.lost:.2g} % of ΔW is lost to the checkpoint's dtype: merge with --dtype fp32")
    output.conclude()


def extract(
    tuned: Annotated[Path, typer.Argument(help="The tuned checkpoint.")],
    base: Annotated[Path, typer.Argument(help="The checkpoint it was tuned from.")],
    output: OutputOptions,
    ranks: RankOptions,
    kind: Annotated[str, among("--kind", "-k", words=EXTRACTED)] = "lora",
    factor: Factor = 8,
    targets: Annotated[list[str] | None, typer.Option(help="Patterns of weights; all by default.")] = None,
    rename: Rename = None,
    dtype: Dtype = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .ckpt and .bin files, as data only.")
    ] = False,
    variant: Variant = None,
) -> None:
    """Extract the difference of two checkpoints as an adapter, and say what of it is missing.

    Example: peftkit extract tuned.safetensors sd15.safetensors --rank 32 -o style.safetensors
    """
    from peftkit.files.extract import ExtractReport
    from peftkit.files.extract import extract as extract_file

    def make(path: Path) -> ExtractReport:
        with progress_bar("extracting", output.as_json) as progress:
            return extract_file(
                tuned,
                base,
                path,
                kind,
                factor=factor,
                targets=targets or "*",
                rename=rules(rename or []),
                dtype=dtype_of(dtype),
                allow_pickle=allow_pickle,
                variant=variant,
                overwrite=output.force,
                progress=progress,
                **ranks.given,
            )

    output.write(make, tuned, base)
