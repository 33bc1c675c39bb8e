"""Tensors divided among processes (DTensor, as FSDP2 makes them). Imports torch's own module only when used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard, cast

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is divided among processes."""
    # Not imported here, which takes half as long as torch: without the import there is no DTensor
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)  # a package of torch 2.4 has the name, and not the class
    return kind is not None and isinstance(tensor, kind)


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on every process."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return cast(Tensor, tensor.to_local()) if sharded(tensor) else tensor


def divided_as(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a value that every process has, divided among them as a tensor is; itself where that one is whole."""
    if not sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
