"""Comp-LoRA: a ΔW that stays out of the leading output directions of the base."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.adapters.frame import frame
from peftkit.errors import require_integer, require_option
from peftkit.training.recipes.recipe import Recipe
from peftkit.wrapping.divided import gathered_base


class CompLoRA(Recipe):
    r"""Comp-LoRA's projection: ΔW keeps out of the k leading left singular vectors U of the base, UᵀΔW = 0.

    B's gradient becomes (I − UUᵀ)·g_B before a step, and B itself (I − UUᵀ)·B after it, since Adam's step leaves the
    space of its gradients. U (m, k) is computed once, when the rule is made, and kept: m·k numbers a layer.

    Experimental: a reading of the abstract of https://arxiv.org/abs/2501.15040; the paper may project the columns of
    ΔW too.

    Args:
        model: a wrapped model.
        k: how many directions are left alone, fewer than the rows of each layer.
        name: of one adapter; by default all.

    Raises:
        OptionError: k is no integer from 1, or not below the singular values and rows of a layer; or no adapter has two
            factors that start at 0.
        UnknownAdapterError: there is no adapter of that name, or none at all.
        UnsetAdapterError: a weight is on the meta device.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> handle = pk.training.CompLoRA(model, k=4).attach(optimizer)
    """

    wanted: ClassVar[str] = "two factors with a product of 0 at the start, as lora has"
    inside: ClassVar[bool] = False

    def __init__(self, model: nn.Module, k: int, *, name: str | None = None) -> None:
        require_integer("k", k, 1, "an integer")
        super().__init__(model, name=name)
        for place, part in self.parts.items():
            shape = part.at.slot.geometry.shape
            most = min(shape.rows - 1, shape.columns)
            require_option(k <= most, "k", k, f"at most {most} for the {shape} weight of {place}")
            part.at.require_loaded()
        self._directions = {place: frame(gathered_base(part.at), k)[0] for place, part in self.parts.items()}

    def takes(self, adapter: Adapter) -> bool:
        pair = adapter.pair()
        return pair is not None and pair.up0 is None

    def before_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for place, part in self.parts.items():
            pair = part.adapter.pair()
            if pair is not None and pair.up.grad is not None:
                self._project_(place, pair.up.grad)

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for place, part in self.parts.items():
            pair = part.adapter.pair()
            if pair is not None:
                self._project_(place, pair.up)

    def _project_(self, place: str, tensor: Tensor) -> None:
        """Take the leading directions out of a tensor (m, r), in place."""
        U = self._directions[place].to(tensor.device)
        wide = tensor.to(U.dtype)
        tensor.copy_(wide - U @ (U.mT @ wide))
