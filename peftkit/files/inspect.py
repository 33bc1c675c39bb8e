"""What is in an adapter file, whether it is well, and how two differ. No base and no model is needed."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from peftkit.delta.distance import norm, relative
from peftkit.errors import ExportError, PeftkitError
from peftkit.files.bind import bind, described, misfit, needs_base, placeholder_weight
from peftkit.files.entries import canonical_items, delta_of
from peftkit.files.export import programs
from peftkit.files.export.names import require_readable
from peftkit.files.export.programs import Target
from peftkit.files.families import names
from peftkit.files.families.names import Family
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.files.read import Reading, read, read_all

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Inspected:
    """One module. norm: ‖ΔW‖ at strength 1, None where that depends on the base. problem: "" for a sound one."""

    name: str
    kind: str
    shape: str
    rank: int | None
    scale: str
    norm: float | None
    parameters: int
    problem: str = ""


@dataclass(frozen=True)
class Inspection:
    """All that a file says. loads: program -> "" if it reads the file as it is, else the reason it does not."""

    path: Path
    format: str
    name: str
    family: str
    modules: tuple[Inspected, ...]
    vectors: tuple[str, ...]
    metadata: dict[str, str]
    loads: dict[str, str]
    notes: tuple[str, ...]
    damage: tuple[str, ...] = ()  # what is wrong with the changes of biases and norms

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the file unusable in whole or in part."""
        return (*(f"{m.name}: {m.problem}" for m in self.modules if m.problem), *self.damage)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(m.kind for m in self.modules).items())
        ranks = sorted({m.rank for m in self.modules if m.rank is not None})
        total = sum(m.parameters for m in self.modules)
        norms = [m.norm for m in self.modules if m.norm is not None]  # of a broken module there is none
        lines = [
            f"{self.path}: {self.format} file{f' for {self.family}' if self.family else ''}, {kinds or 'no matrices'}",
            f"ranks {', '.join(map(str, ranks)) or 'none'}; {total:,} numbers; "
            + (
                f"‖ΔW‖ = {math.sqrt(sum(n * n for n in norms)):.4g} at strength 1"
                if norms
                else "‖ΔW‖ depends on the base"
            ),
            f"loads in: {', '.join(name for name, why in self.loads.items() if not why) or 'peftkit only'}",
        ]
        if self.vectors:
            lines.append(f"{len(self.vectors)} changes of biases and norms")
        lines += [f"problem: {problem}" for problem in self.problems[:8]]
        return "\n".join([*lines, *self.notes])

    def table(self) -> Table:
        """Every module, for rich to print."""
        table = Table("module", "kind", "weight", "rank", "scale", "‖ΔW‖", "problem")
        for m in self.modules:
            norm = "" if m.norm is None else f"{m.norm:.4g}"
            table.add_row(m.name, m.kind, m.shape, str(m.rank or ""), m.scale, norm, m.problem)
        return table


def inspect(path: str | os.PathLike[str], **reading: Unpack[Reading]) -> Inspection:
    """Read a file and say what is in it: kinds, ranks, scales and their origin, ‖ΔW‖, dead or broken modules.

    reading: as in `read`.
    """
    bundle = read(path, **reading)
    modules: list[Inspected] = []
    shapes: dict[str, tuple[int, int] | None] = {}
    structures: set[str] = set()
    for name in bundle.patches:
        patch = bundle.patches[name]
        modules.append(_inspected(name, patch, bundle.portable))
        sizes = (patch.shape.rows, patch.shape.columns)
        shapes[name] = sizes if all(sizes) else None
        structures |= {_structure(patch)} if bundle.format != "native" else set()
    family = next(iter(names.guess(shapes)), None)
    loads = {target.name: _why_not(target, bundle, structures, family) for target in programs.TARGETS.values()}
    notes = [f"{key}: no adapter in the header has it" for key in bundle.unclaimed]
    title = "" if family is None else family.title
    damage = [f"{key} is not finite" for key, v in bundle.vectors.items() if not torch.isfinite(v.float()).all()]
    return Inspection(
        Path(path),
        bundle.format,
        bundle.name,
        title,
        tuple(modules),
        tuple(bundle.vectors),
        dict(bundle.metadata),
        loads,
        tuple(notes),
        tuple(damage),
    )


@dataclass(frozen=True)
class Diagnosis:
    """Whether a file can be used. code: 0 it can, 1 in part (dead modules, stray tensors), 2 it cannot."""

    code: int
    findings: tuple[str, ...]

    def __str__(self) -> str:
        verdict = ("sound", "usable in part", "not usable")[self.code]
        return "\n".join([verdict, *self.findings])


def doctor(path: str | os.PathLike[str], **reading: Unpack[Reading]) -> Diagnosis:
    """Whether an adapter file can be used, with a code for scripts. Never raises for what is in the file.

    reading: as in `read`.
    """
    try:
        found = inspect(path, **reading)
    except PeftkitError as error:
        return Diagnosis(2, (str(error),))
    broken = [f"{m.name}: {m.problem}" for m in found.modules if m.problem and m.problem != _DEAD]
    broken += found.damage
    dead = [m.name for m in found.modules if m.problem == _DEAD]
    silent = [f"{len(dead)} of {len(found.modules)} modules do nothing: {dead[0]}, …"] if dead else []
    findings = [*broken, *silent, *found.notes]
    if broken or (dead and len(dead) == len(found.modules) and not found.vectors):
        return Diagnosis(2, tuple(findings))
    return Diagnosis(1 if findings else 0, tuple(findings))


