"""A small model, and what fully_shard makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk

#: what is adapted: a convolution, the rows of a parameter and a layer that is read, and a Linear
TARGETS = ("stem", "attention", "body")


class Model(nn.Module):
    """Rows that two processes cannot share evenly, a convolution, a weight that is read, and a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 9, 3, padding=1)
        self.attention = nn.MultiheadAttention(9, 3, batch_first=True)
        self.body = nn.Linear(9, 15)
        self.head = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x)).mT
        return self.head(torch.tanh(self.body(self.attention(h, h, h)[0])))


def plain() -> Model:
    torch.manual_seed(0)
    return Model()


def shard(model: Model, **options: Any) -> Model:
    """Divide a model: two layers that are units of their own, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in (model.stem, model.body):
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def batch() -> Tensor:
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))


def put(model: nn.Module, kind: str, name: str = "default", targets: Sequence[str] = TARGETS, **options: Any) -> None:
    """Put an adapter on a model, with a ΔW that is the same on every process."""
    torch.manual_seed(len(name))
    pk.wrap(model, kind, targets=targets, name=name, **options)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model, name):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(divided_like(parameter, noise))


def divided_like(parameter: Tensor, value: Tensor) -> Tensor:
    from peftkit.kernels.sharding import divided_as

    return divided_as(parameter, value.to(parameter.dtype))
