"""The command line: a thin skin over the public functions."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from peftkit._version import __version__
from peftkit.cli import bench, monitor
from peftkit.cli.terminal import DTYPES, ERR, OUT, dtype_of, number, progress_bar, reading, show, strengths, write
from peftkit.errors import OptionError, PeftkitError
from peftkit.files import inspect
from peftkit.files.combine import METHODS
from peftkit.files.combine import combine as combine_files
from peftkit.files.convert import KINDS, ConvertReport, convert
from peftkit.files.convert import resize as resize_file
from peftkit.files.export.export import ExportReport
from peftkit.files.export.export import export as export_file
from peftkit.files.export.programs import TARGETS
from peftkit.files.extract import ExtractReport, extract
from peftkit.files.merge import merge_checkpoint
from peftkit.files.merge_plan import plan_merge
from peftkit.files.rescale import rescale as rescale_file

app = typer.Typer(
    help="Adapters in files: look into them, merge them, and turn them into what other programs read.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(monitor.app, name="monitor")
app.add_typer(bench.app, name="bench")

File = Annotated[Path, typer.Argument(help="An adapter file, or a folder of PEFT.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Dtype = Annotated[str | None, typer.Option(help=f"Of the tensors: {', '.join(DTYPES)}.")]
BaseOption = Annotated[Path | None, typer.Option("--base", help="The checkpoint the adapter is for.")]
Rank = Annotated[int | None, typer.Option(help="How many ranks to keep.")]
Energy = Annotated[float | None, typer.Option(help="Keep this share of ‖ΔW‖².")]
Threshold = Annotated[float | None, typer.Option(help="Keep singular values of this share of the largest.")]


DoraAxis = Annotated[str | None, typer.Option(help="out or in: what a file's square DoRA vector is per.")]
AlphaZero = Annotated[str | None, typer.Option(help="off or rank: what α = 0 means in a file.")]
OtherBase = Annotated[
    bool, typer.Option("--other-base", help="Accept a base other than the one a file was trained on.")
]
Ignore = Annotated[list[str] | None, typer.Option(help="Patterns of keys in adapter files to leave out.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .pt, .ckpt and .bin files, as data only.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Exit codes: 0 done; 1 files differ, or are usable in part; 2 bad input or usage, and nothing was written."""
    if version:
        OUT.print(__version__)
        raise typer.Exit


