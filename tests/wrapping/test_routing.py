"""Where only some experts run, the ΔW of no other is made, and every number is what it is with all of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.wrapping import experts as adapted_experts
from peftkit.wrapping.routing import routed
from peftkit.wrapping.stacks import StackGeometry
from tests.support.experts import language_model, tokens
from tests.support.laws import agree
from tests.support.zoo import ADAPTERS, train

EXPERTS = "*.experts.*"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def wrapped(family: str, implementation: str, case: str = "lora", **options: Any) -> nn.Module:
    model = language_model(family, implementation)
    pk.wrap(model, ADAPTERS[case].kind, targets=EXPERTS, **ADAPTERS[case].options, **options)
    train(model)
    return model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts of a stack are changed, stack by stack."""
    counts: list[int] = []
    changed = StackGeometry.changed

    def counting(self: StackGeometry, weight: Tensor, deltas: Any) -> Tensor:
        counts.append(len(weight))
        return changed(self, weight, deltas)

    monkeypatch.setattr(StackGeometry, "changed", counting)
    return counts


def with_all(model: nn.Module, monkeypatch: pytest.MonkeyPatch, ids: Tensor) -> Tensor:
    """What the model computes when it does not ask which experts run."""
    with monkeypatch.context() as patched:
        patched.setattr(adapted_experts, "routed", lambda *_: None)
        return model(ids).logits


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_changes_two_experts_of_four(
    family: str, implementation: str, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = wrapped(family, implementation), tokens(1, 1)
    out = model(ids).logits
    assert seen == [2] * 4
    expected = with_all(model, monkeypatch, ids)
    assert seen == [2] * 4 + [4] * 4
    agree(out, expected, torch.float32, "logits")
    parameters = pk.adapter_parameters(model)
    ours = torch.autograd.grad(out.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        agree(a, b, torch.float32, "gradient")
    assert all((grad.flatten(1).abs().sum(1) > 0).sum() <= 2 for grad in ours)


@pytest.mark.parametrize("case", ["dora", "oft in", "loldu", "lokr", "glora"])
def test_every_kind_is_the_same_with_some(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = wrapped("gpt_oss", "grouped_mm", case), tokens(1, 1)
    agree(model(ids).logits, with_all(model, monkeypatch, ids), torch.float32, case)


def test_many_tokens_change_all_without_asking(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped("qwen3_moe", "grouped_mm")
    asked: list[Tensor] = []
    unique = Tensor.unique
    monkeypatch.setattr(Tensor, "unique", lambda self: (asked.append(self), unique(self))[1])
    model(tokens(2, 8))
    assert seen == [4] * 4
    assert not asked


def test_a_part_that_is_merged_stays_in_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = wrapped("mixtral", "eager"), tokens(1, 1)
    pk.wrap(model, "dora", targets=EXPERTS, rank=2, name="second")
    train(model, 5, name="second")
    out = model(ids).logits
    pk.merge(model, "default")
    agree(model(ids).logits, out, torch.float32, "merged")
    agree(model(ids).logits, with_all(model, monkeypatch, ids), torch.float32, "some")


def test_calls_that_do_not_say_are_of_all() -> None:
    model = wrapped("mixtral", "eager")
    experts = model.get_submodule("model.layers.0.mlp.experts")
    x, index, weights = torch.randn(1, 16), torch.tensor([[2, 0]]), torch.rand(1, 2)
    found = routed(experts, (x, index, weights), {})
    assert found is not None
    assert found.experts.tolist() == [0, 2]
    assert found.args[1].tolist() == [[1, 0]]
    by_name = routed(experts, (x,), {"top_k_index": index, "top_k_weights": weights})
    assert by_name is not None
    assert by_name.kwargs["top_k_index"].tolist() == [[1, 0]]
    beyond = routed(experts, (x, torch.tensor([[2, 4]]), weights), {})  # 4 is no expert's number
    assert beyond is not None
    assert beyond.args[1].tolist() == [[0, 1]]
    for args in ((x,), (x, index.bool(), weights), (x, index, index), (x, torch.tensor([[4, 4]]), weights)):
        assert routed(experts, args, {}) is None
    other = copy.deepcopy(experts)
    other.extra = nn.Parameter(torch.zeros(3))
    assert routed(other, (x, index, weights), {}) is None


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)`:FutureWarning")
def test_gradient_checkpoints_recompute_the_same() -> None:
    model, ids = wrapped("qwen3_moe", "grouped_mm"), tokens(1, 2)
    model.train()
    parameters = pk.adapter_parameters(model)
    plain = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(model(ids).logits.square().sum(), parameters)
    for a, b in zip(plain, again, strict=True):
        agree(a, b, torch.float32, "gradient")
