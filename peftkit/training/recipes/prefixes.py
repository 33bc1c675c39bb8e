"""Prefixes: one draw a step for the whole model, for kinds that train a part of their ranks at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from peftkit.adapters.base import Adapter
from peftkit.training.recipes.recipe import Attachment, Recipe


class Prefixes(Recipe):
    """Draws how many ranks a step trains, once for all adapters of a model, as DyLoRA's paper does.

    Without it every layer draws at each of its calls (https://arxiv.org/abs/2210.07558).

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.
        seed: of the draws.

    Raises:
        OptionError: no adapter trains a part of its ranks at a time.
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "dylora", rank=8, block=2)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> prefixes = pk.training.Prefixes(model)
        >>> handle = prefixes.attach(optimizer)  # draws now, and after each step
    """

    wanted: ClassVar[str] = "ranks that train a part at a time, as dylora has"
    needs_whole: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, name: str | None = None, seed: int = 0) -> None:
        super().__init__(model, name=name)
        self._generator = torch.Generator().manual_seed(seed)
        #: what was drawn for the next step
        self._share: float | None = None

    def takes(self, adapter: Adapter) -> bool:
        return type(adapter).draws_prefixes

    def draw(self) -> float:
        """Draw for the next step. Returns the share of the ranks, in [0, 1), that the adapters round up from."""
        share = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        self._use(share)
        return share

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Draw now, unless a state was loaded, and after each step of an optimiser; see `Recipe.attach`.

        Returns:
            A handle, whose remove() ends that and lets every layer draw for itself.
        """
        if self._share is None:
            self.draw()
        return super().attach(optimizer)

    def release_(self) -> None:
        super().release_()
        self._use(None)

    def after_step(self, optimizer: Optimizer) -> None:
        del optimizer
        self.draw()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "share": self._share}

    def resume_(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._use(state["share"])

    def _use(self, share: float | None) -> None:
        self._share = share
        for part in self.parts.values():
            part.adapter.use_prefix(share)
