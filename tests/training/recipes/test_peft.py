"""Rules that PEFT has as optimisers of its own: the same steps from the same start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.training import LoRAFA, Recipe, Riemannian

peft = pytest.importorskip("peft")
lorafa = pytest.importorskip("peft.optimizers.lorafa")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def theirs() -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    return peft.get_peft_model(base(), config).double()


def ours(kind: str, model: Any) -> nn.Module:
    """The same adapters with the same values."""
    own = base()
    pk.wrap(own, kind, rank=3, alpha=6)
    with torch.no_grad():
        for name, layer in own.named_children():
            if isinstance(layer, nn.Linear):
                other = model.base_model.model.get_submodule(name)
                adapter: Any = layer.adapters["default"]  # type: ignore[index]
                adapter.up.copy_(other.lora_B["default"].weight)
                adapter.down.copy_(other.lora_A["default"].weight)
    return own


def train(model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    """The model's outputs after three steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cos(model(torch.randn(4, 7, generator=generator, dtype=torch.float64))).sum().backward()
        optimizer.step()
    return model(torch.randn(4, 7, generator=generator, dtype=torch.float64)).detach()


def test_lora_fa_takes_the_steps_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's product in bf16 is switched off, and the ε of Adam, which PEFT puts elsewhere in the formula."""
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    model = theirs()
    optimizer = lorafa.create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.05)
    optimizer.param_groups[0]["eps"] = 0.0
    own = ours("lora-fa", model)
    mine = torch.optim.AdamW(pk.adapter_parameters(own), lr=0.05, weight_decay=0.0, eps=0.0)
    LoRAFA(own).attach(mine)
    # the 1e-8 that PEFT adds to AAᵀ is what is left
    assert torch.allclose(train(own, mine), train(model, optimizer), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_takes_the_steps_of_peft(make: type[torch.optim.Optimizer]) -> None:
    from peft.optimizers.riemannian import create_riemannian_optimizer

    model = theirs()
    own = ours("lora", model)
    mine = make(pk.adapter_parameters(own), lr=0.05)  # type: ignore[call-arg]
    rule: Recipe = Riemannian(own)
    rule.attach(mine)
    optimizer = create_riemannian_optimizer(model, make, lr=0.05)
    assert torch.allclose(train(own, mine), train(model, optimizer), rtol=1e-9, atol=1e-10)
