"""Sums over the processes of a group: a sketch of the data of all is the sum of their sketches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import distributed, nn


def sum_over_processes(sketches: Sequence[Sequence[nn.Parameter]]) -> list[bool]:
    """Sum the gradients of each group of parameters over all processes, and return which groups have none in any.

    A process whose data did not reach a weight, as of an expert that no token chose, adds zeros. Every process returns
    the same, so that all of them raise, or none does.
    """
    have = torch.tensor([float(all(p.grad is not None for p in group)) for group in sketches])
    alone = not (distributed.is_available() and distributed.is_initialized())
    if alone or not sketches:
        return [not own for own in have.tolist()]
    have = have.to(sketches[0][0].device)
    distributed.all_reduce(have)
    for group, count in zip(sketches, have.tolist(), strict=True):
        for parameter in group if count else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            distributed.all_reduce(parameter.grad)
    return [not count for count in have.tolist()]
