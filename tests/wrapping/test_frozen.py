"""Layers whose adapters are frozen, all or some: gradients flow to what is trained."""

from __future__ import annotations

import pytest
import torch

import peftkit as pk
from tests.support.laws import REFUSALS, agree, wrapped
from tests.support.zoo import ADAPTERS


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("layer", ["linear", "conv2d k3"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_beside_frozen_parameters(adapter: str, layer: str, route: str) -> None:
    try:
        module, x = wrapped(adapter, layer, route=route)
    except REFUSALS as refusal:
        pytest.skip(str(refusal))
    parameters = pk.adapter_parameters(module)
    x.requires_grad_()
    expected = torch.autograd.grad(module(x).square().sum(), [x, *parameters])
    for i, (parameter, gradient) in enumerate(zip(parameters, expected[1:], strict=True)):
        for other in parameters:
            other.requires_grad_(other is parameter)
        found = torch.autograd.grad(module(x).square().sum(), [x, parameter])
        agree(found[0], expected[0], torch.float64, "of the input", *expected)
        agree(found[1], gradient, torch.float64, f"of parameter {i}", *expected)
    for parameter in parameters:
        parameter.requires_grad_(False)
    (alone,) = torch.autograd.grad(module(x).square().sum(), x)
    agree(alone, expected[0], torch.float64, "of the input alone", *expected)
    assert not module(x.detach()).requires_grad
