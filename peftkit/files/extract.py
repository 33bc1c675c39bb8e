"""The difference of two checkpoints as an adapter, weight by weight and never both in memory."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from peftkit.delta import Delta, Dense
from peftkit.delta.distance import relative
from peftkit.delta.truncation import Keep
from peftkit.errors import MismatchError, OptionError, error_context, require_option
from peftkit.files.base import Base
from peftkit.files.export.write import write_native
from peftkit.files.families.layouts import Placement
from peftkit.files.fingerprint import samples
from peftkit.files.formats.disk import require_output
from peftkit.files.kinds import Kind, Recipe, cast, computing, keep_of, kind_of
from peftkit.files.patterns import Selection
from peftkit.files.place import FLOATS, paths_of
from peftkit.files.quantised import open_plain
from peftkit.files.rename import Renames, nearest_rule
from peftkit.geometry import Shape
from peftkit.wrapping.listing import Row, listing

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

    def table(self, *, every: bool = True) -> Table:
        """Every weight, for rich to print; every=False: one row for weights that are alike."""
        measures = {"‖difference‖": "{:.4g}".format, "lost": "{:.3g} %".format}
        rows = [Row(w.weight, ("" if w.rank is None else str(w.rank),), (w.norm, 100 * w.lost)) for w in self.weights]
        return listing(["rank"], measures, rows, every=every)


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
    rename: Mapping[str, str] = MappingProxyType({}),
    dtype: torch.dtype | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    variant: str | None = None,
    overwrite: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Write what a tuned checkpoint adds to its base as an adapter file of this library; `export` takes it further.

    Two weights at a time are in memory. Quantised weights are dequantised as they are read.

    Args:
        tuned: the checkpoint of which the difference is taken: a file, an index or a folder.
        base: the checkpoint that was tuned.
        out: the *.safetensors file to write.
        kind: "lora", the best of so many ranks; "lokr", the nearest Kronecker product; "full", the difference itself.
        rank: for lora, how many ranks to keep.
        energy: for lora, the share of ‖difference‖² to keep.
        threshold: for lora, keep the singular values of at least this share of the largest.
        factor: the bound on the small factor of lokr.
        targets: patterns of modules and weights.
        rename: {pattern: replacement} over the names of the tuned checkpoint's modules and tensors, as in `read`, where
            they are others than the base's.
        dtype: of the tensors, by default that of the factors.
        seed: of the random projections.
        allow_pickle: read checkpoints that are pickles, as data.
        variant: of the files of both checkpoints' folders, such as "fp16"; by default the plain ones.
        overwrite: replace what is at `out`, as `require_output` says; by default a file that is not an input.
        progress: called with bytes read and bytes in all.

    Returns:
        A report of every weight, and of what is not in the file.

    Raises:
        MismatchError: checkpoints of different models, equal ones, or a difference that is not finite.
        OptionError: an unknown kind, ranks for a kind that has none, or a pattern that matches nothing.
        FileError: a checkpoint that is damaged, or that is written to meanwhile.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"0.weight": torch.zeros(8, 8)}, "base.safetensors")
        >>> save_file({"0.weight": torch.ones(8, 8)}, "tuned.safetensors")
        >>> report = pk.extract("tuned.safetensors", "base.safetensors", "difference.safetensors", rank=1)
        >>> report.weights[0].weight, report.weights[0].norm
        ('0', 8.0)
    """
    goal, keep = kind_of(kind, _KINDS), keep_of(rank, energy, threshold)
    if (keep is not None) != goal.ranked:
        raise OptionError(f"{kind} takes {'one of' if goal.ranked else 'none of'} rank, energy and threshold")
    path = require_output(out, [tuned, base], overwrite)
    before, after = (open_plain(each, allow_pickle=allow_pickle, variant=variant) for each in (base, tuned))
    chosen, made = Selection(targets), _Extraction(goal, keep, factor, seed, dtype)
    with error_context(f"{tuned} and {base}", tuned, base):
        theirs = _counterparts(before, after, rename)
        made.take(before, after, theirs, chosen, progress or (lambda done, total: None))
    if chosen.unmatched:
        raise OptionError(f"targets: {chosen.unmatched[0]!r} matches no tensor of {base}")
    if not made.deltas:
        raise MismatchError(
            f"{tuned} and {base} have no matrix that differs and that {chosen} matches: nothing to extract"
        )
    size = write_native(path, made.deltas, made.prints, Path(tuned).stem, dtype)
    return made.report(path, size)


#: the kinds that a difference can be written as
_KINDS = ("lora", "lokr", "full")


