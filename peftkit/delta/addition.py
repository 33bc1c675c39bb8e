"""W + Σ ΔW, in place: summed in at least fp32, rounded once, with what the rounding cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit.delta import Delta
from peftkit.errors import MergeError
from peftkit.geometry import Geometry
from peftkit.kernels.blocks import BLOCK, Workspace, accumulation_dtype, block_size, row_blocks

#: of a long weight, one of so many rows is measured, but at least so many, or in so many places
_SHARE, _LEAST, _PLACES = 64, 32, 4


@dataclass(frozen=True)
class MergedWeight:
    """What happened to one weight."""

    site: str
    adapters: tuple[str, ...]
    norm: float  # ‖Σ λᵢ·ΔWᵢ‖_F
    change: float  # ‖W' − W‖_F, what the weight really moved; in another dtype, from W in that dtype
    lost: float  # ‖ΔW − (W' − W)‖ / ‖ΔW‖, the share that the weight's dtype could not hold


def add_(
    deltas: Sequence[Delta],
    weight: Tensor,
    geometry: Geometry,
    *,
    dry: bool = False,
    safe: bool = False,
    space: Workspace | None = None,
) -> tuple[float, float, float]:
    """weight += Σ ΔW in place, row block by row block; ‖ΔW‖, ‖W' − W‖ and the share lost.

    weight: in its layer's shape, which `geometry` reads as a matrix. dry: write nothing, and go only as far as the
    first rows that would change. Of a long weight, what moved and what was lost are those of rows spread over it.
    safe: the sum is known to be finite. space: buffers to use, for those who add to many weights.
    """
    if not deltas:
        return 0.0, 0.0, 0.0
    acc, space = accumulation_dtype(weight.dtype), space or Workspace()
    deltas = [delta.upcast() for delta in deltas]  # 16-bit factors are multiplied in 32: faster, and more is kept
    bands = geometry.bands(weight)  # (bands, rows, channels, *kernel), a view
    rows, columns = geometry.shape.rows, geometry.shape.columns
    # A block holds whole units of every delta, so that none reads a row that was written before; where a unit alone is
    # large, it goes column by column
    multiple = min(rows, math.lcm(*(d.row_multiple for d in deltas)))
    size = block_size(weight.device) // (16 if dry else 1)
    width = columns if multiple * columns <= 4 * BLOCK else max(1, BLOCK // multiple)
    own = weight.untyped_storage().data_ptr()
    # One ΔW whose norm is known goes straight into rows that are not measured, unless they must be rounded afterwards
    known = deltas[0].cheap_sqnorm if len(deltas) == 1 and width == columns and not dry else None
    straight = known is not None and weight.dtype == acc
    in_place = straight and _rows(bands, slice(0, 1)).flatten(1).untyped_storage().data_ptr() == own
    # What rounding loses is looked at in a part of a long weight; what becomes infinite, everywhere
    if dry or rows * columns <= 2 * size or rows <= multiple * _PLACES or weight.itemsize < 2:
        blocks = ((block, True, not dry) for block in row_blocks(rows, columns, multiple, size))
    else:
        blocks = _sampled(rows, columns, multiple, size, in_place, lambda: bool(seen[1] > 0))
    squares: list[Tensor] = []
    most = torch.zeros((), dtype=acc, device=weight.device)  # of the norms of what was not measured, squared
    seen = torch.zeros(3, dtype=torch.float64)  # ‖ΔW‖², ‖moved‖² and ‖lost‖² of what was measured
    for block, measured, written in blocks:
        values = _rows(bands, block).flatten(1)
        copied = values.untyped_storage().data_ptr() != own
        if straight and not measured:
            deltas[0].add_rows_(block, values, space)
            if not safe:
                most = torch.maximum(most, _square(values))
            if copied:
                _write(bands, block, values)
            continue
        for start in range(0, columns, width):
            here = values[:, start : start + width]
            delta = space("delta", (here.shape[0], here.shape[1]), here, acc)
            _fill(deltas[0], block, start, delta, columns, space)
            for other in deltas[1:]:
                more = space("more", (here.shape[0], here.shape[1]), here, acc)
                _fill(other, block, start, more, columns, space)
                delta.add_(more)
            old = here if here.dtype == acc else space("old", (here.shape[0], here.shape[1]), here, acc).copy_(here)
            if known is None and (written or dry):
                squares.append(_square(delta))
            if not measured:
                old.add_(delta)
                if old is not here:
                    here.copy_(old)
                if not safe:
                    most = torch.maximum(most, _square(old))
                continue
            wide = torch.add(old, delta, out=space("wide", (here.shape[0], here.shape[1]), here, acc))
            if weight.itemsize < 2 and overflows(wide, weight.dtype):  # these saturate where others become infinite
                return float(_square(delta).sqrt()), math.inf, 0.0
            new = space("new", (here.shape[0], here.shape[1]), here).copy_(wide)
            moved = wide.copy_(new).sub_(old)
            sums = [_square(delta), _square(moved), _square(moved.sub_(delta))]
            seen += torch.stack(sums).cpu().double()
            if written:
                here.copy_(new)
        if dry and seen[1] > 0:
            break
        if copied and written:
            _write(bands, block, values)
    norm = (torch.stack(squares) if known is None else known.clamp(min=0)).cpu().double().sum()
    # A norm bounds every element: only where it is large, or is no number, they are looked at one by one
    if not most <= min(torch.finfo(weight.dtype).max / 2, 1e18) ** 2 and not _finite(weight):
        return float(norm.sqrt()), math.inf, 0.0
    if not (seen[0] > 0 and norm > 0):
        return float(norm.sqrt()), 0.0, 0.0
    change, missed = (norm * seen[1:] / seen[0]).sqrt().tolist()
    return float(norm.sqrt()), change, missed / float(norm.sqrt())


def _sampled(
    rows: int, columns: int, multiple: int, size: int, in_place: bool, moved: Callable[[], bool]
) -> Iterator[tuple[slice, bool, bool]]:
    """Rows, whether they are to be measured, and to be written: some to measure, then all, at once if in place."""
    if multiple == 1:
        step = max(1, min(_SHARE, rows // _LEAST))
        yield slice(step // 2, rows, step), True, False
    else:
        units = rows // multiple
        step = max(1, min(_SHARE, units // _PLACES))
        for unit in range(step // 2, units, step):
            yield slice(unit * multiple, (unit + 1) * multiple), True, False
    seen = moved()
    if in_place and seen:
        yield slice(0, rows), False, True
        return
    for block in row_blocks(rows, columns, multiple, size):
        yield block, not seen, True


def _fill(delta: Delta, rows: slice, start: int, out: Tensor, columns: int, space: Workspace) -> None:
    """ΔW of these rows, and of as many columns as out has, into out."""
    if out.shape[1] == columns and out.dtype == delta.dtype and rows.step is None:
        delta.rows_(rows, out, space)
    else:
        whole = out.shape[1] == columns
        out.copy_(delta.rows(rows) if whole else delta.tile(rows, slice(start, start + out.shape[1])))


def _finite(weight: Tensor) -> bool:
    flat = weight.reshape(-1)
    return all(bool(flat[block].isfinite().all()) for block in row_blocks(len(flat), 1))


def _square(block: Tensor) -> Tensor:
    flat = block.reshape(-1)
    return torch.dot(flat, flat)


def _rows(bands: Tensor, block: slice) -> Tensor:
    """Rows of the matrix as (rows, channels, *kernel), across bands if need be."""
    return bands.flatten(0, 1)[block] if bands.shape[0] > 1 else bands[0, block]


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
    """Whether finite numbers of a tensor are beyond a narrower dtype, even rounded down to its largest."""
    limits = torch.finfo(dtype)
    most = limits.max * (1 + limits.eps / 4)  # half a step beyond the largest, 2 − eps times a power of two
    flat = wide.reshape(-1)
    blocks = (flat[block] for block in row_blocks(len(flat), 1))
    return any(bool((block.abs() > most).logical_and(block.isfinite()).any()) for block in blocks)


def rounded_to(dtype: torch.dtype, before: Tensor, after: Tensor) -> tuple[Tensor, float, float]:
    """A sum in its new dtype, ‖what moved‖ there and ‖ΔW − what moved‖; W too would have been rounded to it.

    before, after: W in its own dtype and W + ΔW in a wider one, of one shape. The memory of `before` is used up.
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
