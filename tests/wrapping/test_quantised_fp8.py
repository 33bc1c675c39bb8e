"""FP8Linear of transformers: its weight is read block by block; its own forward, which needs a GPU, is stood in for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import UnsupportedLayerError
from peftkit.wrapping.bases.fp8 import FineGrainedFP8
from tests.support.matrix_quantised import OPTIONS, dequantised, fp8_layer, give
from tests.support.zoo import STRUCTURES, train

finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel computes, but for the rounding of its input to fp8."""

    def linear(
        input: Tensor, weight: Tensor, scale: Tensor, block: Any, bias: Tensor | None, activation: Any, allow: bool
    ) -> Tensor:
        return F.linear(input, finegrained_fp8._dequantize_fp8_weight(weight, scale, block, input.dtype), bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", linear)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = fp8_layer(nn.Linear(64, 128)), nn.GELU(), fp8_layer(nn.Linear(128, 64, bias=False))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_output_and_gradients_are_of_the_dequantised_weight(kind: str, tmp_path: Path) -> None:
    model = network()
    plain, x = dequantised(model), torch.randn(3, 64)
    before = model(x)
    for each in (model, plain):
        pk.wrap(each, kind, **OPTIONS.get(kind, {}))
    assert torch.equal(model(x), before)
    train(model)
    give(model, plain)
    results = []
    for each in (model, plain):
        y = each(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y.detach(), *(p.grad for p in pk.adapter_parameters(each))])
    for got, expected in zip(*results, strict=True):
        # the second layer, which has no bias, is read as the bf16 that such checkpoints are made of
        assert float((got - expected).norm()) <= 1e-2 * float(expected.norm())
    again = network()
    assert pk.load(again, pk.save(model, tmp_path / "a.safetensors")).complete
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("block", [None, (32, 32), (128, 128)])
def test_rows_are_those_that_transformers_reads(block: tuple[int, int] | None) -> None:
    layer = finegrained_fp8.FP8Linear(80, 96, block)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(96, 80))
        layer.weight_scale_inv.copy_(torch.rand_like(layer.weight_scale_inv))
    W = finegrained_fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, block, torch.float32)
    base = FineGrainedFP8.of(layer)
    assert torch.equal(base.rows(0, 96), W)
    assert torch.equal(base.rows(30, 70), W[30:70])


def test_it_quantises_as_it_reads() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(80, 96)
    W = FineGrainedFP8.of(fp8_layer(linear)).rows(0, 96)
    assert float((W - linear.weight).detach().norm() / linear.weight.detach().norm()) < 0.04


def test_groups_are_refused() -> None:
    layer = finegrained_fp8.FP8GroupedLinear(16, 32, 2)
    with pytest.raises(UnsupportedLayerError, match="FP8GroupedLinear has a weight for every group"):
        pk.wrap(nn.Sequential(layer), "lora", targets="0")