class _Extraction:
    """Collects the ΔW of one weight after another."""

    def __init__(self, kind: Kind, keep: Keep | None, factor: int, seed: int, dtype: torch.dtype | None) -> None:
        self.kind, self.keep, self.factor, self.seed, self.dtype = kind, keep, factor, seed, dtype
        self.deltas: list[tuple[str, Shape, Delta]] = []
        self.prints: dict[str, np.ndarray] = {}
        self.weights: list[Extracted] = []
        self.unchanged: list[str] = []
        self.left: dict[str, float] = {}  # changed tensors that are no layer's -> ‖X‖

    def take(
        self,
        before: Base,
        after: Base,
        theirs: Mapping[str, str],
        chosen: Selection,
        progress: Callable[[int, int], None],
    ) -> None:
        """Take the differences of the chosen tensors, one after another. theirs: what the tuned one calls each."""
        done = 0
        for key, parts in _parts_of(before):
            info = before.info(key)
            wanted = [(name, part) for name, part in parts if chosen.has(name, key)]
            if info.dtype in FLOATS and (wanted or (not parts and chosen.has(key))):
                self._add(key, *_difference(before.tensor(key), after.tensor(theirs[key])), wanted)
            done += info.size
            progress(done, before.size)

    def _add(self, key: str, W: Tensor, X: Tensor, parts: Sequence[tuple[str, Placement]]) -> None:
        """Take the difference X of a tensor W. parts: the modules that it is the weight of, and their rows."""
        norm = _norm(X)
        if not math.isfinite(norm):
            raise MismatchError(f"{key}: the difference of the checkpoints is not finite")
        if norm == 0:
            self.unchanged.append(key)
        elif not parts:
            self.left[key] = norm
        for name, part in parts if norm else ():
            rows = slice(part.start, part.stop)
            self._add_module(name, W[rows], X[rows])

    def _add_module(self, name: str, W: Tensor, X: Tensor) -> None:
        norm, (rows, channels, *kernel) = _norm(X), X.shape
        if not norm:
            return
        shape = Shape(rows, channels, tuple(kernel))
        change = Dense(X.flatten(1))
        with computing("the difference of the checkpoints", name):
            delta = self.kind.make(change, Recipe(shape, self.keep, self.factor, self.seed))
            lost = relative(change, cast(delta, self.dtype))
        self.deltas.append((name, shape, delta))
        self.prints[name] = samples(W.flatten(1))
        self.weights.append(Extracted(name, delta.rank, norm, lost))

    def report(self, path: Path, size: int) -> ExtractReport:
        left_norm = math.sqrt(sum(norm**2 for norm in self.left.values()))
        return ExtractReport(path, tuple(self.weights), tuple(self.unchanged), tuple(self.left), size, left_norm)


def _norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X, dtype=torch.float64))


def _parts_of(base: Base) -> Iterator[tuple[str, list[tuple[str, Placement]]]]:
    """Every tensor of a checkpoint, with the modules that it is the weight of where it is a matrix."""
    parts: defaultdict[str, list[tuple[str, Placement]]] = defaultdict(list)
    for name, part in paths_of(base):
        if len(base.info(part.weight).shape) > 1:
            parts[part.weight].append((name, part))
    yield from ((key, parts[key]) for key in base.where)


def _difference(W: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """W and tuned − W, the latter in at least fp32."""
    wide = torch.float64 if torch.float64 in (W.dtype, tuned.dtype) else torch.float32
    return W, tuned.to(wide) - W.to(wide)


def _counterparts(before: Base, after: Base, rename: Mapping[str, str]) -> dict[str, str]:
    """Key of the base -> that of the tuned checkpoint. MismatchError unless both are of one model."""
    renames = Renames(rename)
    theirs: dict[str, str] = {}
    for key in after.where:
        own = renames.of_parameter(key)
        require_option(own not in theirs, "rename", dict(rename), "different names", f" {key} would be {own} too")
        theirs[own] = key
    renames.require_matched((name for key in after.where for name in (key, key.rpartition(".")[0])), str(after.path))
    lost, stray = (sorted(set(a) - set(b)) for a, b in ((before.where, theirs), (theirs, before.where)))
    if lost or stray:
        odd, where = (lost[0], before.path) if lost else (theirs[stray[0]], after.path)
        advice = nearest_rule(theirs[stray[0]], stray[0], lost) if stray else ""
        raise MismatchError(
            f"{before.path} and {after.path} are not one model: {odd} is in {where} only ({len(lost + stray)} "
            f"such).{advice}"
        )
    for key in before.where:
        if before.info(key).shape != after.info(theirs[key]).shape:
            shapes = f"{before.info(key).shape} and {after.info(theirs[key]).shape}"
            raise MismatchError(f"{before.path} and {after.path} are not one model: {key} is {shapes}")
    return theirs
