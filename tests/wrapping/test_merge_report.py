"""What a merge reports as moved and lost is what moved and was lost, against ΔW in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from tests.support.laws import REFUSALS
from tests.support.zoo import ADAPTERS, make, train


def matrix(module: nn.Module) -> Tensor:
    return module.adapter_state.slots[""].geometry.matrix(module.weight.detach()).double()


@pytest.mark.parametrize("size", [1e-4, 1e-2])
@pytest.mark.parametrize("layer", ["linear", "conv2d k3"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_lost_is_reported(adapter: str, layer: str, size: float) -> None:
    module, _ = make(layer, torch.float32)
    case = ADAPTERS[adapter]
    try:
        pk.wrap(module, case.kind, **case.options)
    except REFUSALS as refusal:
        pytest.skip(str(refusal))
    train(module, size=size)
    exact = copy.deepcopy(module).double()
    before, delta = matrix(module), exact.deltas("")[0].dense().detach()
    report = pk.merge(module)
    moved = matrix(module) - before
    lost = float((moved - delta).norm() / delta.norm())
    assert report.norm == pytest.approx(float(delta.norm()), rel=1e-3)
    assert report.weights[0].change == pytest.approx(float(moved.norm()), rel=1e-3)
    assert report.lost == pytest.approx(lost, rel=0.1, abs=1e-6)
