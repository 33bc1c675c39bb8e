"""Add Σ ΔW to W in place, summed in at least fp32 and rounded once, and measure what the rounding lost."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta import Delta
from peftkit.errors import MergeError
from peftkit.geometry import Geometry
from peftkit.kernels.blocks import BLOCK, accumulation_dtype, block_size, row_blocks

#: of a long weight, one of so many rows is measured, but at least so many, or in so many places
_SHARE, _LEAST, _PLACES = 64, 32, 4


@dataclass(frozen=True)
class MergedWeight:
    """Holds what a merge did to one weight."""

    site: str
    adapters: tuple[str, ...]
    norm: float  # ‖Σ λᵢ·ΔWᵢ‖_F
    change: float  # ‖W' − W‖_F, what the weight really moved; in another dtype, from W in that dtype
    lost: float  # ‖ΔW − (W' − W)‖ / ‖ΔW‖, the share that the weight's dtype could not hold
    survived: float | None = None  # <ΔW, W' − W> / ‖ΔW‖², the share that is there after W' was quantised again


def add_(
    deltas: Sequence[Delta], weight: Tensor, geometry: Geometry, *, dry: bool = False, safe: bool = False
) -> tuple[float, float, float]:
    """Add Σ ΔW to a weight in place, row block by row block, and return ‖ΔW‖, ‖W' − W‖ and the share lost.

    Of a long weight, what moved and what was lost are measured on rows spread over it.

    Args:
        deltas: the ΔW to add, (m, n) each.
        weight: W in its layer's shape.
        geometry: how the weight is read as a matrix (m, n).
        dry: write nothing, and go only as far as the first rows that would change.
        safe: the sum is known to be finite.
    """
    if not deltas:
        return 0.0, 0.0, 0.0
    addition = _Addition(deltas, weight, geometry, dry, safe)
    for block, measured, written in addition.schedule():
        if not measured:
            addition.add(block)
        elif not addition.measure(block, written):
            return addition.norm, math.inf, 0.0
        if dry and addition.moved:
            break
    # A norm bounds every element: only where it is large, or is no number, they are looked at one by one
    if not addition.surely_finite and not _finite(weight):
        return addition.norm, math.inf, 0.0
    return addition.norm, *addition.change_and_lost()


class _Addition:
    """The sum of one weight and Σ ΔW, on its way."""

    def __init__(self, deltas: Sequence[Delta], weight: Tensor, geometry: Geometry, dry: bool, safe: bool) -> None:
        self.deltas = [delta.upcast() for delta in deltas]  # multiplied in 32 bits: faster, and more is kept
        self.weight, self.dry, self.safe = weight, dry, safe
        self.acc = accumulation_dtype(weight.dtype)
        self.bands = geometry.bands(weight)  # (bands, rows, channels, *kernel), a view
        self.rows, self.columns = geometry.shape.rows, geometry.shape.columns
        # A block holds whole units of every delta, so that none reads a row that was written before; where a unit alone
        # is large, it goes column by column
        self.multiple = min(self.rows, math.lcm(*(d.row_multiple for d in self.deltas)))
        self.width = self.columns if self.multiple * self.columns <= 4 * BLOCK else max(1, BLOCK // self.multiple)
        # One ΔW whose norm is known goes straight into rows that are not measured, unless they must be rounded after it
        alone = len(self.deltas) == 1 and self.width == self.columns and not dry
        self.sqnorm = self.deltas[0].cheap_sqnorm if alone else None
        self.straight = self.sqnorm is not None and weight.dtype == self.acc
        self.squares: list[Tensor] = []  # of ‖ΔW‖, block by block, where it is not known
        self.largest = torch.zeros((), dtype=self.acc, device=weight.device)  # ‖W'‖² of a block that was not measured
        self.seen = torch.zeros(3, dtype=torch.float64)  # ‖ΔW‖², ‖moved‖² and ‖lost‖² of what was measured

    def schedule(self) -> Iterator[tuple[slice, bool, bool]]:
        """Yield rows, whether they are to be measured, and whether they are to be written."""
        size = block_size(self.weight.device) // (16 if self.dry else 1)
        short = self.rows * self.columns <= 2 * size or self.rows <= self.multiple * _PLACES
        # What rounding loses is looked at in a part of a long weight; what becomes infinite, everywhere
        if self.dry or short or self.weight.itemsize < 2:
            for block in row_blocks(self.rows, self.columns, self.multiple, size):
                yield block, True, not self.dry
            return
        for block in _spread(self.rows, self.multiple):
            yield block, True, False
        if self.straight and self.moved and not self._rows(slice(0, 1))[1]:
            yield slice(0, self.rows), False, True
            return
        unmoved = not self.moved
        for block in row_blocks(self.rows, self.columns, self.multiple, size):
            yield block, unmoved, True

    def add(self, block: slice) -> None:
        """Add Σ ΔW to these rows without measuring."""
        values, copied = self._rows(block)
        if self.straight:
            self.deltas[0].add_rows_(block, values)
            self._watch(values)
        else:
            for columns, delta in self._parts(block):
                here = values[:, columns]
                if self.sqnorm is None:
                    self.squares.append(_square(delta))
                new = here.to(self.acc).add_(delta)
                if new is not here:
                    here.copy_(new)
                self._watch(new)
        if copied:
            _write(self.bands, block, values)

    def measure(self, block: slice, write: bool) -> bool:
        """Add Σ ΔW to these rows, if `write`, and measure what moves; return False where the dtype overflows."""
        values, copied = self._rows(block)
        for columns, delta in self._parts(block):
            here = values[:, columns]
            old = here.to(self.acc)
            if self.sqnorm is None and (write or self.dry):
                self.squares.append(_square(delta))
            sum_ = old + delta
            if self.weight.itemsize < 2 and overflows(sum_, self.weight.dtype):  # saturates in place of inf
                return False
            new = sum_.to(self.weight.dtype, copy=True)
            moved = sum_.copy_(new).sub_(old)
            sums = [_square(delta), _square(moved), _square(moved.sub_(delta))]
            self.seen += torch.stack(sums).cpu().double()
            if write:
                here.copy_(new)
        if copied and write:
            _write(self.bands, block, values)
        return True

    @property
    def moved(self) -> bool:
        """Whether any of what was measured changes in the dtype of the weight."""
        return bool(self.seen[1] > 0)

    @property
    def surely_finite(self) -> bool:
        """Whether no block that was not measured can hold a number that is not finite."""
        return bool(self.largest <= min(torch.finfo(self.weight.dtype).max / 2, 1e18) ** 2)

    @property
    def norm(self) -> float:
        """‖ΔW‖."""
        square = torch.stack(self.squares) if self.sqnorm is None else self.sqnorm.clamp(min=0)
        return math.sqrt(square.cpu().double().sum())

    def change_and_lost(self) -> tuple[float, float]:
        """Return ‖W' − W‖, and ‖ΔW − (W' − W)‖/‖ΔW‖."""
        norm = self.norm
        if not (self.seen[0] > 0 and norm > 0):
            return 0.0, 0.0
        change, lost = (self.seen[1:] / self.seen[0]).sqrt().tolist()
        return change * norm, lost

    def _rows(self, block: slice) -> tuple[Tensor, bool]:
        """Rows of the matrix (rows, columns), and whether they are a copy."""
        bands = self.bands
        rows = (bands.flatten(0, 1)[block] if bands.shape[0] > 1 else bands[0, block]).flatten(1)
        return rows, rows.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr()

    def _parts(self, block: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns and Σ ΔW on them, for these rows, in the dtype of the sum."""
        for start in range(0, self.columns, self.width):
            columns = slice(start, min(start + self.width, self.columns))
            yield columns, functools.reduce(Tensor.add_, (self._part(delta, block, columns) for delta in self.deltas))

    def _part(self, delta: Delta, block: slice, columns: slice) -> Tensor:
        """One ΔW on these rows and columns, in the dtype of the sum."""
        if self.width < self.columns:
            return delta.tile(block, columns).to(self.acc, copy=True)
        if block.step is not None or delta.dtype != self.acc:
            return delta.rows(block).to(self.acc, copy=True)
        out = torch.empty(block.stop - block.start, self.columns, dtype=self.acc, device=self.weight.device)
        delta.rows_(block, out)
        return out

    def _watch(self, rows: Tensor) -> None:
        if not self.safe:
            self.largest = torch.maximum(self.largest, _square(rows))


