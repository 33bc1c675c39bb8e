"""Adapters put on a model that fully_shard has divided: whole on every process, with gradients that are averaged.

fully_shard manages the parameters that a model had when it was called. What comes later is here what
DistributedDataParallel would make of it: the same numbers on every process, kept the same by averaging gradients.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from peftkit.adapters.base import Adapter
from peftkit.errors import UnsupportedLayerError
from peftkit.kernels.sharding import sharded


def require_common(label: str, parameter: Tensor) -> None:
    """Raise UnsupportedLayerError for a weight that is divided among some of the processes only."""
    if sharded(parameter) and parameter.device_mesh.size() != torch.distributed.get_world_size():
        raise UnsupportedLayerError(
            f"{label}: its weight is divided among {parameter.device_mesh.size()} of "
            f"{torch.distributed.get_world_size()} processes, and all were expected to have a part: wrap or load "
            "first, then shard"
        )


@torch.no_grad()
def replicate_(adapters: Collection[Adapter]) -> None:
    """Give adapters the numbers of the first process, and average their gradients from now on. All processes call it.

    Backward averages the gradient of each parameter once it is accumulated, as fully_shard does of its own.
    """
    for adapter in adapters:
        for tensor in adapter.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)
        adapter.refresh_parts_()
    for parameter in dict.fromkeys(parameter for adapter in adapters for parameter in adapter.parameters()):
        parameter.register_post_accumulate_grad_hook(_average)


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= torch.distributed.get_world_size()