@app.command("inspect")
def inspect_(
    file: File,
    modules: Annotated[bool, typer.Option(help="List every module.")] = True,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """What is in a file: kinds, ranks, scales, norms, dead modules, and which programs load it.

    Example: peftkit inspect style.safetensors
    """
    found = inspect.inspect(file, **reading(dora_axis, alpha_zero, ignore, allow_pickle))
    show(found, as_json, found.table() if modules else None)


@app.command()
def doctor(
    file: File,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Whether a file can be used; the exit code is 0 for yes, 1 for in part, 2 for no.

    Example: peftkit doctor style.safetensors && cp style.safetensors models/Lora/
    """
    found = inspect.doctor(file, **reading(dora_axis, alpha_zero, ignore, allow_pickle))
    show(found, as_json)
    raise typer.Exit(found.code)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="An adapter file.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    base: BaseOption = None,
    other_base: OtherBase = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """How far the ΔW of two files are apart, whatever their formats; the exit code is 1 if they differ.

    Example: peftkit diff style.safetensors style-a1111.safetensors
    """
    found = inspect.diff(
        first, second, base=base, other_base=other_base, **reading(dora_axis, alpha_zero, ignore, allow_pickle)
    )
    table = Table("module", "‖ΔW₂ − ΔW₁‖/‖ΔW₁‖")
    for name, value in found.distances.items():
        table.add_row(name, f"{value:.3g}")
    show(found, as_json, table)
    raise typer.Exit(0 if found.equal else 1)


Adapters = Annotated[
    list[str],
    typer.Argument(
        help="FILE, FILE=STRENGTH, or FILE=RULES.json with {pattern: strength}.", metavar="FILE[=STRENGTH]..."
    ),
]
Rebase = Annotated[
    str, typer.Option(help="reapply, or transplant from --origin, what adapters do that read their base.")
]
Origin = Annotated[Path | None, typer.Option(help="The base the adapters were trained on.")]


@app.command()
def plan(
    base: Annotated[Path, typer.Argument(help="The checkpoint: a file, a folder of shards, or of a pipeline.")],
    adapters: Adapters,
    dtype: Dtype = None,
    rebase: Rebase = "reapply",
    origin: Origin = None,
    other_base: OtherBase = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """What a merge would do: the place of every tensor of every file in the base. Writes nothing.

    Example: peftkit plan sd15.safetensors style.safetensors=0.8 face.safetensors=-0.3
    """
    planned = plan_merge(
        base,
        strengths(adapters),
        dtype=dtype_of(dtype),
        rebase=rebase,
        origin=origin,
        other_base=other_base,
        **reading(dora_axis, alpha_zero, ignore, allow_pickle),
    )
    show(planned, as_json, planned.table())


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="The checkpoint: a file, a folder of shards, or of a pipeline.")],
    adapters: Adapters,
    out: Out,
    dtype: Dtype = None,
    rebase: Rebase = "reapply",
    origin: Origin = None,
    other_base: OtherBase = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back before it takes its name.")] = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a checkpoint, file to file, in little memory. Planned first, all or nothing.

    Example: peftkit merge sd15.safetensors style.safetensors=0.8 face.safetensors=-0.3 -o merged.safetensors
    """
    if dry_run:
        given = (dora_axis, alpha_zero, ignore, allow_pickle)
        plan(base, adapters, dtype, rebase, origin, other_base, *given, as_json)
        return
    with progress_bar("merging", as_json) as progress:
        report = merge_checkpoint(
            base,
            strengths(adapters),
            out,
            dtype=dtype_of(dtype),
            rebase=rebase,
            origin=origin,
            other_base=other_base,
            verify=verify,
            progress=progress,
            **reading(dora_axis, alpha_zero, ignore, allow_pickle),
        )
    show(report, as_json)


@app.command()
def export(
    file: File,
    out: Out,
    target: Annotated[str, typer.Option("--target", "-t", help=f"One of {', '.join(TARGETS)}.")],
    base: BaseOption = None,
    family: Annotated[str | None, typer.Option(help="The model family, where names and shapes do not say it.")] = None,
    component: Annotated[str | None, typer.Option(help="Which part of a pipeline the file is for.")] = None,
    dtype: Dtype = None,
    bake: Annotated[bool, typer.Option("--bake", help="Write ΔW itself for adapters that read their base.")] = False,
    title: Annotated[str | None, typer.Option(help="For the metadata.")] = None,
    other_base: OtherBase = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write an adapter file the way another program reads it.

    Example: peftkit export style.safetensors -t comfyui -o style-comfyui.safetensors
    """

    def run(path: Path) -> ExportReport:
        return export_file(
            file,
            path,
            target,
            base=base,
            family=family,
            component=component,
            dtype=dtype_of(dtype),
            bake=bake,
            title=title or out.stem,
            other_base=other_base,
            **reading(dora_axis, alpha_zero, ignore, allow_pickle),
        )

    write(run, out, dry_run, as_json)


@app.command("convert")
def convert_(
    file: File,
    out: Out,
    kind: Annotated[str, typer.Option("--kind", "-k", help=f"One of {', '.join(KINDS)}.")],
    rank: Rank = None,
    energy: Energy = None,
    threshold: Threshold = None,
    factor: Annotated[int, typer.Option(help="The bound on LoKr's small factor.")] = 8,
    exact: Annotated[bool, typer.Option("--exact", help="Fail rather than write anything that differs.")] = False,
    base: BaseOption = None,
    dtype: Dtype = None,
    other_base: OtherBase = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the same ΔW as another kind, and say what it lost.

    Example: peftkit convert loha.safetensors -k lora --exact -o lora.safetensors
    """

    def run(path: Path) -> ConvertReport:
        options: dict[str, Any] = {"rank": rank, "energy": energy, "threshold": threshold, "factor": factor}
        options |= {
            "base": base,
            "other_base": other_base,
            **reading(dora_axis, alpha_zero, ignore, allow_pickle),
        }
        return convert(file, path, kind, exact=exact, dtype=dtype_of(dtype), **options)

    write(run, out, dry_run, as_json)


@app.command()
def resize(
    file: File,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    threshold: Threshold = None,
    base: BaseOption = None,
    dtype: Dtype = None,
    other_base: OtherBase = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write every module as the best LoRA of fewer ranks.

    Example: peftkit resize style.safetensors --energy 0.95 -o small.safetensors
    """

    def run(path: Path) -> ConvertReport:
        options: dict[str, Any] = {"rank": rank, "energy": energy, "threshold": threshold}
        options |= {
            "base": base,
            "other_base": other_base,
            **reading(dora_axis, alpha_zero, ignore, allow_pickle),
        }
        return resize_file(file, path, dtype=dtype_of(dtype), **options)

    write(run, out, dry_run, as_json)


@app.command(context_settings={"ignore_unknown_options": True})  # a factor may be negative
def rescale(
    file: File,
    factor: Annotated[list[str], typer.Argument(help="A number, or PATTERN=NUMBER for some modules.")],
    out: Out,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Multiply ΔW, in all modules or by pattern; everything else in the file stays.

    Example: peftkit rescale style.safetensors 0.5 -o half.safetensors
    """
    pairs = [text.rpartition("=") for text in factor]
    if len(pairs) > 1 and not all(sign for _, sign, _ in pairs):
        raise OptionError(f"{' '.join(factor)} was given, one number or PATTERN=NUMBER for each was expected")
    if len(pairs) == 1 and not pairs[0][1]:
        value: float | dict[str, float] = number(factor[0])
    else:
        value = {pattern: number(text) for pattern, _, text in pairs}
    write(lambda path: rescale_file(file, value, path), out, dry_run, as_json)


@app.command()
def combine(
    files: Adapters,
    out: Out,
    method: Annotated[str, typer.Option("--method", "-m", help=f"One of {', '.join(METHODS)}.")] = "linear",
    rank: Rank = None,
    energy: Energy = None,
    density: Annotated[float, typer.Option(help="What ties and dare keep of each file.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    base: BaseOption = None,
    dtype: Dtype = None,
    other_base: OtherBase = False,
    dora_axis: DoraAxis = None,
    alpha_zero: AlphaZero = None,
    ignore: Ignore = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the weighted sum of several files as one.

    Example: peftkit combine style.safetensors=0.7 face.safetensors=0.5 -m svd --rank 32 -o both.safetensors
    """
    weights = {}
    for name, weight in strengths(files).items():
        if isinstance(weight, Mapping):
            raise OptionError(f"{name}={weight!r} was given, a number was expected: combine weighs whole files")
        weights[name] = weight

    def run(path: Path) -> ConvertReport:
        options: dict[str, Any] = {"method": method, "rank": rank, "energy": energy, "density": density, "seed": seed}
        options |= {
            "base": base,
            "other_base": other_base,
            **reading(dora_axis, alpha_zero, ignore, allow_pickle),
        }
        return combine_files(weights, path, dtype=dtype_of(dtype), **options)

    write(run, out, dry_run, as_json)


@app.command("extract")
def extract_(
    tuned: Annotated[Path, typer.Argument(help="The tuned checkpoint.")],
    base: Annotated[Path, typer.Argument(help="The checkpoint it was tuned from.")],
    out: Out,
    kind: Annotated[str, typer.Option("--kind", "-k", help="lora, lokr or full.")] = "lora",
    rank: Rank = None,
    energy: Energy = None,
    threshold: Threshold = None,
    factor: Annotated[int, typer.Option(help="The bound on LoKr's small factor.")] = 8,
    targets: Annotated[list[str] | None, typer.Option(help="Patterns of weights; all by default.")] = None,
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write the difference of two checkpoints as an adapter, and say what of it is missing.

    Example: peftkit extract tuned.safetensors sd15.safetensors --rank 32 -o style.safetensors
    """

    def run(path: Path) -> ExtractReport:
        options: dict[str, Any] = {"rank": rank, "energy": energy, "threshold": threshold, "factor": factor}
        with progress_bar("extracting", as_json) as progress:
            return extract(
                tuned,
                base,
                path,
                kind,
                targets=targets or "*",
                dtype=dtype_of(dtype),
                allow_pickle=allow_pickle,
                progress=progress,
                **options,
            )

    write(run, out, dry_run, as_json)


def run() -> None:
    """The entry point: errors in one line, with an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show ‖ΔW‖ shows a question mark
    try:
        app()
    except (PeftkitError, OSError) as error:
        ERR.print(f"error: {error}", soft_wrap=True)
        sys.exit(2)
