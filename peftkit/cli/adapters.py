"""Commands that write an adapter file from others: export, convert, resize, rescale and combine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from peftkit.cli.options import (
    KINDS,
    METHODS,
    TARGETS,
    Adapters,
    BaseOptions,
    Dtype,
    Factor,
    File,
    OutputOptions,
    RankOptions,
    ReadingOptions,
    among,
)
from peftkit.cli.strengths import strength_of, strengths
from peftkit.cli.terminal import dtype_of, warn
from peftkit.errors import OptionError


def export(
    file: File,
    output: OutputOptions,
    base: BaseOptions,
    reading: ReadingOptions,
    target: Annotated[str, among("--target", "-t", words=TARGETS)],
    family: Annotated[str | None, typer.Option(help="The model family, where names and shapes do not say it.")] = None,
    component: Annotated[str | None, typer.Option(help="Which part of a pipeline the file is for.")] = None,
    dtype: Dtype = None,
    bake: Annotated[bool, typer.Option("--bake", help="Write ΔW itself for adapters that read their base.")] = False,
    title: Annotated[str | None, typer.Option(help="For the metadata.")] = None,
    extras: Annotated[
        bool, typer.Option("--extras/--no-extras", help="Fail on parameters trained beside, or leave them out.")
    ] = True,
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json or its folder, where the base does not have it.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="The model's name on the hub or its folder, for a folder of PEFT.")
    ] = None,
) -> None:
    """Export an adapter file the way another program reads it.

    Example: peftkit export style.safetensors -t comfyui -o style-comfyui.safetensors
    """
    from peftkit.files.export.export import export as export_file

    output.write(
        lambda path: export_file(
            file,
            path,
            target,
            family=family,
            component=component,
            dtype=dtype_of(dtype),
            bake=bake,
            title=title or output.out.stem,
            extras=extras,
            config=config,
            model_name=model_name,
            overwrite=output.force,
            **base.given,
            **reading.given,
        ),
        file,
        base.base,
    )


def convert(
    file: File,
    output: OutputOptions,
    ranks: RankOptions,
    base: BaseOptions,
    reading: ReadingOptions,
    kind: Annotated[str, among("--kind", "-k", words=KINDS)],
    factor: Factor = 8,
    exact: Annotated[bool, typer.Option("--exact", help="Fail rather than write anything that differs.")] = False,
    dtype: Dtype = None,
) -> None:
    """Convert a file to another kind of the same ΔW, and say what is lost.

    Example: peftkit convert loha.safetensors -k lora --exact -o lora.safetensors
    """
    from peftkit.files.convert import convert as convert_file

    options = {**ranks.given, **base.given, **reading.given}
    output.write(
        lambda path: convert_file(
            file, path, kind, factor=factor, exact=exact, dtype=dtype_of(dtype), overwrite=output.force, **options
        ),
        file,
        base.base,
    )


def resize(
    file: File,
    output: OutputOptions,
    ranks: RankOptions,
    base: BaseOptions,
    reading: ReadingOptions,
    dtype: Dtype = None,
) -> None:
    """Resize every module to the best LoRA of fewer ranks.

    Example: peftkit resize style.safetensors --energy 0.95 -o small.safetensors
    """
    from peftkit.files.convert import resize as resize_file

    options = {**ranks.given, **base.given, **reading.given}
    report = output.write(
        lambda path: resize_file(file, path, dtype=dtype_of(dtype), overwrite=output.force, **options), file, base.base
    )
    if all(module.before == module.after for module in report.modules):
        warn("no module got fewer ranks: the file has so few already")


def rescale(
    file: File,
    factor: Annotated[list[str], typer.Argument(help="A number, PATTERN=NUMBER,… or RULES.json.")],
    output: OutputOptions,
) -> None:
    """Rescale ΔW by a factor, in all modules or by pattern; everything else in the file stays.

    Example: peftkit rescale style.safetensors 0.5 -o half.safetensors
    """
    from peftkit.files.rescale import rescale as rescale_file

    by = strength_of(",".join(factor))
    output.write(lambda path: rescale_file(file, by, path, overwrite=output.force), file)


def combine(
    files: Adapters,
    output: OutputOptions,
    base: BaseOptions,
    reading: ReadingOptions,
    method: Annotated[str, among("--method", "-m", words=METHODS)] = "linear",
    rank: Annotated[int | None, typer.Option(help="How many ranks to keep.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of ‖ΔW‖².")] = None,
    density: Annotated[float, typer.Option(help="What ties and dare keep of each file.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 0,
    dtype: Dtype = None,
) -> None:
    """Combine several files into one: the weighted sum of their ΔW.

    Example: peftkit combine style.safetensors=0.7 face.safetensors=0.5 -m svd --rank 32 -o both.safetensors
    """
    from peftkit.files.combine import combine as combine_files

    weights: dict[str | os.PathLike[str], float] = {}
    for name, weight in strengths(files).items():
        if isinstance(weight, Mapping):
            raise OptionError(f"{name} has strengths by pattern, a number was expected: combine weighs whole files")
        weights[name] = weight
    options = {**base.given, **reading.given}
    output.write(
        lambda path: combine_files(
            weights,
            path,
            method=method,
            rank=rank,
            energy=energy,
            density=density,
            seed=seed,
            dtype=dtype_of(dtype),
            overwrite=output.force,
            **options,
        ),
        base.base,
        *weights,
    )
