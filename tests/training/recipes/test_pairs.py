"""Training rules against their definitions, around the steps of torch's optimisers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import LoRAPro, Recipe, Riemannian, SoftThreshold
from tests.support.zoo import train

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 6},
    "anchored": {"rank": 3, "alpha": 6},
    "dora": {"rank": 3, "alpha": 6},
}


def problem(kind: str, trained: bool = True) -> tuple[nn.Linear, Any, Tensor]:
    """A layer with gradients, its adapter of two factors, and G, the gradient of the effective weight."""
    torch.manual_seed(0)
    layer = nn.Linear(7, 9, bias=False).double()
    pk.wrap(layer, kind, **KINDS[kind])
    if trained:
        train(layer)
    adapter: Any = layer.adapters["default"]  # type: ignore[index]
    x, target = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    y = layer(x)
    (y - target).square().sum().backward()
    return layer, adapter, (2 * (y - target)).detach().mT @ x


def act(rule: Recipe) -> None:
    """Do what the rule does before a step."""
    rule.before_step(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def factors(adapter: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pair = adapter.pair()
    return *pair.factors(), pair.up.grad, pair.down.grad


def moved(adapter: Any) -> Tensor:
    """The change of ΔW per unit of a step along the gradients."""
    B, A, gB, gA = factors(adapter)
    return adapter.pair().scale * (B @ gA + gB @ A)


@pytest.mark.parametrize("kind", ["lora", "anchored"])
def test_lora_pro_moves_the_weight_along_the_projection_of_its_gradient(kind: str) -> None:
    """On the tangent space of matrices of the rank, which needs neither the gradient nor a matrix of its size."""
    layer, adapter, G = problem(kind)
    plain = moved(adapter)
    act(LoRAPro(layer))
    B, A, *_ = factors(adapter)
    of_rows, of_columns = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    projection = of_rows @ G + G @ of_columns - of_rows @ G @ of_columns
    assert (moved(adapter) - projection).norm() <= 1e-8 * projection.norm()
    cosines = [float((m * G).sum() / (m.norm() * G.norm())) for m in (plain, moved(adapter))]
    assert cosines[1] > cosines[0]


def test_lora_pro_takes_the_gradients_nearest_to_those_that_were_there() -> None:
    layer, adapter, _ = problem("lora")
    _, _, gB, gA = (t.clone() for t in factors(adapter))
    act(LoRAPro(layer))
    B, A, bestB, bestA = factors(adapter)
    distance = (bestB - gB).square().sum() + (bestA - gA).square().sum()
    for seed in range(5):  # what else moves the weight alike: −B·X and X·A, for any X
        X = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 10
        assert (bestB - B @ X - gB).square().sum() + (bestA + X @ A - gA).square().sum() > distance


def test_lora_pro_at_the_start_where_one_factor_is_zero() -> None:
    layer, adapter, G = problem("lora", trained=False)
    act(LoRAPro(layer))
    _, A, gB, gA = factors(adapter)
    assert torch.allclose(gB, 2 * G @ A.mT @ torch.linalg.inv(A @ A.mT) / 4)
    assert not gA.any()


@pytest.mark.parametrize("kind", KINDS)
def test_riemannian_divides_by_the_other_factor_s_gram_matrix(kind: str) -> None:
    layer, adapter, _ = problem(kind)
    own = getattr(adapter, "inner", adapter)
    B, A, gB, gA = (t.clone() for t in factors(own))
    act(Riemannian(layer, delta=0.5))
    eye = 0.5 * torch.eye(3, dtype=torch.float64)
    _, _, newB, newA = factors(own)
    assert torch.allclose(newB, gB @ torch.linalg.inv(A @ A.mT + eye))
    assert torch.allclose(newA, torch.linalg.inv(B.mT @ B + eye) @ gA)


def test_soft_threshold_is_the_proximal_step() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    pk.wrap(layer, "svdlora", rank=4, init="sora")
    adapter: Any = layer.adapters["default"]  # type: ignore[index]
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.5, -0.25, 0.09, -0.1]))
    optimizer = torch.optim.SGD(pk.adapter_parameters(layer), lr=0.0)
    handle = SoftThreshold(layer, 0.1).attach(optimizer)
    layer(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert torch.allclose(adapter.gate, torch.tensor([0.4, -0.15, 0.0, 0.0]))
    handle.remove()
    optimizer.step()
    assert torch.allclose(adapter.gate, torch.tensor([0.4, -0.15, 0.0, 0.0]))


@pytest.mark.parametrize("make", [LoRAPro, Riemannian])
def test_a_rule_acts_at_every_step_after_accumulation_and_unscaling(make: type[Recipe]) -> None:
    """A scaled, accumulated run is the plain one; a removed rule acts no more."""
    torch.manual_seed(0)
    batches = torch.randn(6, 4, 8, dtype=torch.float64)
    first = nn.Linear(8, 8).double()
    pk.wrap(first, "lora", rank=2)
    train(first)
    results = []
    for parts in (1, 2):
        layer = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(pk.adapter_parameters(layer), lr=1e-3)
        make(layer).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=parts == 2)
        for batch in batches:
            optimizer.zero_grad()
            for part in batch.chunk(parts):
                scaler.scale(layer(part).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in pk.adapter_parameters(layer)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize(
    "kind, make, message",
    [
        ("oft", LoRAPro, "LoRAPro: no adapter of the model has two factors that train"),
        ("lora", lambda model: SoftThreshold(model, 0.1), "gates of its ranks, as svdlora has"),
        ("lora", lambda model: Riemannian(model, delta=0), "delta=0 was given"),
        ("svdlora", lambda model: SoftThreshold(model, -1.0), "xi=-1.0 was given"),
    ],
)
def test_what_a_rule_is_not_for_is_said(kind: str, make: Any, message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, kind)
    with pytest.raises(OptionError, match=message):
        make(model)
