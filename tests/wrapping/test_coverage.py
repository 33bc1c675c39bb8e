"""A plan says how much of a model it adapts, and a preset that adapts little warns."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import CoverageWarning


class Experts(nn.Module):
    """Three weights in one parameter, as mixtures of experts have them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Packed(nn.Linear):
    """A Linear that keeps two numbers in a byte."""

    def __init__(self, channels: int, rows: int) -> None:
        super().__init__(channels, rows)
        self.weight = nn.Parameter(torch.zeros(channels * rows // 2, 1, dtype=torch.uint8), requires_grad=False)


def test_the_share_of_weights_is_told_by_type_of_layer() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 4), nn.Conv2d(2, 4, 3), nn.LayerNorm(4))
    plan = pk.plan(model, "lora", targets="1", rank=2)
    assert plan.coverage == {"Linear": (128, 192), "Embedding": (0, 80), "Conv2d": (0, 72)}
    assert "37.2 % of 344 weights: Linear 66.7 %, Embedding 0 %, Conv2d 0 %" in str(plan)


@pytest.mark.parametrize("other, share, reason", [(Experts(), "25", "Experts"), (Packed(32, 16), "20", "quantised")])
def test_a_preset_that_adapts_little_warns_with_what_it_skips(other: nn.Module, share: str, reason: str) -> None:
    model = nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 16), other)
    with pytest.warns(CoverageWarning, match=f"'full' adapts {share} % .*{reason}"):
        plan = pk.wrap(model, "lora", rank=2)
    assert plan.modules == ("1",)


def test_what_is_named_or_covered_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.plan(nn.Sequential(nn.Linear(8, 16), Experts()), "lora", targets="Linear", rank=2)
        pk.plan(nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 16)), "lora", rank=2)
        pk.plan(nn.Sequential(nn.Linear(32, 16), Experts()), "lora", rank=2)
