"""Training where layers have parameters in common: rules act on each once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import NormError
from tests.support.zoo import train
from tests.wrapping.test_in_common import SHARING, X, adapters, kinds, wrapped


def common(kind: str, model: nn.Module) -> set[nn.Parameter]:
    return {own.get_parameter(name) for own in adapters(model) for name in SHARING[kind][1]}


@kinds
def test_lisa_lets_what_is_shared_train_with_any_block(kind: str) -> None:
    model = wrapped(kind)
    train(model)
    optimizer = torch.optim.Adam(pk.adapter_parameters(model), lr=0.1)
    rule = pk.training.LISA(model, groups=["0", "2", "3"], awake=1, every=1)
    handle = rule.attach(optimizer)
    for _ in range(4):
        (block,) = rule.awake
        optimizer.zero_grad()
        model(X).square().sum().backward()
        awake = {p for p in pk.adapter_parameters(model) if p.requires_grad}
        own = adapters(model)[("0", "2", "3").index(block)]
        assert awake == {*own.parameters()} >= common(kind, model)
        optimizer.step()
    assert common(kind, model) <= {*optimizer.state}
    handle.remove()
    assert len(pk.adapter_parameters(model)) == len({p for own in adapters(model) for p in own.parameters()})


@kinds
def test_lisa_lets_what_is_shared_with_a_layer_that_stays_awake_train(kind: str) -> None:
    model = wrapped(kind)
    optimizer = torch.optim.Adam(pk.adapter_parameters(model), lr=0.1)
    rule = pk.training.LISA(model, groups=["2", "3"], always="0", awake=1)
    handle = rule.attach(optimizer)
    assert all(p.requires_grad for p in common(kind, model))
    handle.remove()


@kinds
def test_a_weight_decay_acts_on_what_is_shared_once(kind: str) -> None:
    model = wrapped(kind)
    groups = pk.parameter_groups(model, lr=0.1, weight_decay=0.5, rules={"0": 0.2})
    every = {p: group["lr"] for group in groups for p in group["params"]}
    assert len(every) == sum(len(group["params"]) for group in groups)
    assert {every[p] for p in common(kind, model)} == {0.2}  # as the first layer that has it
    optimizer = torch.optim.SGD(groups)
    model(X).square().sum().backward()
    optimizer.step()


def test_a_norm_is_bounded_by_what_is_the_layer_s_own() -> None:
    model = wrapped("tied-lora")
    train(model)
    before = [p.clone() for p in common("tied-lora", model)]
    limited = pk.limit_norms_(model, 0.01)
    assert [each.weight for each in limited] == ["0", "2", "3.0"]
    assert all(map(torch.equal, before, common("tied-lora", model)))
    for own in adapters(model):
        assert own(torch.zeros(1), 1.0).dense().norm().item() == pytest.approx(0.01, rel=1e-5)
    for kind in ("vb-lora", "tiny-lora"):
        model = wrapped(kind)
        with pytest.raises(NormError, match=rf"the ΔW of {kind} is proportional to none"):
            pk.limit_norms_(model, 0.01)
