"""Write adapters the way another program reads them: A1111, Forge, ComfyUI, sd-scripts, LyCORIS, diffusers, PEFT.

Every weight goes out in the program's own structure where that says the same ΔW, in another structure of the same ΔW
where it does not, baked against its base where neither is possible, or not at all, with the reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import nn

from peftkit.adapters.base import require_dtype
from peftkit.delta import Delta, Dense, LowRank
from peftkit.delta.as_low_rank import as_low_rank, side_by_side
from peftkit.delta.distance import distance, ratio
from peftkit.errors import ExportError, FileError, OptionError, error_context
from peftkit.files.bind import bind, placeholder_weight
from peftkit.files.entries import AdapterEntry, items_of_file, items_of_model
from peftkit.files.export import metadata, programs
from peftkit.files.export.encode import Encoding, encode
from peftkit.files.export.forms import Additive
from peftkit.files.export.names import family_of, named_modules
from peftkit.files.export.programs import Target
from peftkit.files.export.write import ModuleTensors, peft_type, shared_alpha, tensors_of, write_peft
from peftkit.files.families.names import Family, ModuleSpec
from peftkit.files.formats import container, peft
from peftkit.files.formats.patch import Patch
from peftkit.files.read import Reading, read
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Exported:
    """How one weight went out. error: ‖ΔW in the file − ΔW‖/‖ΔW‖, None where that takes a base that is not at hand.

    bytes: in the file; own: of the adapter's parameters.
    """

    weight: str
    written: str  # the module's name in the file
    kind: str
    how: str
    structure: str
    bytes: int
    own: int
    error: float | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Job:
    """One module to write, and what it is made of.

    parts: of a layer that is fused in the file, each item or None, its rows, and whether their halves are swapped.
    """

    piece: ModuleTensors
    kind: str
    members: list[tuple[ModuleSpec | None, AdapterEntry]]
    parts: tuple[tuple[AdapterEntry | None, int, bool], ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, weight by weight. str(report) is one line, table() all of it."""

    target: str
    path: Path
    weights: tuple[Exported, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing is bound to the base."""
        return all(w.how != "baked" for w in self.weights)

    def __str__(self) -> str:
        counts = Counter(w.how for w in self.weights)
        grown = sum(w.bytes for w in self.weights) / max(1, sum(w.own for w in self.weights))
        worst = max((w.error for w in self.weights if w.error is not None), default=0.0)
        notes = "".join(f"\n{note}" for note in sorted({w.note for w in self.weights if w.note}))
        said = ", ".join(f"{count} {how}" for how, count in counts.items())
        size = f"{grown:.2g} times the adapter's bytes"
        return f"{self.path} for {self.target}: {len(self.weights)} weights: {said}; {size}; error {worst:.2g}{notes}"

    def table(self) -> Table:
        """Every weight, for rich to print."""
        table = Table("weight", "in the file", "kind", "written as", "how", "error")
        for w in self.weights:
            table.add_row(w.weight, w.written, w.kind, w.structure, w.how, "" if w.error is None else f"{w.error:.2g}")
        return table


def export(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    target: str,
    *,
    name: str | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    family: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    bake: bool = False,
    title: str | None = None,
    training: Mapping[str, Any] | None = None,
    other_base: bool = False,
    **reading: Unpack[Reading],
) -> ExportReport:
    """Write the adapters of a wrapped model, or of any adapter file, for another program.

    target: "a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", or "peft", which gets a folder. name: which of
    several adapters. base: the model or the checkpoint that a file is for, where ΔW or names depend on it.
    family: the model's, for its names and labels ("sd15", "sdxl", "flux", …); found by itself where names and
    shapes say it. component: which part of a pipeline the source is, where its names do not tell ("text_encoder_2").
    dtype: of the tensors. bake: write ΔW itself for adapters that depend on their base. title, training: for the
    metadata; `training` may have any of kohya's ss_ and Stability's modelspec entries. other_base: accept a base that
    the file was not trained on. reading: as in `read`.

    The file is read back before it takes its name. Raises ExportError where the target has no words for an adapter.
    """
    goal = programs.get(target)
    require_dtype(dtype)
    path = Path(path)
    if goal.name != "peft" and path.suffix != ".safetensors":
        raise OptionError(f"{path}: {goal.title} reads *.safetensors, {path.suffix or 'no suffix'!r} was given")
    if isinstance(source, nn.Module):
        return _export(list(items_of_model(source, name)), path, goal, family, component, dtype, bake, title, training)
    with error_context(source):
        apart = goal.transformer_style != "kohya"  # the style that keeps the layers of the original network
        items = list(items_of_file(source, read(source, **reading), base, other_base, apart=apart))
        return _export(items, path, goal, family, component, dtype, bake, title, training)


def _export(
    items: Sequence[AdapterEntry],
    path: Path,
    goal: Target,
    family: str | None,
    component: str | None,
    dtype: torch.dtype | None,
    bake: bool,
    title: str | None,
    training: Mapping[str, Any] | None,
) -> ExportReport:
    for item in items:
        if item.flipped:
            raise ExportError(
                f"{item.name}: its layer keeps the weight as (in, out), as PEFT's fan_in_fan_out says, and other "
                "programs adapt no such layers; merge it, or convert and resize it, which keep the folder's kind"
            )
        if item.transposed:
            raise ExportError(
                f"{item.name}: no other program reads an adapter of a transposed convolution, whose weight is kept as "
                "(in, out); keep it in this library's own format"
            )
    known = family_of(items, family, component)
    modules = named_modules(items, goal, known, component)
    jobs = [_job(module, members, goal, known, bake) for module, members in modules.items()]
    structures = {job.piece.spelled.structure for job in jobs}
    if goal.name == "diffusers" and "dora" in structures and len(structures) > 1:
        # One magnitude makes diffusers expect one for every module, and leave those without unusable
        plain = replace(goal, decomposes=frozenset())
        jobs = [_job(module, members, plain, known, bake) for module, members in modules.items()]
    if goal.name == "peft":
        return _export_peft(path, jobs, dtype)
    pieces = [job.piece for job in jobs]
    alpha = shared_alpha(pieces)
    tensors = tensors_of(pieces, goal, alpha or 1.0, dtype, path)
    rank = None if alpha is None else int(alpha)
    own = {"kinds": sorted({j.kind for j in jobs}), "baked": [p.module for p in pieces if p.spelled.how == "baked"]}
    header = metadata.build(tensors, goal, known, title or path.stem, rank, alpha, training or {}, own)
    with container.atomic(path) as file:
        container.emit(file, tensors, header)
        file.flush()
        weights = _proven(Path(file.name), jobs, path)
    return ExportReport(goal.name, path, weights)


def _export_peft(path: Path, jobs: Sequence[Job], dtype: torch.dtype | None) -> ExportReport:
    found = peft_type([job.piece for job in jobs])
    if found is None:
        lora = replace(programs.get("peft"), reads=frozenset({"lora"}), decomposes=frozenset())
        jobs = [_job(job.piece.module, job.members, lora, None, bake=False) for job in jobs]
    kind, options = found or ("LORA", {"bias": "none"})
    with container.atomic_folder(path) as folder:
        write_peft(folder, [job.piece for job in jobs], kind, options, dtype)
        weights = _proven(folder, jobs, path)
    return ExportReport("peft", path, weights)


# -- how it is written -------------------------------------------------------------------------------------------------


def _job(
    module: str, members: list[tuple[ModuleSpec | None, AdapterEntry]], goal: Target, family: Family | None, bake: bool
) -> Job:
    kinds = "+".join(sorted({item.adapter.kind for _, item in members}))
    if goal.name == "diffusers" and module.startswith("text_encoder"):
        goal = replace(goal, decomposes=frozenset())  # it loses the magnitudes of text encoders
    try:
        (only, item), *others = members
        if not others and (only is None or not _fused(only, item, goal, family)):
            spelled = encode(item.adapter, goal, item.shape, item.base, bake=bake)
            return Job(ModuleTensors(module, spelled, item.shape), kinds, members)
        assert family is not None
        return _fuse(module, kinds, members, goal, family, bake)
    except ExportError as error:
        raise ExportError(f"{members[0][1].name}: {error}") from None


def _fused(module: ModuleSpec, item: AdapterEntry, goal: Target, family: Family | None) -> bool:
    """Whether the file's name means the original network's layer, whose rows are others or in another order."""
    if family is None or "transformer" not in family.components or goal.transformer_style != "kohya":
        return False
    turned = module.swapped and not family.swaps(item.name)
    return module.name.startswith("transformer.") and (module.start is not None or turned)


def _fuse(
    module: str,
    kinds: str,
    members: list[tuple[ModuleSpec | None, AdapterEntry]],
    goal: Target,
    family: Family,
    bake: bool,
) -> Job:
    """The parts of a fused layer as one low-rank ΔW, block by block: rank Σ r, and zero rows for parts without one."""
    by_name = {m.name: item for m, item in members if m is not None}
    columns = members[0][1].shape.columns
    blocks: list[tuple[LowRank | None, int, bool]] = []
    parts: list[tuple[AdapterEntry | None, int, bool]] = []
    hows: set[str] = set()
    for part in family.find(module):
        item = by_name.get(part.name)
        rows = part.shape[0] if item is None else item.shape.rows
        turned = part.swapped and not (item is not None and family.swaps(item.name))
        parts.append((item, rows, turned))
        if item is None:
            blocks.append((None, rows, turned))
            continue
        own = encode(item.adapter, goal, item.shape, item.base, bake=bake)
        assert isinstance(own.form, Additive)
        blocks.append((as_low_rank(own.form.delta), rows, turned))
        hows.add(own.how if own.structure == "lora" else "low rank")
    delta = side_by_side(blocks, columns)
    how = next(h for h in ("baked", "low rank", "exact") if h in hows)
    shape = Shape(sum(rows for _, rows, _ in parts), columns)
    return Job(ModuleTensors(module, Encoding(how, "lora", Additive(delta)), shape), kinds, members, tuple(parts))


# -- proof -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _proven(written: Path, jobs: Sequence[Job], path: Path) -> tuple[Exported, ...]:
    """Read the file back and hold what it says against the adapters. Raises FileError if nothing in it is alive."""
    bundle = read(written)
    sizes = _sizes(written)
    alive = False
    entries = []
    for job in jobs:
        piece = job.piece
        patch = bundle.patches[piece.module.removeprefix(peft.PREFIX) if bundle.format == "peft" else piece.module]
        error, norm = _error(patch, job)
        alive = alive or norm is None or norm > 0
        if error is not None and error >= 1 - 1e-9 and norm:
            raise FileError(
                f"{path}: the ΔW of {piece.module} would be zero in the file; nothing was written. Choose a wider dtype"
            )
        own = sum(p.nbytes for _, item in job.members for p in item.adapter.parameters())
        names_ = ", ".join(item.name for _, item in job.members)
        spelled = piece.spelled
        size = sum(size for key, size in sizes.items() if key.startswith(f"{piece.module}."))
        entries.append(
            Exported(names_, piece.module, job.kind, spelled.how, spelled.structure, size, own, error, spelled.note)
        )
    if not alive:
        raise FileError(
            f"{path}: every ΔW would be zero in the file, so loading it would do nothing; nothing was written"
        )
    return tuple(entries)


def _sizes(written: Path) -> dict[str, int]:
    file = container.read(written / peft.WEIGHTS if written.is_dir() else written)
    return {key: info.size for key, info in file.infos.items()}


def _error(patch: Patch, job: Job) -> tuple[float | None, float | None]:
    """‖ΔW read back − ΔW‖/‖ΔW‖, and ‖ΔW‖; None where that takes a base that is not at hand."""
    bases = [item.base for _, item in job.members]
    W = placeholder_weight(job.piece.shape)
    if any(item.adapter.reads_base for _, item in job.members) and not job.parts:
        if bases[0] is None:
            return None, None
        W = bases[0]
    back = bind(patch, job.piece.shape, W, job.piece.module)(W, 1.0)
    truth = _fused_truth(job) if job.parts else job.members[0][1].adapter(W, 1.0)
    gap, norm = distance(truth, back)
    return ratio(gap, norm), norm


def _fused_truth(job: Job) -> Delta:
    """ΔW of a fused layer, from the adapters of its parts."""
    blocks = []
    for item, rows, swapped in job.parts:
        if item is None:
            blocks.append(torch.zeros(rows, job.piece.shape.columns))
            continue
        W = placeholder_weight(item.shape) if item.base is None else item.base
        block = item.adapter(W, 1.0).dense()
        blocks.append(block.roll(rows // 2, 0) if swapped else block)
    return Dense(torch.cat(blocks))
