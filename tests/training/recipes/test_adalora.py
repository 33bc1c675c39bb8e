"""AdaLoRA: what it refuses, its budget and its penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import AdaLoRA


def model_of(rank: int = 4) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5))
    pk.wrap(model, "svdlora", rank=rank)
    return model


def test_the_budget_falls_as_a_cube() -> None:
    rule = AdaLoRA(model_of(), target=1, total=12, warmup=2, final=4)
    budgets = []
    for rule.steps in range(13):
        budgets.append(rule.budget)
    assert budgets == [8, 8, 8, *(int(2 + 6 * (1 - t / 6) ** 3) for t in range(1, 7)), 2, 2, 2, 2]


def test_the_penalty_is_0_for_orthonormal_factors() -> None:
    model = model_of()
    rule = AdaLoRA(model, target=1, total=9)
    assert float(rule.penalty().detach()) == pytest.approx(2, rel=0.1)  # of factors that are near 0: ‖1‖ of 4 ranks
    with torch.no_grad():
        for layer in model:
            adapter: Any = layer.adapters["default"]  # type: ignore[index]
            adapter.up.copy_(torch.eye(*adapter.up.shape))
            adapter.down.copy_(torch.eye(*adapter.down.shape))
    assert float(rule.penalty().detach()) == 0 and rule.penalty().requires_grad


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": 0, "total": 9}, "target=0"),
        (
            {"target": 1, "total": 5, "warmup": 3, "final": 2},
            "total=5 was given, more steps than warmup and final take",
        ),
        ({"target": 1, "total": 9, "betas": (1.0, 0.5)}, "two numbers between 0 and 1"),
    ],
)
def test_what_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        AdaLoRA(model_of(), **options)


def test_the_state_of_another_model_is_refused() -> None:
    states = []
    for rank in (4, 3):
        model = model_of(rank)
        rule = AdaLoRA(model, target=1, total=9)
        optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        rule.attach(optimizer)
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
        states.append((rule, rule.state_dict()))
    with pytest.raises(OptionError, match="wrap the model as it was"):
        states[0][0].load_state_dict(states[1][1])
