"""<ΔW, W> and the norms of a weight that is divided among processes (DTensor, as FSDP2 makes them)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from peftkit.adapters.base import Adapter
from peftkit.delta import Delta
from peftkit.delta.base import WeightCache
from peftkit.kernels.blocks import row_blocks, row_sqnorms
from peftkit.kernels.sharding import whole

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def inner_and_sqnorm(adapter: Adapter, W: DTensor, cache: WeightCache) -> tuple[Delta, Tensor, Tensor, Tensor]:
    """Return ΔW, <ΔW, W>, ‖ΔW‖² and ‖W‖², the same on every process.

    The adapter, which is small, is gathered. Of W each process reads its own rows, and the sums are added up; only an
    adapter that reads its base needs all of W, one weight at a time.
    """
    from torch.distributed.tensor import Replicate, Shard

    parts = dict(adapter.named_parameters()) | dict(adapter.named_buffers())
    gathered = {name: whole(tensor) for name, tensor in parts.items()}

    def delta_of(weight: Tensor) -> Delta:
        return cast(Delta, torch.func.functional_call(adapter, gathered, (weight, 1.0))).upcast()

    by_rows = sum(p == Shard(0) for p in W.placements) == 1 and all(p in (Shard(0), Replicate()) for p in W.placements)
    if adapter.reads_base or not by_rows:
        full = W.full_tensor()
        delta = delta_of(full)
        return delta, *delta.inner_and_sqnorm(full, cache), row_sqnorms(full).sum()
    own = cast(Tensor, W.to_local())
    delta = delta_of(own)
    base = _summed(row_sqnorms(own).sum(), W)
    return delta, _summed(_inner(delta.rows, own, _first_row(W)), W), delta.sqnorm(), base


def _first_row(W: DTensor) -> int:
    """The number of the first row that this process holds."""
    from torch.distributed.tensor import Shard

    axis = W.placements.index(Shard(0))
    each = -(-W.shape[0] // W.device_mesh.size(axis))
    return min(W.shape[0], W.device_mesh.get_local_rank(axis) * each)


def _inner(rows_of: Callable[[slice], Tensor], own: Tensor, start: int) -> Tensor:
    """<ΔW, W> over rows of W from `start` on. rows_of: rows of ΔW."""
    inner = torch.zeros((), dtype=torch.promote_types(own.dtype, torch.float32), device=own.device)
    for rows in row_blocks(*own.shape):
        block = rows_of(slice(start + rows.start, start + rows.stop))
        inner = inner + (block * own[rows].to(block.dtype)).sum()
    return inner


def _summed(part: Tensor, W: DTensor) -> Tensor:
    """The sum of every process's part."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    placements = [Partial() if p == Shard(0) else p for p in W.placements]
    return DTensor.from_local(part, W.device_mesh, placements).full_tensor()
