"""The difference of two checkpoints as an adapter, weight by weight and never both in memory."""

from __future__ import annotations

import fnmatch
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from peftkit.adapters.lokr import factorize
from peftkit.delta import Delta, Dense, Kron
from peftkit.delta.distance import relative
from peftkit.delta.truncation import Keep, nearest, nearest_kronecker
from peftkit.errors import MismatchError, OptionError, did_you_mean
from peftkit.files.base import Base, open_base
from peftkit.files.convert import cast
from peftkit.files.export.write import write_native
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import samples
from peftkit.files.place import FLOATS, paths_of
from peftkit.geometry import Shape

#: a LoKr of a difference that is not a Kronecker product says little: above this the report warns
_POOR = 0.5


@dataclass(frozen=True)
class Extracted:
    """One weight. rank: of the low-rank part, None for other kinds. lost: ‖X − ΔW‖/‖X‖ of its difference X."""

    weight: str
    rank: int | None
    norm: float  # ‖X‖
    lost: float


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted. unchanged: weights that are the same in both. left: changed tensors that are no layer's."""

    path: Path
    weights: tuple[Extracted, ...]
    unchanged: tuple[str, ...]
    left: tuple[str, ...]
    bytes: int
    left_norm: float = 0.0  # ‖X‖ of what was left out

    @property
    def lost(self) -> float:
        """The share of the whole difference that is not in the file, in the Frobenius norm."""
        total = sum(w.norm**2 for w in self.weights) + self.left_norm**2
        lost = sum((w.lost * w.norm) ** 2 for w in self.weights) + self.left_norm**2
        return math.sqrt(lost / total) if total else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.path}: {len(self.weights)} weights, {len(self.unchanged)} unchanged; {100 * self.lost:.3g} % of "
            f"the difference is not in it; {self.bytes / 1e6:.2f} MB"
        ]
        if self.left:
            lines.append(
                f"{len(self.left)} changed tensors are no layer's matrices and were left out: {self.left[0]}, …"
            )
        poor = [w for w in self.weights if w.lost > _POOR]
        if poor:
            lines.append(f"{len(poor)} weights lost more than half, {poor[0].weight} {100 * poor[0].lost:.3g} %")
        return "\n".join(lines)

    def table(self) -> Table:
        """Every weight, for rich to print."""
        table = Table("weight", "rank", "‖difference‖", "lost")
        for w in self.weights:
            table.add_row(w.weight, "" if w.rank is None else str(w.rank), f"{w.norm:.4g}", f"{100 * w.lost:.3g} %")
        return table


