"""Read an exported file back and compare what it says with the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from peftkit.adapters.base import placeholder_weight
from peftkit.delta import Delta, Dense
from peftkit.delta.as_low_rank import as_low_rank_stack
from peftkit.delta.distance import distance, ratio
from peftkit.errors import FileError, require_file
from peftkit.files.bind import bind
from peftkit.files.export.job import Job
from peftkit.files.export.peft_folder import stack_names
from peftkit.files.export.tensors import ModuleTensors
from peftkit.files.formats import container, peft
from peftkit.files.formats.patch import Patch
from peftkit.files.read import read


@dataclass(frozen=True)
class Exported:
    """How one weight went out.

    Attributes:
        weight: its name, or the names of the parts of a fused layer.
        written: the module's name in the file.
        kind: of the adapter.
        how: "exact", "low rank" or "baked".
        structure: the name of what was written.
        bytes: in the file.
        own: bytes of the adapter's parameters.
        error: ‖ΔW in the file − ΔW‖/‖ΔW‖, None where that takes a base that is not at hand.
        note: what a user should know.
    """

    weight: str
    written: str
    kind: str
    how: str
    structure: str
    bytes: int
    own: int
    error: float | None
    note: str = ""


@torch.no_grad()
def proven(written: Path, jobs: Sequence[Job], path: Path) -> tuple[Exported, ...]:
    """Read a file back and compare every ΔW in it with the adapters it was made of.

    Args:
        written: the file, or the folder.
        jobs: what it was made of.
        path: the name it will have, for errors.

    Raises:
        FileError: if a ΔW vanished in the file, or all of them are zero.
    """
    found = read(written)
    prefix = peft.PREFIX if written.is_dir() else ""
    patches = {job.piece.module: found.patches[job.piece.module.removeprefix(prefix)] for job in jobs}
    return compared(jobs, path, patches, _sizes(written, [job.piece for job in jobs]))


@torch.no_grad()
def compared(
    jobs: Sequence[Job], path: Path, patches: Mapping[str, Patch], sizes: Mapping[str, int]
) -> tuple[Exported, ...]:
    """Compare every ΔW that was read back with the adapters it was made of.

    Args:
        jobs: what a file was made of.
        path: of the file, for errors.
        patches: what was read back, by the names of the modules.
        sizes: the bytes of every tensor of the file, by its name.

    Raises:
        FileError: as `proven`.
    """
    errors: list[tuple[float | None, float | None]] = []
    for job in jobs:
        error, norm = _error(patches[job.piece.module], job)
        require_file(
            not norm or error is None or error < 1 - 1e-9,
            path,
            f"the ΔW of {job.piece.module} would be zero in the file; nothing was written. Choose a wider dtype",
        )
        errors.append((error, norm))
    if not any(norm is None or norm > 0 for _, norm in errors):
        raise FileError(
            f"{path}: every ΔW would be zero in the file, so loading it would do nothing; nothing was written"
        )
    return tuple(_exported(job, sizes, error) for job, (error, _) in zip(jobs, errors, strict=True))


def _exported(job: Job, sizes: Mapping[str, int], error: float | None) -> Exported:
    module, spelled = job.piece.module, job.piece.spelled
    return Exported(
        weight=", ".join(item.name for _, item in job.members),
        written=module,
        kind=job.kind,
        how=spelled.how,
        structure=spelled.structure,
        bytes=sum(size for key, size in sizes.items() if key.startswith(f"{module}.")),
        own=sum(p.nbytes for _, item in job.members for p in item.adapter.parameters()),
        error=error,
        note=spelled.note,
    )


def _sizes(written: Path, pieces: Sequence[ModuleTensors]) -> dict[str, int]:
    """The bytes of every tensor of a file, by the name of its module."""
    file = container.read(written / peft.WEIGHTS if written.is_dir() else written)
    stacks = {name: module for module, name in stack_names(pieces).items()}
    own = {key: key.rpartition(".lora_")[0] for key in file.infos}
    return {f"{stacks.get(own[key], own[key])}{key[len(own[key]) :]}": info.size for key, info in file.infos.items()}


def _error(patch: Patch, job: Job) -> tuple[float | None, float | None]:
    """‖ΔW read back − ΔW‖/‖ΔW‖, and ‖ΔW‖; None where that takes a base that is not at hand."""
    item = job.members[0][1]
    W, turned = placeholder_weight(job.piece.shape), not job.parts and item.turned
    if not job.parts and item.adapter.reads_base:
        if item.base is None:
            return None, None
        W = item.base
    read_on = placeholder_weight(job.piece.shape) if turned else W
    back = bind(patch, job.piece.shape, read_on, job.piece.module)(read_on, 1.0)
    if turned:
        back = as_low_rank_stack(back).turned
    truth = _fused_truth(job) if job.parts else item.adapter(W, 1.0)
    gap, norm = distance(truth, back)
    return ratio(gap, norm), norm


def _fused_truth(job: Job) -> Delta:
    """ΔW of a fused layer, from the adapters of its parts."""
    blocks = []
    for part in job.parts:
        if part.item is None:
            blocks.append(torch.zeros(part.rows, job.piece.shape.columns))
            continue
        W = placeholder_weight(part.item.shape) if part.item.base is None else part.item.base
        block = part.item.adapter(W, 1.0).dense()
        blocks.append(block.roll(part.rows // 2, 0) if part.swapped else block)
    return Dense(torch.cat(blocks))
