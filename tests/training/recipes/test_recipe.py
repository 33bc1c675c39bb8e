"""What every rule does by the protocol: which adapters it takes, when it acts, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import peftkit as pk
from peftkit.adapters.base import Adapter
from peftkit.errors import LostAdapterError, OptionError, UnknownAdapterError, UnsupportedLayerError
from peftkit.training import CompLoRA, LoRAPro, LoRAProFull, Prefixes, Recipe, Riemannian, SoftThreshold
from tests.support.divided import batch, plain, shard
from tests.support.processes import distributed


class Seen(Recipe):
    """Notes what it sees."""

    wanted = "anything"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.events: list[str] = []

    def takes(self, adapter: Adapter) -> bool:
        return True

    def before_step(self, optimizer: Optimizer) -> None:
        assert not torch.is_grad_enabled()
        (gradient,) = (p.grad for p in optimizer.param_groups[0]["params"])
        self.events.append("none" if gradient is None else f"{float(gradient.sum()):g}")

    def after_step(self, optimizer: Optimizer) -> None:
        assert not torch.is_grad_enabled()
        self.events.append("after")


def layer(kind: str = "full", **options: Any) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Linear(2, 2, bias=False)
    pk.wrap(model, kind, **options)
    return model


def test_a_rule_sees_the_gradients_that_a_closure_makes_in_the_step() -> None:
    model = layer()
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.0)
    rule = Seen(model)
    handle = rule.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == optimizer.step(closure=closure)
    assert rule.events == ["4", "after"] * 2
    optimizer.step()
    assert rule.events[4:] == ["4", "after"]
    with pytest.raises(OptionError, match="Seen is attached to an optimiser already, and would act twice"):
        rule.attach(torch.optim.SGD(pk.adapter_parameters(model)))
    handle.remove()
    optimizer.step()
    assert len(rule.events) == 6
    rule.attach(optimizer)


def test_an_optimiser_that_calls_its_closure_again_is_refused() -> None:
    model = layer()
    optimizer = torch.optim.LBFGS(pk.adapter_parameters(model))
    Seen(model).attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(1, 2)) - 1).square().sum()
        loss.backward()
        return loss

    with pytest.raises(OptionError, match="LBFGS calls its closure several times a step"):
        optimizer.step(closure)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_leaves_out_is_no_step_of_the_rule(fused: bool) -> None:
    model = layer()
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.0, fused=fused)
    rule, scaler = Seen(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    rule.attach(optimizer)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * model(torch.ones(1, 2)).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert rule.events == ["4", "after"]


def test_gradients_that_a_fused_optimiser_has_still_to_unscale_are_refused() -> None:
    model = layer("lora", rank=1)
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    LoRAProFull(model).attach(optimizer)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    with pytest.raises(OptionError, match=r"call scaler.unscale_\(optimizer\) before"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    "make", [LoRAPro, Riemannian, Prefixes, lambda model, name: SoftThreshold(model, 1, name=name)]
)
def test_an_adapter_that_is_not_there_is_named(make: Any) -> None:
    with pytest.raises(UnknownAdapterError, match=r"called 'stile'; there is style\. Did you mean 'style'"):
        make(layer("lora", name="style"), name="stile")
    with pytest.raises(UnknownAdapterError, match="no adapter on this model: call wrap or load first"):
        make(nn.Linear(2, 2), name=None)


def test_a_rule_is_for_the_adapters_of_one_name_and_takes_pipelines() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    pk.wrap(model, "dora", name="style")
    pk.wrap(model, "lora", name="other")
    assert list(LoRAPro(model).parts) == ["0[style].inner", "0[other]"]
    assert list(LoRAPro(model, name="style").parts) == ["0[style].inner"]

    pipe: Any = SimpleNamespace(components={"unet": model})
    assert list(LoRAPro(pipe, name="other").parts) == ["unet.0[other]"]


def test_an_adapter_that_is_gone_is_said() -> None:
    for change in (pk.unwrap, lambda model: (pk.unwrap(model), pk.wrap(model, "full"))):
        model = layer()
        optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.0)
        Seen(model).attach(optimizer)
        change(model)
        with pytest.raises(LostAdapterError, match=r"Seen: the adapter \[default\] is not there any more"):
            optimizer.step()


def test_a_state_of_another_rule_is_refused() -> None:
    with pytest.raises(OptionError, match=r"LoRAPro: a state of \['generator', 'share'\] was given, \[\] was"):
        LoRAPro(layer("lora")).load_state_dict(Prefixes(layer("dylora")).state_dict())


def _divided() -> list[Tensor]:
    """What a rule trains of adapters that every process has whole, of shares of the data; and of all of it."""
    rank, results = torch.distributed.get_rank(), []
    for divide in (True, False):
        model = plain().double()
        if divide:
            shard(model)
        torch.manual_seed(0)
        pk.wrap(model, "lora", targets="body", rank=2)
        optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=0.1)
        for rule in (LoRAPro(model), CompLoRA(model, k=2)):
            rule.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            data = batch().double()
            model(data.chunk(2)[rank] if divide else data).square().mean().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in pk.adapter_parameters(model)]))
    model = plain()
    pk.wrap(model, "lora", targets="body", rank=2)
    shard(model)
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    LoRAPro(model).attach(optimizer)
    model(batch()).sum().backward()
    with pytest.raises(UnsupportedLayerError, match="LoRAPro: the adapters are divided among processes, and the rule"):
        optimizer.step()
    return results


@pytest.mark.slow
@pytest.mark.processes
def test_adapters_of_a_divided_model_have_their_rules_where_they_are_whole(tmp_path: Path) -> None:
    for divided, whole in distributed(_divided, folder=tmp_path):
        assert torch.allclose(divided, whole, atol=1e-9)
