"""LoRA-FA's rule: the step of B alone that is the best one for the weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.training.recipes.pairs import factors, pseudo_inverse, wide
from peftkit.training.recipes.recipe import Recipe


class LoRAFA(Recipe):
    """LoRA-FA's rule: where A is frozen, the step of B is the best one for the whole weight.

    g_B becomes g_B·(AAᵀ)⁻¹/γ², with which γ·g_B·A is the projection of the weight's gradient on the rows of A
    (https://arxiv.org/abs/2308.03303). PEFT's optimiser of this name makes that product in bf16 where the device has
    it; here it is in fp64.

    It is for adapters of the kind lora-fa, and for those of lora whose `down` is frozen.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter has two factors of which the second is frozen.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora-fa", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> handle = pk.training.LoRAFA(model).attach(optimizer)
    """

    wanted: ClassVar[str] = "two factors of which the second is frozen, as lora-fa has"

    def takes(self, adapter: Adapter) -> bool:
        pair = adapter.pair()
        return pair is not None and pair.scale != 0 and not (pair.both_train or pair.down.requires_grad)

    def before_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for part in self.parts.values():
            pair = part.adapter.pair()
            if pair is not None and pair.up.grad is not None:
                _, A, scale = factors(pair)
                inverse = pseudo_inverse(*torch.linalg.eigh(A @ A.mT))
                pair.up.grad.copy_(pair.up.grad.to(wide(A)) @ inverse / scale**2)
