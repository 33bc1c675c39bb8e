"""A change that depends on the input acts by its factors, and is refused by name wherever a matrix is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.adapters.options import factory
from peftkit.delta import InputDependent
from peftkit.errors import NotAWeightChangeError, OptionError, UnsupportedLayerError
from peftkit.geometry import Geometry, Shape


class _Gated(InputDependent):
    """B·(sigmoid(x·w)·A·x): a LoRA behind a gate. No dataclass, and all in plain attributes."""

    def __init__(self, gate: Tensor, A: Tensor, B: Tensor) -> None:
        self.gate, self.A, self.B = gate, A, B

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def scaled(self, strength: float | Tensor) -> _Gated:
        return _Gated(self.gate, self.A, self.B * strength)

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        del wx
        return F.linear(torch.sigmoid(x @ self.gate)[..., None] * F.linear(x, self.A), self.B)

    def apply_flops(self, outputs: int) -> int:
        return 10**9 * outputs  # never the cheaper one


@pytest.fixture(autouse=True)
def gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))

    @registry.register("gated")
    class Gated(pk.Adapter):
        def __init__(self, shape: Shape, weight: Tensor, *, rank: int = 2) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.ones(shape.columns, **factory(weight)))
            self.A = nn.Parameter(torch.ones(rank, shape.columns, **factory(weight)))
            self.B = nn.Parameter(torch.zeros(shape.rows, rank, **factory(weight)))

        def delta(self, weight: Tensor) -> _Gated:
            del weight
            return _Gated(self.gate, self.A, self.B)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    pk.wrap(layer, "gated")
    for parameter in pk.adapter_parameters(layer):
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("tokens", [1, 100_000])
@pytest.mark.parametrize("gradients", [True, False])
def test_it_acts_by_its_factors(layer: nn.Linear, tokens: int, gradients: bool) -> None:
    """However many tokens there are, and beside another adapter."""
    pk.wrap(layer, "lora", rank=2, name="other")
    nn.init.normal_(layer.adapters["other"].up)
    x, own = torch.randn(tokens, 8), layer.adapters["default"]
    with torch.set_grad_enabled(gradients):
        gate = torch.sigmoid(x @ own.gate)[:, None]
        W = layer.weight + layer.adapters["other"].delta(layer.weight).dense()
        expected = F.linear(x, W, layer.bias) + gate * (x @ own.A.mT) @ own.B.mT
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_the_plan_says_so() -> None:
    plan = pk.plan(nn.Sequential(nn.Linear(8, 6)), "gated")
    assert [entry.route for entry in plan.entries] == ["input"]


def test_it_has_no_dense_route() -> None:
    layer = nn.Linear(8, 6)
    with pytest.raises(OptionError, match="depends on the layer's input"):
        pk.wrap(layer, "gated", route="dense")
    assert type(layer) is nn.Linear


def test_it_is_not_for_weights_that_are_read() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(UnsupportedLayerError, match="depends on the layer's input"):
        pk.wrap(attention, "gated")
    assert type(attention) is nn.MultiheadAttention


@pytest.mark.parametrize("backup", ["copy", "packed", None])
def test_it_is_not_merged(layer: nn.Linear, backup: str | None) -> None:
    before, x = layer.weight.detach().clone(), torch.randn(3, 8)
    y = layer(x)
    with pytest.raises(NotAWeightChangeError, match="cannot be merged"):
        pk.merge(layer, backup=backup)
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), y)


def test_it_is_not_measured(layer: nn.Linear) -> None:
    with pytest.raises(NotAWeightChangeError, match="measured"):
        pk.monitor.CSMonitor(layer).measure()


def test_it_is_not_exported(layer: nn.Linear, tmp_path: Path) -> None:
    pk.save(layer, tmp_path / "gated.safetensors")
    with pytest.raises(pk.errors.PeftkitError):
        pk.export(tmp_path / "gated.safetensors", tmp_path / "out.safetensors", target="kohya")
    assert not (tmp_path / "out.safetensors").exists()