def extract(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: str = "lora",
    *,
    rank: int | None = None,
    energy: float | None = None,
    threshold: float | None = None,
    factor: int = 8,
    targets: str | Sequence[str] = "*",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write what a tuned checkpoint adds to its base as an adapter file of this library; `export` takes it further.

    kind: "lora" the best of so many ranks (by `rank`, by the share `energy` of ‖difference‖², or singular values of
    at least `threshold` of the largest); "lokr" the nearest Kronecker product, its small factor bounded by `factor`;
    "full" the difference itself. targets: patterns of weights. seed: of the random projections. progress: called with
    bytes read and bytes in all.

    Two weights at a time are in memory. Raises MismatchError for checkpoints of different models, or of equal ones.
    """
    kinds = ("lora", "lokr", "full")
    if kind not in kinds:
        hint = did_you_mean(kind, kinds)
        raise OptionError(f"kind={kind!r} was given, one of {', '.join(kinds)} was expected.{hint}")
    chosen = (rank, energy, threshold) != (None, None, None)
    if chosen != (kind == "lora"):
        raise OptionError(f"{kind} takes {'one of' if kind == 'lora' else 'none of'} rank, energy and threshold")
    keep = Keep(rank, energy, threshold) if chosen else None
    before, after = open_base(base, allow_pickle=allow_pickle), open_base(tuned, allow_pickle=allow_pickle)
    _require_same_model(before, after)
    patterns = [targets] if isinstance(targets, str) else list(targets)

    def targeted(*names: str) -> bool:
        matching = {p for p in patterns if any(fnmatch.fnmatchcase(name, p) for name in names)}
        used.update(matching)
        return bool(matching)

    deltas: list[tuple[str, Shape, Delta]] = []
    prints: dict[str, np.ndarray] = {}
    weights: list[Extracted] = []
    unchanged: list[str] = []
    left: list[str] = []
    left_square = 0.0
    used: set[str] = set()
    places: defaultdict[str, list[tuple[str, Placement]]] = defaultdict(list)
    for name, part in paths_of(before):
        if len(before.info(part.weight).shape) > 1:
            places[part.weight].append((name, part))
    done = 0
    for key in before.where:
        info = before.info(key)
        wanted = [(name, part) for name, part in places[key] if targeted(name, key)]
        if info.dtype in FLOATS and (wanted or (not places[key] and targeted(key))):
            W, X = _difference(before, after, key)
            norm = float(torch.linalg.vector_norm(X, dtype=torch.float64))
            if not math.isfinite(norm):
                raise MismatchError(f"{key}: the difference of {tuned} and {base} is not finite")
            if norm == 0:
                unchanged.append(key)
            elif not wanted:
                left.append(key)
                left_square += norm**2
            for name, part in wanted if norm else ():
                rows = X[part.start : part.stop]
                norm = float(torch.linalg.vector_norm(rows, dtype=torch.float64))
                if norm:
                    shape = Shape(len(rows), info.shape[1], tuple(info.shape[2:]))
                    delta = _adapter(rows, shape, kind, keep, factor, seed)
                    lost = relative(Dense(rows), cast(delta, dtype))
                    deltas.append((name, shape, delta))
                    prints[name] = samples(W[part.start : part.stop])
                    weights.append(Extracted(name, getattr(delta, "rank", None), norm, lost))
        done += info.size
        if progress is not None:
            progress(done, before.size)
    if set(patterns) - used:
        raise OptionError(f"targets: {sorted(set(patterns) - used)[0]!r} matches no tensor of {base}")
    if not deltas:
        raise MismatchError(
            f"{tuned} and {base} have no matrix that differs and that {patterns} match: nothing to extract"
        )
    size = write_native(Path(out), deltas, prints, Path(tuned).stem, dtype)
    return ExtractReport(Path(out), tuple(weights), tuple(unchanged), tuple(left), size, math.sqrt(left_square))


def _difference(before: Base, after: Base, key: str) -> tuple[Tensor, Tensor]:
    """W and tuned − W as matrices, the latter in at least fp32."""
    W, tuned = (
        base.tensor(key).flatten(1) if len(base.info(key).shape) > 1 else base.tensor(key) for base in (before, after)
    )
    wide = torch.float64 if torch.float64 in (W.dtype, tuned.dtype) else torch.float32
    return W, tuned.to(wide) - W.to(wide)


def _adapter(X: Tensor, shape: Shape, kind: str, keep: Keep | None, factor: int, seed: int) -> Delta:
    if kind == "full":
        return Dense(X)
    if kind == "lokr":
        C, D, _ = nearest_kronecker(X, (factorize(shape.rows, factor)[0], factorize(shape.channels, factor)[0]))
        return Kron(C, D)
    assert keep is not None
    return nearest(X, keep, seed=seed)[0]


def _require_same_model(before: Base, after: Base) -> None:
    odd = sorted(set(before.where) ^ set(after.where))
    if odd:
        where = before.path if odd[0] in before.where else after.path
        raise MismatchError(
            f"{before.path} and {after.path} are not one model: {odd[0]} is in {where} only ({len(odd)} such)"
        )
    for key in before.where:
        if before.info(key).shape != after.info(key).shape:
            shapes = f"{before.info(key).shape} and {after.info(key).shape}"
            raise MismatchError(f"{before.path} and {after.path} are not one model: {key} is {shapes}")
