"""Weights that other code reads without calling their layer: Rule(read=True) adapts them where they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError, UnsupportedLayerError
from tests.support.laws import agree
from tests.support.zoo import ADAPTERS, train


class Fused(nn.Module):
    """A convolution and a head whose weights go into functions, between layers that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, groups=2, bias=False)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.conv1d(x, self.conv.weight, padding=1, groups=2).mT
        return F.linear(self.body(mixed), self.head.weight)


def rules(adapter: str) -> list[pk.Rule]:
    case = ADAPTERS[adapter]
    return [
        pk.Rule("head", case.kind, read=True, **case.options),
        pk.Rule("conv", "lora", rank=2, read=True),
        pk.Rule("body", "lora", rank=2),
    ]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_weight_that_is_read_trains_merges_and_restores(adapter: str) -> None:
    torch.manual_seed(0)
    model, x = Fused().double(), torch.randn(2, 8, 6, dtype=torch.float64)
    before = model(x)
    try:
        pk.wrap(model, rules=rules(adapter), dtype=torch.float64)
    except (OptionError, UnsupportedLayerError) as refusal:
        pytest.skip(str(refusal))
    agree(model(x), before, torch.float64, "start", before)
    report = pk.check(model, x)
    assert not report.never_ran, report
    train(model)
    model.eval()
    output = model(x)
    assert not torch.allclose(output, before)
    pk.merge(model)
    agree(model(x), output, torch.float64, "merged", output)
    pk.restore(model)
    agree(model(x), output, torch.float64, "restored", output)
    pk.unwrap(model)
    assert torch.equal(model(x), before)


def test_a_layer_is_adapted_where_it_is_called_or_where_it_is_read() -> None:
    model = Fused()
    pk.wrap(model, "lora", targets="head", rank=2)
    with pytest.raises(UnsupportedLayerError, match="unwrap it first"):
        pk.wrap(model, rules=[pk.Rule("head", "lora", read=True, rank=2)], name="other")
    pk.unwrap(model)
    pk.wrap(model, rules=[pk.Rule("head", "lora", read=True, rank=2)])
    with pytest.raises(UnsupportedLayerError, match="read without calling"):
        pk.wrap(model, "lora", targets="head", rank=2, dropout=0.1, name="other")


def test_read_is_a_flag() -> None:
    with pytest.raises(OptionError, match="read='yes'"):
        pk.Rule("head", "lora", read="yes")
    assert "read=True" in repr(pk.Rule("head", "lora", read=True))


def test_a_file_says_which_weights_are_read(tmp_path: Path) -> None:
    model, fresh, x = Fused(), Fused(), torch.randn(2, 8, 6)
    fresh.load_state_dict(model.state_dict())
    pk.wrap(model, rules=rules("lora"))
    train(model)
    path = pk.save(model, tmp_path / "own.safetensors")
    pk.load(fresh, path)
    assert torch.equal(fresh(x), model(x))
    pk.unwrap(fresh)
    other = tmp_path / "other.safetensors"
    pk.export(model, other, target="lycoris")
    pk.load(fresh, other, read_weights=["head", "conv"])  # no other program says it
    assert torch.allclose(fresh(x), model(x), atol=1e-6)
