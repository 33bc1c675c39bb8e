"""Rules that PEFT has as optimisers of its own: the same steps from the same start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.training import AdaLoRA, LoRAFA, Recipe, Riemannian

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


def test_adalora_keeps_the_ranks_that_peft_keeps() -> None:
    """Gate for gate, over a whole training."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, lora_alpha=6, tinit=5, tfinal=10, deltaT=5, total_step=60, target_modules=["0", "2"]
    )
    model: Any = peft.get_peft_model(base(), config).double()
    own = base()
    pk.wrap(own, "svdlora", rank=6)
    adapters: list[Any] = [own[i].adapters["default"] for i in (0, 2)]  # type: ignore[index]
    layers = [model.base_model.model.get_submodule(name) for name in ("0", "2")]
    with torch.no_grad():
        for adapter, layer in zip(adapters, layers, strict=True):
            adapter.up.copy_(layer.lora_B["default"])
            adapter.down.copy_(layer.lora_A["default"])
    optimizers = [torch.optim.SGD(pk.adapter_parameters(own), lr=0.3)]
    optimizers.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3))
    rule = AdaLoRA(own, target=3, total=60, warmup=5, final=10, every=5)
    rule.attach(optimizers[0])
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 61):
        x = torch.randn(4, 7, generator=generator, dtype=torch.float64)
        for each, optimizer in zip((own, model.base_model.model), optimizers, strict=True):
            optimizer.zero_grad()
            torch.cos(each(x)).sum().backward()
            optimizer.step()
        model.base_model.rankallocator.update_and_allocate(model.base_model, step)
        gates = [layer.lora_E["default"].flatten() for layer in layers]
        assert all(torch.equal(a.gate != 0, gate != 0) for a, gate in zip(adapters, gates, strict=True))
        # PEFT's scale is α/(r + 1e-5)
        assert all(torch.allclose(a.gate, gate, atol=2e-4) for a, gate in zip(adapters, gates, strict=True))
    ranks = rule.ranks()
    assert sum(ranks.values()) == 6
    out = own(x)
    pk.resize_(own, ranks)
    assert torch.allclose(own(x), out, atol=1e-12)
