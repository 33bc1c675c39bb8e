"""Laws of every training rule: it is its definition, and a run is the same cut, scaled or accumulated."""

from __future__ import annotations

import io

import pytest
import torch

import peftkit.training
from peftkit.training import Recipe
from tests.support.rules import RULES, Run, batches


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_definition(rule: str) -> None:
    case = RULES[rule]
    assert case.distance() <= case.bound


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_bit_for_bit(rule: str, attached: bool) -> None:
    """Whether the rule's state is loaded before it is attached or after."""
    data = batches(5)
    whole, first = Run(RULES[rule]), Run(RULES[rule])
    whole.attach()
    whole.train(data)
    first.attach()
    first.train(data[:3])
    saved = io.BytesIO()
    torch.save([each.state_dict() for each in (first.model, first.optimizer, first.rule)], saved)
    model, optimizer, own = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)

    second = Run(RULES[rule], seed=1)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    if attached:
        second.attach()
    second.rule.load_state_dict(own)
    if not attached:
        second.attach()
    second.train(data[3:])
    assert all(map(torch.equal, whole.result, second.result))


@pytest.mark.parametrize("rule", RULES)
def test_a_scaled_run_is_the_plain_one(rule: str) -> None:
    runs = [Run(RULES[rule]) for _ in range(2)]
    for run, scale in zip(runs, (None, 1024.0), strict=True):
        run.attach()
        run.train(batches(4), scale=scale)
    assert all(map(torch.equal, *(run.result for run in runs)))


@pytest.mark.parametrize("rule", RULES)
def test_an_accumulated_run_is_that_of_whole_batches(rule: str) -> None:
    runs = [Run(RULES[rule]) for _ in range(2)]
    for run, parts in zip(runs, (1, 2), strict=True):
        run.attach()
        run.train(batches(4), parts=parts)
    for one, other in zip(*(run.result for run in runs), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_changes_a_run_until_it_is_removed(rule: str) -> None:
    plain, ruled = Run(RULES[rule]), Run(RULES[rule])
    ruled.attach()
    for run in (plain, ruled):
        run.train(batches(2))
    assert not all(map(torch.equal, plain.result, ruled.result))
    assert ruled.handle is not None
    ruled.handle.remove()
    before = ruled.result
    ruled.optimizer.zero_grad()
    ruled.optimizer.step()
    assert all(map(torch.equal, before, ruled.result))


def test_every_rule_is_held_to_the_laws() -> None:
    public = {name for name, value in vars(peftkit.training).items() if isinstance(value, type)}
    assert {n for n in public if issubclass(getattr(peftkit.training, n), Recipe)} - {"Recipe"} == set(RULES)
