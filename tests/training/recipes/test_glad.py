"""GLAD: by block and by closure, beside other parameters, and where the second pass is missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError
from peftkit.training import GLAD
from tests.support.rules import RULES, Run, batches, loss_of


def test_a_closure_is_called_for_both_passes() -> None:
    block, closed = Run(RULES["GLAD"]), Run(RULES["GLAD"])
    block.attach()
    block.train(batches(3))
    closed.attach()
    for batch in batches(3):

        def closure(batch: Tensor = batch) -> Tensor:
            closed.optimizer.zero_grad()
            loss = loss_of(closed.model, batch)
            loss.backward()
            return loss

        first = loss_of(closed.model, batch)
        assert torch.equal(closed.optimizer.step(closure), first)  # type: ignore[arg-type]
    assert all(map(torch.equal, block.result, closed.result))


def test_what_trains_beside_the_adapters_has_the_gradients_of_the_first_pass() -> None:
    run = Run(RULES["GLAD"])
    head = run.model[0].bias
    head.requires_grad_(True)
    for _ in range(2):  # accumulated
        loss_of(run.model, batches(1)[0]).backward()
    assert head.grad is not None
    before = head.grad.clone()
    with run.rule.perturbed():  # type: ignore[attr-defined]
        loss_of(run.model, batches(1)[0]).backward()
    assert torch.equal(head.grad, before)


def test_a_reference_that_agrees_changes_nothing() -> None:
    run = Run(RULES["GLAD"])
    run.rule.rho = 1e-6  # type: ignore[attr-defined]
    loss_of(run.model, batches(1)[0]).backward()
    before = [p.grad.clone() for p in pk.adapter_parameters(run.model) if p.grad is not None]
    with run.rule.perturbed():  # type: ignore[attr-defined]
        loss_of(run.model, batches(1)[0]).backward()
    assert all(map(torch.equal, before, (p.grad for p in pk.adapter_parameters(run.model))))  # type: ignore[arg-type]


def test_a_pass_that_fails_leaves_parameters_and_gradients_as_they_were() -> None:
    run = Run(RULES["GLAD"])
    loss_of(run.model, batches(1)[0]).backward()
    before = [*run.result, *(p.grad.clone() for p in run.model.parameters() if p.grad is not None)]

    def fails() -> None:
        with run.rule.perturbed():  # type: ignore[attr-defined]
            loss_of(run.model, batches(1)[0]).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    after = [*run.result, *(p.grad for p in run.model.parameters() if p.grad is not None)]
    assert all(map(torch.equal, before, after))


def test_a_missing_pass_is_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, "oft")
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    rule = GLAD(model)
    rule.attach(optimizer)
    with pytest.raises(OptionError, match="the adapters have no gradients: call backward before"), rule.perturbed():
        pass
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(OptionError, match="a step came without the second backward pass"):
        optimizer.step()
