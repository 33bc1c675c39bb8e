"""From adapter file to adapter file: another kind, or fewer ranks. Errors are stated.

Modules keep the names they had, and the result the format: what kohya's tools read before, they read after.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import nn

from peftkit.delta import Delta, LowRank
from peftkit.delta.distance import relative
from peftkit.delta.truncation import Keep
from peftkit.errors import LossyError, OptionError, error_context
from peftkit.files.entries import AdapterEntry, delta_of, items_of_file
from peftkit.files.export.write import write_deltas
from peftkit.files.formats.disk import require_output
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.kinds import KINDS, Recipe, by_expert, cast, computing, keep_of, kind_of, shown, truncated
from peftkit.files.read import Reading, read
from peftkit.geometry import Shape
from peftkit.wrapping.listing import Row, listing

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: relative error that fp32 factors of an exact conversion stay below
EXACT = 1e-5

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Converted:
    """One module. before, after: kind and rank. error: ‖ΔW' − ΔW‖/‖ΔW‖, of what was really written."""

    name: str
    before: str
    after: str
    error: float


@dataclass(frozen=True)
class ConvertReport:
    """What became of every module. str(report) is one line, table() all of it."""

    path: Path
    modules: tuple[Converted, ...]
    before: int
    after: int

    @property
    def error(self) -> float:
        """The largest error of a module."""
        return max((m.error for m in self.modules), default=0.0)

    def __str__(self) -> str:
        size = f"{self.before / 1e6:.2f} MB to {self.after / 1e6:.2f} MB"
        return (
            f"{self.path}: {len(self.modules)} modules, {size}, error at most {100 * self.error:.3g} % of a module's ΔW"
        )

    def table(self, *, every: bool = True) -> Table:
        """Every module, for rich to print; every=False: one row for modules that are alike."""
        rows = [Row(m.name, (m.before, m.after), (100 * m.error,)) for m in self.modules]
        return listing(["before", "after"], {"error": "{:.3g} %".format}, rows, every=every)


