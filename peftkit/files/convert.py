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
from torch import Tensor, nn

from peftkit.adapters.lokr import factorize
from peftkit.delta import Delta, Dense, Hadamard, Kron, LowRank
from peftkit.delta.as_low_rank import as_low_rank
from peftkit.delta.distance import relative
from peftkit.delta.truncation import Keep, nearest, nearest_kronecker, truncate
from peftkit.errors import ExportError, LossyError, OptionError, did_you_mean, error_context
from peftkit.files.entries import AdapterEntry, delta_of, items_of_file
from peftkit.files.export.write import write_deltas
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.read import Reading, read
from peftkit.geometry import Shape

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: what `convert` can make, and what it takes: none, or ranks to keep
KINDS = ("lora", "loha", "lokr", "full")

#: relative error that fp32 factors of an exact conversion stay below
EXACT = 1e-5

#: entries of the largest ΔW that is written whole; the embeddings of the largest models have as many
_LARGEST = 2**32

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

    def table(self) -> Table:
        """Every module, for rich to print."""
        table = Table("module", "before", "after", "error")
        for m in self.modules:
            table.add_row(m.name, m.before, m.after, f"{100 * m.error:.3g} %")
        return table


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
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write the same ΔW as another kind: "lora", "loha", "lokr" or "full".

    rank, energy, threshold: for lora and loha, keep so many ranks, such a share of ‖ΔW‖², or singular values of at
    least that share of the largest; without them every rank there is. factor: the bound on the small factor of lokr,
    the nearest Kronecker product. base: for adapters that read theirs, whose ΔW holds for that base from then on.
    other_base: accept a base that the file was not trained on. reading: as in `read`.
    exact: raise LossyError, with the errors, rather than write a module that differs.
    """
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise OptionError(f"kind={kind!r} was given, one of {', '.join(KINDS)} was expected.{hint}")
    keep = Keep(rank, energy, threshold) if (rank, energy, threshold) != (None, None, None) else None
    if keep is not None and kind in ("lokr", "full"):
        raise OptionError(f"{kind} has no ranks to keep: leave out rank, energy and threshold")

    def change(item: AdapterEntry) -> Delta:
        delta = delta_of(item)
        if kind == "full":
            return Dense(dense(delta))
        if kind == "lokr":
            return delta if isinstance(delta, Kron) else _kronecker(item, delta, factor)
        if kind == "loha" and isinstance(delta, Hadamard) and keep is None:
            return delta
        low = as_low_rank(delta) if keep is None else truncated(delta, keep)
        return low if kind == "lora" else _loha(low)

    return _rewrite(source, out, change, base, other_base, dtype, exact, reading)


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
    **reading: Unpack[Reading],
) -> ConvertReport:
    """Write every module as a LoRA of fewer ranks, the best of that rank there is. See `convert` for the options."""
    keep = Keep(rank, energy, threshold)
    return _rewrite(source, out, lambda item: truncated(delta_of(item), keep), base, other_base, dtype, False, reading)


# -- ΔW to ΔW ----------------------------------------------------------------------------------------------------------


def truncated(delta: Delta, keep: Keep) -> LowRank:
    """The best low-rank ΔW of the ranks to keep."""
    if isinstance(delta, (LowRank, Hadamard, Kron)):
        low = as_low_rank(delta)
        if low.rank < min(low.shape):
            return truncate(low, keep)[0]
    return nearest(dense(delta), keep)[0]


def dense(delta: Delta) -> Tensor:
    """ΔW itself, where memory can be expected to hold it: small factors can claim any size."""
    m, n = delta.shape
    if m * n > _LARGEST:
        raise ExportError(f"a ΔW of {m}×{n} is larger than any weight, and is not written out")
    return delta.dense()


def _loha(low: LowRank) -> Hadamard:
    """B·A ⊙ 1·1ᵀ: the same matrix, with a second product of ones in its first rank."""
    up, down = torch.zeros_like(low.B), torch.zeros_like(low.A)
    up[:, 0], down[0] = 1, 1
    return Hadamard(low.B, low.A, up, down)


def _kronecker(item: AdapterEntry, delta: Delta, factor: int) -> Kron:
    outer = factorize(item.shape.rows, factor)[0], factorize(item.shape.channels, factor)[0]
    C, D, _ = nearest_kronecker(dense(delta), outer)
    return Kron(C, D)


def cast(delta: Delta, dtype: torch.dtype | None, alpha: float | None = None) -> Delta:
    """The ΔW that factors kept in a dtype stand for. alpha: the one a file has for all, with the rest in B."""
    if dtype is None:
        return delta

    def kept(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(tensor.dtype)

    if isinstance(delta, LowRank):
        fold = 1.0 if alpha is None else delta.rank / alpha
        return LowRank(kept(delta.B * fold) / fold, kept(delta.A))
    if isinstance(delta, Hadamard):
        return Hadamard(kept(delta.B1), kept(delta.A1), kept(delta.B2), kept(delta.A2))
    if isinstance(delta, Kron):
        return Kron(kept(delta.C), kept(delta.right), None if delta.left is None else kept(delta.left))
    return Dense(kept(delta.dense()))


def alpha_of(like: AdapterFile, deltas: Sequence[Delta]) -> float | None:
    """The alpha that all low-rank modules of a file of this format share; None where they have none."""
    ranks = [delta.rank for delta in deltas if isinstance(delta, LowRank)]
    return float(Counter(ranks).most_common(1)[0][0]) if ranks and like.format == "kohya" else None


def shown(delta: Delta) -> str:
    """Kind and rank, for a report."""
    if isinstance(delta, LowRank):
        return f"lora {delta.rank}"
    if isinstance(delta, Hadamard):
        return f"loha {delta.rank}"
    return "lokr" if isinstance(delta, Kron) else "full"


# -- files -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _rewrite(
    source: Source,
    out: str | os.PathLike[str],
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
        return _changed(bundle, Path(out), items, change, dtype, exact)


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
        deltas.append((item.name, item.shape, change(item)))
        transposed += [item.name] if item.transposed else []
    alpha = alpha_of(like, [delta for _, _, delta in deltas])
    for item, (_, _, delta) in zip(items, deltas, strict=True):
        rank = item.adapter.options.get("rank")
        before = item.adapter.kind + (f" {rank}" if rank else "")
        error = relative(delta_of(item), cast(delta, dtype, alpha))
        report.append(Converted(item.name, before, shown(delta), error))
    lossy = [m for m in report if m.error > EXACT]
    if exact and lossy:
        worst = max(lossy, key=lambda m: m.error)
        raise LossyError(
            f"{len(lossy)} of {len(report)} modules would differ, most of all {worst.name} by {100 * worst.error:.3g} "
            "%; nothing was written. Leave out exact, or keep more ranks"
        )
    size = write_deltas(like, out, deltas, dtype, transposed)
    return ConvertReport(out, tuple(report), like.size, size)