@dataclass(frozen=True)
class Difference:
    """How two files differ. distances: module -> ‖ΔW₂ − ΔW₁‖/‖ΔW₁‖, for the modules both have."""

    distances: dict[str, float]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def equal(self) -> bool:
        """Whether they are the same change of the same weights, to the rounding of fp32."""
        return not any(self.only) and all(d < 1e-6 for d in self.distances.values())

    def __str__(self) -> str:
        worst = max(self.distances, key=lambda name: self.distances[name], default=None)
        same = sum(d < 1e-6 for d in self.distances.values())
        lines = [f"{len(self.distances)} modules in both, {same} of them equal"]
        if worst is not None and self.distances[worst] >= 1e-6:
            lines.append(f"most different: {worst} by {100 * self.distances[worst]:.3g} %")
        lines += [
            f"{len(own)} only in the {which}: {own[0]}, …"
            for own, which in zip(self.only, ("first", "second"), strict=True)
            if own
        ]
        return "\n".join(lines)


def diff(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> Difference:
    """How far the ΔW of two adapter files are apart, whatever their formats and kinds.

    base: for adapters that read theirs. other_base: accept one they were not trained on. reading: as in `read`.
    """
    files = list(zip((first, second), read_all([first, second], **reading), strict=True))
    ours, theirs = canonical_items(files, base, other_base)
    distances: dict[str, float] = {}
    for name in ours.keys() & theirs.keys():
        one, other = delta_of(ours[name]), delta_of(theirs[name])
        distances[name] = relative(one, other) if one.shape == other.shape else math.inf
    ordered = {name: distances[name] for name in ours if name in distances}
    return Difference(ordered, (tuple(n for n in ours if n not in theirs), tuple(n for n in theirs if n not in ours)))


# -- parts ----------------------------------------------------------------------------------------------------------

_DEAD = "ΔW is zero: it does nothing"


@torch.no_grad()
def _inspected(name: str, patch: Patch, portable: bool) -> Inspected:
    parameters = sum(tensor.numel() for tensor in patch.tensors.values())

    def said(norm: float | None, problem: str = "") -> Inspected:
        return Inspected(name, patch.kind, described(patch), patch.rank, patch.scale, norm, parameters, problem)

    broken = [key for key, tensor in patch.tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        return said(None, f"{broken[0]} is not finite")
    # What a file does not say of its weight's size, its tensors do not depend on
    shape = replace(patch.shape, rows=patch.shape.rows or 1, channels=patch.shape.channels or 1)
    try:
        found = misfit(patch, shape, torch.float32, portable=portable, where=name)
        if found:
            return said(None, found.first)
        if shape != patch.shape or needs_base(patch, shape, portable):
            return said(None)
        W = placeholder_weight(shape)
        size = norm(bind(patch, shape, W, name)(W, 1.0))
    except PeftkitError as error:
        return said(None, str(error))
    if not math.isfinite(size):
        return said(None, "ΔW is not finite")
    return said(size, "" if size else _DEAD)


def _structure(patch: Patch) -> str:
    """What a target calls this patch as it stands in its file."""
    if patch.kind == "dora":
        return f"dora {patch.options['inner']} {patch.options['axis']}"
    if patch.kind == "oft":
        return (
            "oft in" if patch.options.get("side") == "in" else "oft rescaled" if patch.options.get("rescale") else "oft"
        )
    tucker = " tucker" if patch.options.get("tucker") else ""
    return patch.kind + tucker


def _why_not(target: Target, bundle: AdapterFile, structures: set[str], family: Family | None) -> str:
    """Why a program does not read the file as it is, or ""."""
    if bundle.format == "native":
        return "it is this library's own format: export it"
    if (target.name == "peft") != (bundle.format == "peft"):
        return "PEFT reads a folder with its configuration, and nobody else does"
    for structure in sorted(structures):
        if not _reads(target, structure):
            return f"{target.title} has no {structure}"
    if target.name == "peft":
        return ""
    if family is None and target.generic is None:
        return f"{target.title} loads adapters of the models it knows"
    denoiser = "" if family is None else family.components[0]
    if family is not None and not programs.styles_read(target, family.name, denoiser, denoiser):
        return f"{target.title} does not load adapters of {family.title}"
    for name in bundle.patches:
        if not _named_for(target, name, family):
            return f"{target.title} does not look for {name!r}"
    if bundle.vectors and target.name not in ("comfyui", "forge"):
        return f"{target.title} leaves out changes of biases and norms, or fails on them"
    if family is not None:
        modules = [module for name in bundle.patches for module in family.find(name)]
        try:
            require_readable(modules, target, named=bundle.format)
        except ExportError as error:
            return str(error)
    return ""


def _reads(target: Target, structure: str) -> bool:
    word, *rest = structure.split(" ")
    if word == "dora":
        return (rest[0], rest[1]) in target.decomposes
    if rest == ["tucker"]:
        return (
            word in target.reads
            and target.name not in ("kohya", "diffusers")
            and (word != "lokr" or target.name == "a1111")
        )
    return structure in target.reads or (structure == "glora" and "glora old" in target.reads)


def _named_for(target: Target, name: str, family: Family | None) -> bool:
    if family is None:
        return target.generic is not None and name.startswith(target.generic)
    denoiser = family.components[0]
    return any(
        family.spelled(module.name, style) == name
        for module in family.find(name)
        for style in programs.styles_read(target, family.name, denoiser, module.name.partition(".")[0])
    )
