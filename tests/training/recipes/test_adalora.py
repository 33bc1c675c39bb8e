"""AdaLoRA: what it refuses, its budget and its penalty."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import OptionError, UnknownAdapterError
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
        ({"target": 1, "total": 9, "betas": 0.5}, "two numbers between 0 and 1"),
        ({"target": 1, "total": 9, "betas": ("0.8", 0.5)}, "two numbers between 0 and 1"),
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


@pytest.mark.parametrize("every, final", [(1, 0), (3, 0), (4, 3)])
def test_the_target_is_met_whatever_the_distance_of_allocations(every: int, final: int) -> None:
    """Also by steps whose gradients are no numbers, and with an adapter of another name beside."""
    torch.manual_seed(0)
    model = model_of()
    pk.wrap(model, "svdlora", rank=3, name="other")
    rule = AdaLoRA(model, target=2, total=10, every=every, final=final, name="default")
    optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
    rule.attach(optimizer)
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        if step == 2:
            for parameter in pk.adapter_parameters(model):
                parameter.grad = torch.full_like(parameter, float("nan"))
            rule.after_step(optimizer)  # as where another has skipped the step itself
            rule.steps -= 1
            optimizer.zero_grad()
        optimizer.step()
    assert sum(rule.ranks().values()) == 4 and max(rule.ranks().values()) <= 4
    kept = [
        tensor for own in rule.state_dict()["averages"].values() for each in own.values() for tensor in each.values()
    ]
    assert kept and all(bool(tensor.isfinite().all()) for tensor in kept)


def test_ranks_are_of_one_adapter() -> None:
    model = model_of()
    pk.wrap(model, "svdlora", rank=3, name="other")
    rule = AdaLoRA(model, target=2, total=10)
    for part in pk.adapter_parameters(model):
        nn.init.ones_(part)
    assert rule.ranks("default") == {"0": 4, "1": 4} and rule.ranks("other") == {"0": 3, "1": 3}
    for name in (None, "none"):
        with pytest.raises(UnknownAdapterError, match="the rule is for default, other: say which by name="):
            rule.ranks(name)
