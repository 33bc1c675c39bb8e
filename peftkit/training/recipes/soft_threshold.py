"""SoRA's threshold: gates of ranks that are pulled to 0, and stay there."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from torch.nn import functional as F
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.errors import require_number
from peftkit.training.recipes.recipe import Recipe


class SoftThreshold(Recipe):
    """SoRA's threshold: after each step, gates move towards 0 by ξ, and stay there once they reach it.

    g becomes sign(g)·max(|g| − ξ, 0), the proximal step of an L1 penalty; a gate of 0 takes its rank out of ΔW. The
    released code zeroes up to 2ξ (https://arxiv.org/abs/2311.11696).

    Args:
        model: a wrapped model.
        xi: ξ.
        name: of one adapter; by default all.

    Raises:
        OptionError: ξ is not above 0, or no adapter has gates of its ranks.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "svdlora", rank=4, init="sora")
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model))
        >>> handle = pk.training.SoftThreshold(model, 1e-3).attach(optimizer)
    """

    wanted: ClassVar[str] = "gates of its ranks, as svdlora has"

    def __init__(self, model: nn.Module, xi: float, *, name: str | None = None) -> None:
        require_number("xi", xi, positive=True)
        super().__init__(model, name=name)
        self.xi = xi

    def takes(self, adapter: Adapter) -> bool:
        return type(adapter).gates is not None

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for part in self.parts.values():
            gates = type(part.adapter).gates
            assert gates is not None
            gate = part.adapter.get_parameter(gates)
            gate.copy_(F.softshrink(gate, self.xi))