def _spread(rows: int, multiple: int) -> Iterator[slice]:
    """Yield the rows of a long weight that are measured: single ones far apart, or units of `multiple`."""
    if multiple == 1:
        step = max(1, min(_SHARE, rows // _LEAST))
        yield slice(step // 2, rows, step)
        return
    units = rows // multiple
    step = max(1, min(_SHARE, units // _PLACES))
    for unit in range(step // 2, units, step):
        yield slice(unit * multiple, (unit + 1) * multiple)


def _finite(weight: Tensor) -> bool:
    flat = weight.reshape(-1)
    return all(bool(flat[block].isfinite().all()) for block in row_blocks(len(flat), 1))


def _square(block: Tensor) -> Tensor:
    flat = block.reshape(-1)
    return torch.dot(flat, flat)


def _write(bands: Tensor, block: slice, rows: Tensor) -> None:
    if bands.shape[0] == 1:
        bands[0, block].copy_(rows.reshape(bands[0, block].shape))
        return
    size = bands.shape[1]
    for i in range(block.start // size, -(-block.stop // size)):
        start, stop = max(block.start, i * size), min(block.stop, (i + 1) * size)
        part = rows[start - block.start : stop - block.start]
        target = bands[i, start - i * size : stop - i * size]
        target.copy_(part.reshape(target.shape))


def overflows(wide: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a finite number of a tensor is beyond the largest of a narrower dtype, rounding included."""
    limits = torch.finfo(dtype)
    most = limits.max * (1 + limits.eps / 4)  # half a step beyond the largest, 2 − eps times a power of two
    flat = wide.reshape(-1)
    blocks = (flat[block] for block in row_blocks(len(flat), 1))
    return any(bool((block.abs() > most).logical_and(block.isfinite()).any()) for block in blocks)


def rounded_to(dtype: torch.dtype, before: Tensor, after: Tensor) -> tuple[Tensor, float, float]:
    """Round W + ΔW to a dtype, and return it with ‖what moved‖ in that dtype and ‖ΔW − what moved‖.

    Args:
        dtype: To round to; W alone would have been rounded to it too.
        before: W in its own dtype, whose memory is used up.
        after: W + ΔW in a wider dtype, of the same shape.
    """
    old, new = before.reshape(-1), after.reshape(-1)
    same_size = before.itemsize == dtype.itemsize and before.is_contiguous()
    rounded = old.view(dtype) if same_size else torch.empty(len(new), dtype=dtype, device=new.device)
    sums = torch.zeros(2, dtype=torch.float64)
    for block in row_blocks(len(new), 1):
        wide, own = new[block], old[block].to(new.dtype)
        cast = wide.to(dtype)
        moved = cast.to(new.dtype) - old[block].to(dtype).to(new.dtype)
        sums += torch.stack([_square(moved), _square(wide - own - moved)]).cpu().double()
        rounded[block] = cast
    change, missed = sums.sqrt().tolist()
    return rounded.view(after.shape), change, missed


def refuse_overflow(site: str, names: Sequence[str], deltas: Sequence[Delta], weight: Tensor) -> None:
    """Raise MergeError unless W + Σ ΔW is surely finite."""
    # The norm bounds every element and is the faster to read; it decides where it is finite and far from the limits
    norm = torch.linalg.vector_norm(weight, dtype=accumulation_dtype(weight.dtype))
    if 2 * norm + sum(delta.max_abs_bound(2 * norm) for delta in deltas) <= torch.finfo(weight.dtype).max:
        return
    most = torch.stack(weight.aminmax()).abs().max()
    bound = sum(float(delta.max_abs_bound(most)) for delta in deltas)
    if not math.isfinite(bound):
        raise MergeError(f"{site}: the ΔW of {', '.join(names)} is not finite; nothing was merged")
    if not float(most) + bound <= torch.finfo(weight.dtype).max:
        raise MergeError(
            f"{site}: W + ΔW may overflow {weight.dtype}, or W is not finite; nothing was merged. "
            "merge(model) keeps a backup and finds out"
        )


def refuse_inert(weights: Sequence[MergedWeight]) -> None:
    """Raise MergeError for a ΔW that rounding would lose whole."""
    inert = [w for w in weights if w.norm > 0 and w.change == 0]
    if inert:
        w = inert[0]
        raise MergeError(
            f"{w.site}: ‖ΔW‖ = {w.norm:.3g} is too small for its weight's dtype to hold, and {len(inert)} of "
            f"{len(weights)} weights would not change at all. Nothing was merged; keep the adapter applied, "
            "raise its strength, or merge into a model in a wider dtype"
        )
