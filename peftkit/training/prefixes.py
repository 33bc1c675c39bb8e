"""Prefixes: one draw a step for the whole model, for kinds that train a part of their ranks at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftkit.errors import OptionError
from peftkit.wrapping.installed import installed_parts


class Prefixes:
    """Draws how many ranks a step trains, once for all adapters of a model, as DyLoRA's paper does.

    Without it every layer draws at each of its calls.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.
        seed: of the draws.

    Raises:
        OptionError: no adapter trains a part of its ranks at a time.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "dylora", rank=8, block=2)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> prefixes = pk.training.Prefixes(model)
        >>> handle = prefixes.attach(optimizer)  # draws now, and after each step
    """

    def __init__(self, model: nn.Module, *, name: str | None = None, seed: int = 0) -> None:
        self._adapters = [part for part in installed_parts(model, name) if type(part).draws_prefixes]
        if not self._adapters:
            raise OptionError("no adapter of the model trains a part of its ranks at a time, as dylora does: wrap one")
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self) -> float:
        """Draw for the next step. Returns the share of the ranks, in [0, 1), that the adapters round up from."""
        share = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        for adapter in self._adapters:
            adapter.use_prefix(share)
        return share

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Draw now, and after each step of an optimiser. Returns the hook's handle, whose remove() ends that."""
        self.draw()

        def again(*_: object) -> None:
            self.draw()

        return optimizer.register_step_post_hook(again)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on with the same draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws of another run, from the one after its last."""
        self._generator.set_state(state["generator"])
