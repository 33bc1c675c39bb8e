"""Rules for two factors: on every kind that has them, at the start, where a factor is frozen, and against PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import (
    ALLoRA,
    CompLoRA,
    LoRAFA,
    LoRAPro,
    LoRAProFull,
    Projection,
    Recipe,
    Riemannian,
    SoftThreshold,
)
from tests.support import rules
from tests.support.rules import FACTORS, Problem, act, apart


@pytest.mark.parametrize(
    "distance, kind",
    [
        (rules.lora_pro, "anchored"),
        (rules.lora_pro_full, "anchored"),
        (rules.riemannian, "anchored"),
        (rules.riemannian, "dora"),
        (rules.allora, "anchored"),
        (rules.allora, "dora"),
    ],
)
def test_other_kinds_of_two_factors(distance: Callable[[str], float], kind: str) -> None:
    assert distance(kind) <= 1e-12


def test_lora_pro_moves_the_weight_more_along_its_gradient() -> None:
    problem, cosines = Problem("lora", **FACTORS), []
    for _ in range(2):
        gB, gA = problem.gradients
        moved = problem.moves() @ torch.cat((gB.flatten(), gA.flatten()))
        cosines.append(float(torch.cosine_similarity(moved, problem.G.flatten(), dim=0)))
        act(LoRAPro(problem.layer))
    assert 0 < cosines[0] < cosines[1]


def test_lora_pro_at_the_start_where_one_factor_is_zero() -> None:
    problem = Problem("lora", trained=False, **FACTORS)
    act(LoRAPro(problem.layer))
    (_, A), (gB, gA) = problem.factors, problem.gradients
    assert torch.allclose(gB, problem.G @ torch.linalg.pinv(A) / 2)
    assert not gA.any()


def test_lora_pro_full_keeps_two_moments_of_the_size_of_the_weight() -> None:
    problem = Problem("lora", **FACTORS)
    rule = LoRAProFull(problem.layer.float())
    act(rule)
    (own,) = rule.state_dict()["moments"].values()
    assert {key: (t.shape, t.dtype) for key, t in own.items() if key != "steps"} == dict.fromkeys(
        ("first", "second"), ((9, 7), torch.float32)
    )


def test_lora_pro_full_of_other_adapters_does_not_go_on() -> None:
    problem = Problem("lora", **FACTORS)
    rule = LoRAProFull(problem.layer)
    act(rule)
    other = nn.Sequential(nn.Linear(7, 9))
    pk.wrap(other, "lora")
    with pytest.raises(OptionError, match=r"\(9, 7\) of \[default\], and the rule is for 0\[default\] \(9, 7\)"):
        LoRAProFull(other).load_state_dict(rule.state_dict())


@pytest.mark.parametrize(
    "make, named",
    [(torch.optim.AdamW, "AdamW"), (lambda own: torch.optim.SGD(own, lr=1.0, momentum=0.9), "SGD with momentum")],
)
def test_lora_pro_full_at_an_optimiser_that_would_normalise_again_is_refused(make: Any, named: str) -> None:
    problem = Problem("lora", **FACTORS)
    with pytest.raises(OptionError, match=f"and {named} would normalise or average it again: attach it to torch"):
        LoRAProFull(problem.layer).attach(make(pk.adapter_parameters(problem.layer)))


def test_a_frozen_factor_is_for_lora_fa_alone() -> None:
    problem = Problem("lora", **FACTORS)
    problem.pair.down.requires_grad_(False)
    problem.backward()
    assert list(LoRAFA(problem.layer).parts) == ["[default]"]
    for make in (LoRAPro, LoRAProFull, Riemannian):
        with pytest.raises(OptionError, match="has two factors that train, as lora has"):
            make(problem.layer)
    act(LoRAFA(problem.layer))
    assert apart([2 * problem.pair.up.grad @ problem.pair.down], [problem.G @ _rows_of(problem.pair.down)]) <= 1e-12


def test_an_adapter_that_is_frozen_for_a_while_keeps_its_rules() -> None:
    layer = Problem("lora", **FACTORS).layer
    for parameter in pk.adapter_parameters(layer):
        parameter.requires_grad_(False)
    assert LoRAPro(layer).parts
    with pytest.raises(OptionError, match="of which the second is frozen"):
        LoRAFA(layer)


@pytest.mark.parametrize("kind", ["lora", "lora-fa"])
def test_comp_lora_keeps_the_leading_directions_of_the_base_out_of_the_change(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Conv2d(6, 8, 1))
    pk.wrap(model, kind, rank=2)
    optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=0.1)
    rule = CompLoRA(model, k=3)
    rule.attach(optimizer)
    for batch in torch.randn(4, 2, 4, 5, 5):
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    for part in rule.parts.values():
        U = torch.linalg.svd(part.at.base)[0][:, :3]
        change = part.adapter.delta(part.at.base).dense().detach()
        assert (U.mT @ change).norm() <= 1e-6 * change.norm()
        assert change.norm() > 0.1


@pytest.mark.parametrize(
    "kind, make, message",
    [
        ("oft", LoRAPro, "LoRAPro: no adapter of the model has two factors that train"),
        ("lora", lambda model: SoftThreshold(model, 0.1), "gates of its ranks, as svdlora has"),
        ("lora", lambda model: Riemannian(model, delta=0), "delta=0 was given"),
        ("svdlora", lambda model: SoftThreshold(model, -1.0), r"xi=-1\.0 was given"),
        ("lora", LoRAFA, "two factors of which the second is frozen, as lora-fa has"),
        ("lora", lambda model: ALLoRA(model, 0), "eta=0 was given"),
        ("loha", lambda model: ALLoRA(model, 1), "ALLoRA: no adapter of the model has two factors"),
        ("dora", lambda model: CompLoRA(model, 1), "CompLoRA: no adapter of the model has two factors with"),
        ("lora", lambda model: CompLoRA(model, 8), r"k=8 was given, at most 7 for the 8×8 weight of 0\[default\]"),
        ("lora", lambda model: LoRAProFull(model, betas=(0.9, 1)), r"betas=\(0.9, 1\) was given, two numbers from 0"),
        ("loldu", Projection, "a set that it must stay in, as loldu with epsilon has"),
        ("dora", Projection, "a set that it must stay in, as loldu with epsilon has"),
    ],
)
def test_what_a_rule_is_not_for_is_said(kind: str, make: Callable[[nn.Module], Recipe], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, kind)
    with pytest.raises(OptionError, match=message):
        make(model)


def test_dora_of_loldu_stays_within_its_bound() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, "dora", inner="loldu", rank=2, epsilon=0.1)
    assert list(Projection(model).parts) == ["0[default]"]


def _rows_of(A: Tensor) -> Tensor:
    """The projection on the rows of A (r, n), (n, n)."""
    return torch.linalg.pinv(A) @ A
