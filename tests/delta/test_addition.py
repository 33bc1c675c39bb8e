"""Adding ΔW to long weights: of which only some rows are measured, and all are summed, rounded and checked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import MergeError
from tests.support.laws import bits
from tests.support.zoo import train


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "oft"])
@pytest.mark.parametrize("backup", ["copy", None])
def test_a_long_weight_is_summed_wide_and_rounded_once(kind: str, dtype: torch.dtype, backup: str | None) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(700, 512).to(dtype)
    pk.wrap(layer, kind)
    train(layer, size=0.02)
    W = layer.weight.detach().clone()
    delta = layer.adapters["default"].eval()(W, 1.0).upcast().dense().detach()
    (merged,) = pk.merge(layer, backup=backup).weights
    rounded = (W.float() + delta).to(dtype)
    # A product of some rows may differ from that of all in its last bit, and then, rarely, in the rounding
    assert (layer.weight != rounded).float().mean() < 1e-3
    assert torch.allclose(layer.weight.float(), rounded.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    moved = rounded.float() - W.float()
    assert merged.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert merged.lost == pytest.approx(float((moved - delta).norm() / delta.norm()), rel=0.05)


@pytest.mark.parametrize("part", ["first rows", "last third", "all"])
@pytest.mark.parametrize("base", ["even", "uneven"])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "dora", "ia3", "oft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_of_a_long_weight_speaks_for_all(dtype: torch.dtype, kind: str, base: str, part: str) -> None:
    """What moved and what was lost, of weights and of changes that differ from row to row."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 768)
    with torch.no_grad():
        layer.weight[:10] *= 1e-3 if base == "uneven" else 1.0
        layer.weight[400:] *= 4 if base == "uneven" else 1.0
    pk.wrap(layer.to(dtype), kind)
    train(layer, size=0.01)
    rows = {"first rows": slice(12, None), "last third": slice(0, 512), "all": slice(0, 0)}[part]
    adapter = layer.adapters["default"].eval()
    if kind in ("lora", "loha"):
        with torch.no_grad():
            (adapter.up if kind == "lora" else adapter.up2)[rows] = 0
    W = layer.weight.detach().clone()
    delta = adapter(W, 1.0).upcast().dense().detach().double()
    (merged,) = pk.merge(layer).weights
    moved = layer.weight.detach().double() - W.double()
    assert merged.norm == pytest.approx(float(delta.norm()), rel=1e-4)
    assert merged.change == pytest.approx(float(moved.norm()), rel=0.1)
    # in fp32 the sum is formed where it is stored, in steps that round too
    near = 0.25 if dtype == torch.bfloat16 else 0.5
    assert merged.lost == pytest.approx(float((moved - delta).norm() / delta.norm()), rel=near)


@pytest.mark.parametrize("value", [65000.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_becomes_infinite_anywhere_in_a_long_weight_is_found(dtype: torch.dtype, value: float) -> None:
    value = value if dtype == torch.float16 or value != 65000.0 else 3.4e38
    layer = nn.Linear(700, 512).to(dtype)
    pk.wrap(layer, "lora")
    train(layer)
    with torch.no_grad():
        layer.weight[-3, -2] = value
        layer.adapters["default"].down.mul_(1e4 if value < 1e30 else 1e37)
        delta = layer.adapters["default"].delta(layer.weight).dense()
        layer.weight[-3, -2].copysign_(delta[-3, -2])
    before = layer.weight.detach().clone()
    for backup in ("copy", None):
        with pytest.raises(MergeError, match="overflow"):
            pk.merge(layer, backup=backup)
        assert bits(layer.weight) == bits(before)
