"""What servers of language models ask of a folder of PEFT beside what PEFT asks: one rank, and modules they know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F

from peftkit.adapters import registry
from peftkit.delta import LowRank
from peftkit.errors import ExportError
from peftkit.files.export.job import Job
from peftkit.files.export.programs import Target
from peftkit.files.formats import peft


def require_served(found: Sequence[Job], goal: Target) -> None:
    """Refuse modules that a server ignores, or reads only beside others, and ranks that it has no room for.

    Raises:
        ExportError: there is one.
    """
    paths = {job.piece.module.removeprefix(peft.PREFIX) for job in found}
    for path in sorted(paths):
        around, _, name = path.rpartition(".")
        if goal.modules is not None and name not in goal.modules:
            raise ExportError(
                f"{path}: {goal.title} has adapters of {', '.join(sorted(goal.modules))}, and none of {name!r}; leave "
                "it out, or merge the adapter"
            )
        missing = [other for other in goal.companions.get(name, ()) if f"{around}.{other}" not in paths]
        if missing:
            raise ExportError(
                f"{path}: {goal.title} reads it only beside an adapter of {missing[0]}, which has none here; adapt "
                "that too, or merge the adapter"
            )
    most = max((job.piece.spelled.rank or 0 for job in found), default=0)
    if goal.most_ranks is not None and most > goal.most_ranks:
        raise ExportError(
            f"{goal.title} has room for {goal.most_ranks} ranks, and these adapters are of rank {most}: pk.resize(…, "
            f"rank={goal.most_ranks}) the file first, or merge the adapter"
        )


def at_one_rank(found: Sequence[Job], goal: Target) -> tuple[Sequence[Job], tuple[str, ...]]:
    """Return the same modules with factors of the largest rank, filled up with zeros, and what to say of that."""
    ranks = {job.piece.spelled.rank or 0 for job in found}
    note = f"smaller ranks are filled up to {max(ranks)} with zeros, as {goal.title} has one for all modules"
    return [_padded(job, max(ranks)) for job in found], (note,) if len(ranks) > 1 else ()


def _padded(job: Job, rank: int) -> Job:
    low = job.piece.spelled.form.lora
    assert low is not None  # servers read nothing else
    more = rank - low.rank
    if not more:
        return job
    form = registry.additive(LowRank(F.pad(low.B, (0, more)), F.pad(low.A, (0, 0, 0, more))))
    return replace(job, piece=replace(job.piece, spelled=replace(job.piece.spelled, form=form)))
