"""What is written over, by whoever and however: gradients are those of a plain dense layer, or a typed error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ChangedTensorError
from peftkit.wrapping.routes import changed
from tests.support.laws import agree, wrapped
from tests.support.processes import distributed
from tests.support.zoo import ADAPTERS


def layers_of(adapter: str) -> list[str]:
    if "tucker" in adapter:
        return ["conv2d k3"]
    return ["linear", "conv2d k3"]


def by_data(y: Tensor) -> Tensor:
    y.data.mul_(2)
    return y


def by_numpy(y: Tensor) -> Tensor:
    y.detach().numpy()[:] = 3.0
    return y


class _Uncounted(torch.autograd.Function):
    """A kernel of somebody else's, or a collective, that writes in place and does not tell autograd."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, write: Callable[[Tensor], object]) -> Tensor:
        del ctx
        write(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grads[0], None


WRITERS: dict[str, Callable[[Tensor], Tensor]] = {
    "data": by_data,
    "numpy": by_numpy,
    "relu inplace": nn.ReLU(inplace=True),
    "uncounted kernel": lambda y: _Uncounted.apply(y, lambda y: y.mul_(2)),  # type: ignore[return-value]
}


def gradients(module: nn.Module, x: Tensor, write: Callable[[Tensor], Tensor], dense: bool) -> list[Tensor]:
    """Of the input and every adapter parameter; `dense` calls the layer's function with W + ΔW, not the layer."""
    x = x.detach().requires_grad_()
    if dense:
        slot = module.adapter_state.slots[""]
        y = slot.geometry.call(x, changed(module.weight, module.deltas(""), slot.geometry), module.bias)
    else:
        y = module(x)
    # GELU keeps its input, written over or not, as the next layer's operation would
    loss = F.gelu(write(y)).square().sum()
    return list(torch.autograd.grad(loss, [x, *pk.adapter_parameters(module)]))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize(("adapter", "layer"), [(a, layer) for a in ADAPTERS for layer in layers_of(a)])
def test_an_output_that_is_written_over(adapter: str, layer: str, route: str, writer: str) -> None:
    module, x = wrapped(adapter, layer, route=route)
    ours, plain = (gradients(module, x, WRITERS[writer], dense) for dense in (False, True))
    for one, other in zip(ours, plain, strict=True):
        agree(one, other, torch.float64, "a gradient", *plain)


def reduced(adapter: str, layer: str) -> list[list[float]]:
    """The gradients with an output that two processes sum in place, as tensor parallelism does; ours and plain."""
    module, x = wrapped(adapter, layer, route="factored")
    x = x * (1 + torch.distributed.get_rank())

    def all_reduce(y: Tensor) -> Tensor:
        return _Uncounted.apply(y, torch.distributed.all_reduce)  # type: ignore[return-value]

    found = (gradients(module, x, all_reduce, dense) for dense in (False, True))
    return [torch.cat([g.flatten() for g in each]).tolist() for each in found]


def every_reduction() -> dict[str, list[list[float]]]:
    return {adapter: reduced(adapter, layers_of(adapter)[0]) for adapter in ADAPTERS}


@pytest.mark.processes
def test_an_output_that_processes_sum_in_place(tmp_path: Path) -> None:
    for cells in distributed(every_reduction, folder=tmp_path):
        assert set(cells) == set(ADAPTERS)
        for adapter, (ours, plain) in cells.items():
            agree(*(torch.tensor(each, dtype=torch.float64) for each in (ours, plain)), torch.float64, adapter)


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize(("adapter", "layer"), [(a, layer) for a in ADAPTERS for layer in layers_of(a)])
def test_a_parameter_that_is_written_before_backward(adapter: str, layer: str, route: str) -> None:
    """The gradients are those of the parameters that forward used, or backward raises."""
    module, x = wrapped(adapter, layer, route=route)
    x.requires_grad_()
    parameters = pk.adapter_parameters(module)
    expected = torch.autograd.grad(module(x).square().sum(), [x, *parameters])
    y = module(x).square().sum()
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    try:
        found = torch.autograd.grad(y, [x, *parameters])
    except RuntimeError as error:  # a ChangedTensorError is one too
        found = None
        message = str(error)
        typed = isinstance(error, ChangedTensorError) and "Call backward before writing to it" in message
        raised = typed or "modified by an inplace operation" in message
    if found is None:
        assert raised, message
        return
    for one, other in zip(found, expected, strict=True):
        agree(one, other, torch.float64, "a gradient", *expected)


def by_address(weight: Tensor) -> None:
    """Free the weight's memory and take other memory, which may be at the same address."""
    new = weight.detach() * 1.5 + 0.1
    weight.data = torch.empty(0, dtype=weight.dtype)
    weight.data = new.clone()


#: ways to write to a frozen weight, most of which no version counter sees
WEIGHT_WRITERS: dict[str, Callable[[Tensor], object]] = {
    "counted": lambda w: w.mul_(1.5),
    "data": lambda w: w.data.mul_(1.7).add_(0.1),
    "numpy": lambda w: w.detach().numpy().__imul__(1.5),
    "storage": lambda w: w.untyped_storage().copy_((w.detach() * 1.5).untyped_storage()),
    "another address": by_address,
    "swapped": lambda w: w.data.swapaxes(0, 0).neg_(),
}


@torch.no_grad()
@pytest.mark.parametrize("writer", WEIGHT_WRITERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_weight_that_is_written(adapter: str, writer: str) -> None:
    """Forward is what the merged weight gives, after any write to W; so is what the monitor measures."""
    module, x = wrapped(adapter, layers_of(adapter)[0])
    monitor = pk.monitor.CSMonitor(module)
    for train in (True, False):
        module.train(train)
        for _ in range(3):  # whatever is kept by the second call is kept by now
            module(x)
            monitor.measure()
    WEIGHT_WRITERS[writer](module.weight)
    other = copy.deepcopy(module)
    torch.testing.assert_close(module(x), other(x), rtol=0, atol=0)
    measured, fresh = monitor.measure(), pk.monitor.CSMonitor(other).measure()
    assert measured.per_module == fresh.per_module
    assert measured.norms == fresh.norms
    y = module(x)
    pk.merge(other)
    torch.testing.assert_close(other(x), y)
