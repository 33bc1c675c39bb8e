"""Projection: the bound that a kind has of its own, restored after each step."""

from __future__ import annotations

from typing import ClassVar

from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.training.recipes.recipe import Recipe


class Projection(Recipe):
    """Moves adapters after each step into the set that their algorithm allows, as LoLDU's ‖ΔW‖ ≤ ε.

    It is `pk.project_` at every step (https://arxiv.org/abs/2410.13618).

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        OptionError: no adapter has such a set.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "loldu", rank=2, epsilon=0.1)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> handle = pk.training.Projection(model).attach(optimizer)
    """

    wanted: ClassVar[str] = "a set that it must stay in, as loldu with epsilon has"
    inside: ClassVar[bool] = False

    def takes(self, adapter: Adapter) -> bool:
        return adapter.projects

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        for part in self.parts.values():
            part.adapter.project_()
