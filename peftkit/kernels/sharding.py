"""Tensors divided among processes (DTensor, as FSDP2 makes them). Imports torch's own module only when used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is divided among processes."""
    # Not imported here, which takes half as long as torch: without the import there is no DTensor
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)  # a package of torch 2.4 has the name, and not the class
    return kind is not None and isinstance(tensor, kind)


def fully_sharded() -> type | None:
    """Return the class that fully_shard mixes into the modules it is called on; None while nothing can be one."""
    # Not imported here, which takes long: without the import nothing is divided
    module = sys.modules.get("torch.distributed.fsdp")
    return getattr(module, "FSDPModule", None)  # it is elsewhere in torch 2.4 and 2.5


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


@dataclass(frozen=True, eq=False)
class Division:
    """How a tensor is divided among processes."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> Division:
        """Return how a tensor is divided."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())

    @property
    def plain(self) -> bool:
        """Whether a part is one piece of the tensor, or all of it."""
        from torch.distributed.tensor import Replicate, Shard

        return all(type(placement) in (Replicate, Shard) for placement in self.placements)

    def part(self, value: Tensor) -> Tensor:
        """Return this process's part of a value (*shape): of the first process's, which the others have too."""
        from torch.distributed.tensor import distribute_tensor

        return local(distribute_tensor(value.to(self.mesh.device_type), self.mesh, self.placements))

    def joined(self, part: Tensor) -> DTensor:
        """Return the tensor of which this process, and each of the others, gives its part."""
        from torch.distributed.tensor import DTensor

        here = part.to(self.mesh.device_type)
        return DTensor.from_local(
            here, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