def convert(
    source: Source,
    out: str | os.PathLike[str],
    kind: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    factor: int = 8,
    exact: bool = False,
    base: nn.Module | str | os.PathLike[str] | None = None,
    other_base: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool | None = None,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write the ΔW of an adapter file as another kind, under the same names and in the same format, at strength 1.

    Parameters that trained beside the adapters stay in the file as they are.

    Args:
        source: the adapter file, or a folder of PEFT.
        out: the file or the folder to write.
        kind: "lora", "loha", "lokr" (the nearest Kronecker product) or "full".
        rank: for lora and loha, how many ranks to keep. Without rank, energy and threshold, all there are.
        energy: for lora and loha, the share of ‖ΔW‖² to keep.
        threshold: for lora and loha, keep the singular values of at least this share of the largest.
        factor: the bound on the small factor of lokr.
        exact: raise LossyError, with the errors, rather than write a module that differs.
        base: for adapters that read theirs, whose ΔW holds for that base from then on.
        other_base: accept a base that the file was not trained on.
        dtype: of the tensors, by default that of the factors.
        overwrite: replace what is at `out`, as `require_output` says; by default a file that is not an input.
        **reading: as in `read`.

    Returns:
        A report of every module, with the error of what was really written.

    Raises:
        OptionError: an unknown kind, or ranks for a kind that has none.
        LossyError: with `exact`, a module that would differ.
        ExportError: a ΔW that depends on a base that is not given, or that memory cannot hold.
        FileError: a source that is no adapter file, or whose ΔW is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> report = pk.convert(path, "small.safetensors", "lora", rank=1)
        >>> report.modules[0].before, report.modules[0].after
        ('full', 'lora 1')
    """
    goal = kind_of(kind, KINDS)
    keep = keep_of(rank, energy, threshold)
    if keep is not None and not goal.ranked:
        raise OptionError(f"{kind} has no ranks to keep: leave out rank, energy and threshold")

    def change(item: AdapterEntry) -> Delta:
        return by_expert(
            lambda own, shape: goal.make(own[0], Recipe(shape, keep, factor)), [delta_of(item)], item.shape
        )

    path = require_output(out, [source, base], overwrite)
    return _rewrite(source, path, change, base, other_base, dtype, exact, reading)


def resize(
    source: Source,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    base: nn.Module | str | os.PathLike[str] | None = None,
    other_base: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool | None = None,
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write every module of an adapter file as a LoRA of fewer ranks, the best of that rank there is.

    Args:
        source: the adapter file, or a folder of PEFT.
        out: the file or the folder to write.
        rank: how many ranks to keep; one of rank, energy and threshold has to be given.
        energy: the share of ‖ΔW‖² to keep.
        threshold: keep the singular values of at least this share of the largest.
        base: for adapters that read theirs, whose ΔW holds for that base from then on.
        other_base: accept a base that the file was not trained on.
        dtype: of the tensors, by default that of the factors.
        overwrite: replace what is at `out`, as `require_output` says; by default a file that is not an input.
        **reading: as in `read`.

    Returns:
        A report of every module, with the error of what was really written.

    Raises:
        OptionError: none, or more than one, of rank, energy and threshold.
        ExportError: a ΔW that depends on a base that is not given, or that memory cannot hold.
        FileError: a source that is no adapter file, or whose ΔW is not finite.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> pk.resize(path, "small.safetensors", energy=0.95).modules[0].after
        'lora 1'
    """
    keep = Keep(rank, energy, threshold)
    path = require_output(out, [source, base], overwrite)

    def change(item: AdapterEntry) -> Delta:
        return by_expert(lambda own, _: truncated(own[0], keep), [delta_of(item)], item.shape)

    return _rewrite(source, path, change, base, other_base, dtype, False, reading)


@torch.no_grad()
def _rewrite(
    source: Source,
    out: Path,
    change: Callable[[AdapterEntry], Delta],
    base: nn.Module | str | os.PathLike[str] | None,
    other_base: bool,
    dtype: torch.dtype | None,
    exact: bool,
    reading: Reading,
) -> ConvertReport:
    """Write what `change` makes of every module of a file."""
    with error_context(source, out):
        bundle = read(source, **reading)
        items = list(items_of_file(source, bundle, base, other_base))
        return _changed(bundle, out, items, change, dtype, exact)


def alpha_of(like: AdapterFile, deltas: Sequence[Delta]) -> float | None:
    """The alpha that all low-rank modules of a file of this format share; None where they have none."""
    ranks = [delta.rank for delta in deltas if delta.structure == LowRank.structure]
    return float(Counter(ranks).most_common(1)[0][0] or 0) if ranks and like.format == "kohya" else None


def _changed(
    like: AdapterFile,
    out: Path,
    items: Sequence[AdapterEntry],
    change: Callable[[AdapterEntry], Delta],
    dtype: torch.dtype | None,
    exact: bool,
) -> ConvertReport:
    deltas: list[tuple[str, Shape, Delta]] = []
    transposed: list[str] = []
    report: list[Converted] = []
    for item in items:
        with computing(item.file, item.name):
            # a column is as small as it is, and no kind but full adapts a norm or a bias
            deltas.append((item.name, item.shape, delta_of(item) if item.vector else change(item)))
        transposed += [item.name] if item.transposed else []
    alpha = alpha_of(like, [delta for _, _, delta in deltas])
    for item, (_, _, delta) in zip(items, deltas, strict=True):
        rank = item.adapter.options.get("rank")
        before = item.adapter.kind + (f" {rank}" if rank else "")
        with computing(item.file, item.name):
            error = relative(delta_of(item), cast(delta, dtype, alpha))
        report.append(Converted(item.name, before, shown(delta), error))
    lossy = [m for m in report if m.error > EXACT]
    if exact and lossy:
        worst = max(lossy, key=lambda m: m.error)
        raise LossyError(
            f"{len(lossy)} of {len(report)} modules would differ, most of all {worst.name} by {100 * worst.error:.3g} "
            "%; nothing was written. Leave out exact, or keep more ranks"
        )
    size = write_deltas(like, out, deltas, dtype, transposed, [item.name for item in items if item.embedding])
    return ConvertReport(out, tuple(report), like.size, size)
