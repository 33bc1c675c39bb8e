"""Contribution: how much each weight's share of a fine-tuning did for the loss, by integrated gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapters.base import Adapter
from peftkit.delta import Dense
from peftkit.errors import OptionError, require_integer
from peftkit.training.stand_in import (
    add_up,
    frozen,
    require_finite,
    require_function,
    require_matrices,
    require_whole,
    standing_in,
)
from peftkit.training.starts.processes import sum_over_processes
from peftkit.wrapping.divided import gathered_base
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, one_name
from peftkit.wrapping.pipeline import of_models


@of_models
def contribution(
    model: nn.Module,
    batches: Sequence[Any],
    backward: Callable[[nn.Module, Any], object],
    *,
    steps: int = 10,
    name: str | None = None,
) -> dict[str, float]:
    """Return Σ|ΔW ⊙ ∫₀¹ ∇L(W + t·ΔW) dt| of each weight: what its ΔW did for the loss, along the way from the base.

    For adapters that are trained, `full` ones above all: the weights with the largest contributions are those to adapt
    next time. The integral is a sum over `steps` midpoints, with a pass over all batches at each. Two matrices of the
    size of each weight are kept. The model stays as it is.

    Experimental: a reading of CoLoRA (https://arxiv.org/abs/2408.01099), which ranks the layers of a fully tuned model
    so; its text was not at hand.

    Args:
        model: a wrapped model, whose adapters are trained.
        batches: what `backward` is called with, at every step of the sum.
        backward: called as backward(model, batch), it computes a loss and calls its backward().
        steps: of the sum.
        name: of the adapter; may be left out where there is only one.

    Returns:
        Weight -> its contribution.

    Raises:
        OptionError: `steps` is less than 1, batches come only once, ΔW is 0 everywhere, an adapter does not act or is
            of a stack of experts, or no gradient, or none that is finite, came to a weight.
        MergeStateError: the adapter is merged.
        UnsupportedLayerError: the model is inside DistributedDataParallel, or the adapter is divided among processes.
        UnknownAdapterError: there is no adapter of that name, or several and none is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> _ = [nn.init.normal_(p, std=0.1) for p in pk.adapter_parameters(model)]  # in the place of training
        >>> x = torch.randn(4, 8)
        >>> found = pk.training.contribution(model, [x], lambda m, x: m(x).square().mean().backward())
        >>> ranks = pk.training.spread({weight: [c] * 8 for weight, c in found.items()}, dict.fromkeys(found, 1), 12)
    """
    require_integer("steps", steps, 1, "an integer")
    found = list(installed_adapters(model, [one_name(model, name)]))
    require_function(backward)
    if isinstance(batches, Iterator):
        raise OptionError(f"batches={batches!r} was given, which ends after one of {steps} steps: give a list")
    require_matrices(found)
    require_whole(found, "ask for contributions")

    def point(_: int, at: InstalledAdapter) -> _Point:
        return _Point(at.change(gathered_base(at)).upcast().dense().detach())

    with frozen(model), standing_in(model, found, point) as points:
        if not any(bool(point.change.any()) for point in points):
            raise OptionError("ΔW is 0 on every weight: contribution is of adapters that are trained")
        for step in range(steps):
            for point in points:
                point.go_to((step + 0.5) / steps)
            add_up(model, batches, backward, [point.matrix for point in points])
        for at, missing in zip(found, sum_over_processes([[point.matrix] for point in points]), strict=True):
            if missing:
                raise OptionError(f"{at.site or 'the model'}: no gradient came to it: give batches, and a loss of it")
        contributions = {at: point.contribution() / steps for at, point in zip(found, points, strict=True)}
    for at, own in contributions.items():
        require_finite(at, "its gradient", own)
    return {at.site: own for at, own in contributions.items()}


class _Point(Adapter):
    """t·ΔW as a matrix with gradients."""

    kind = "point"

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = change
        self.matrix = nn.Parameter(torch.zeros_like(change))

    def delta(self, weight: Tensor) -> Dense:
        del weight
        return Dense(self.matrix)

    @torch.no_grad()
    def go_to(self, t: float) -> None:
        self.matrix.copy_(t * self.change)

    def contribution(self) -> float:
        assert self.matrix.grad is not None
        return float((self.change * self.matrix.grad).abs().sum())
